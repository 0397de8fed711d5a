"""The wheel holds what the tree holds, and the pinned versions satisfy the declared ones."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Build the wheel and list the files of its packages."""
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(target)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_holds_exactly_the_files_of_the_tree(wheel_files: set[str]) -> None:
    tree = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".toml", ".pyc")
    }
    assert wheel_files == tree


def test_every_python_package_of_the_tree_is_in_the_wheel() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests", "benchmarks", "examples", "scripts"}
    assert folders == set(PACKAGES)


def test_constraints_pin_each_declared_dependency_to_a_version_it_allows() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[name.lower().replace("_", "-")] = version
    extras = PROJECT["project"].get("optional-dependencies", {})
    for text in [*PROJECT["project"]["dependencies"], *(item for extra in extras.values() for item in extra)]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), text


def test_constraints_pin_the_versions_the_project_is_built_for() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert "ray==2.60.0" in pins
    assert "torch==2.13.0" in pins
