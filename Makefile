# A fresh machine needs Python 3.10 or newer (tested: 3.11), git and make; everything else goes into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PACKAGES := $(wildcard fedsim actors tune)
# --no-compile halves the time of a first install; Python compiles what it imports.
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: help run test check audit sbom format clean
.DELETE_ON_ERROR:

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

run: .venv/run.stamp ## install into .venv, then run the main job (ARGS="--federation.num_rounds 5" changes it)
	$(BIN)/fedsim run $(ARGS)

test: .venv/dev.stamp ## install with the test tools, then run the tests (ARGS="-k ranking" chooses)
	$(BIN)/python -m pytest $(ARGS)

check: .venv/dev.stamp ## formatting, lint with the layering rule, types, dependencies that fit together
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(PACKAGES)
	$(BIN)/python -m pip check

audit: .venv-audit/stamp ## known weaknesses of the pinned dependencies (asks the advisory databases: needs a network)
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

sbom: .venv-audit/stamp ## write sbom.json, the software bill of materials
	.venv-audit/bin/python scripts/build_sbom.py

format: .venv/dev.stamp ## format and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environments and all caches (runs/ stays)
	rm -rf .venv .venv-audit .mypy_cache .pytest_cache .ruff_cache .hypothesis

# A stamp is written last, so an interrupted install is repeated; it depends on what decides its contents.
.venv/run.stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fedsim needs Python 3.10 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP_INSTALL) -e .
	@touch $@

.venv/dev.stamp: .venv/run.stamp
	$(BIN)/python $(PIP_INSTALL) -e '.[dev,encode,privacy]'
	@touch $@

# Apart from the others: what these tools bring is imported by each of Ray's processes where it is installed.
.venv-audit/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python $(PIP_INSTALL) -e '.[dev,encode,privacy,audit]'
	@touch $@
