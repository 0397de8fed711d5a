"""The layers (fedsim below actors below tune) and the size of files and functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = {"fedsim": {"ray", "actors", "tune"}, "actors": {"tune"}}
COMPOSITION_ROOTS = {"fedsim.cli"}
# Prints each module whose import brought in a forbidden package, and what it brought in.
PROBE = """
import importlib, sys
forbidden, *modules = sys.argv[1:]
for module in modules:
    importlib.import_module(module)
    found = sorted(set(forbidden.split(",")) & set(sys.modules))
    if found:
        sys.exit(f"importing {module} imports {found}")
"""


def _sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("package", LAYERS)
def test_importing_a_layer_does_not_import_the_layers_above(package: str, tmp_path: Path) -> None:
    modules = [name for path in _sources(package) if (name := _module_name(path)) not in COMPOSITION_ROOTS]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, ",".join(sorted(LAYERS[package])), *modules],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_command_line_imports_ray_only_inside_its_commands(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, "ray,actors,tune", "fedsim.cli"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_run_imports_what_it_may_not_need_only_when_it_does(tmp_path: Path) -> None:
    """Each of these is memory and time of every process: cryptography alone is 5 MB in driver, server and actors."""
    heavy = "Crypto,cryptography,dp_accounting,fsspec,jinja2,pandas,pyarrow,scipy,sklearn,tensorboardX,vl_convert"
    modules = ["fedsim.simulation", "actors.runtime", "actors.client", "actors.server"]
    command = [sys.executable, "-c", PROBE, heavy, *modules]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["fedsim", "actors", "tune"])
def test_files_and_functions_stay_short(package: str) -> None:
    too_long = []
    for path in _sources(package):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 400:
            too_long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines; split it by subject")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > 60:
                    too_long.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    assert not too_long, "\n".join(too_long)
