"""What SECURITY.md says of the code: nothing that is read is executed, and nothing listens to strangers."""

import ast
import json
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedsim.data.importers import import_dataset
from fedsim.data.importers.features import read_features
from fedsim.data.split_files import read_split_rows
from fedsim.errors import DataError

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for name in ("fedsim", "actors", "tune") for path in (ROOT / name).rglob("*.py"))
# Calls that execute what they read, or open a way for others. What is allowed says where and why.
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp", "pty.spawn"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader"),
    *("pickle.load", "pickle.loads", "marshal.loads", "marshal.load", "shelve.open", "dill.loads", "joblib.load"),
    *("cloudpickle.loads", "cloudpickle.load", "pandas.read_pickle", "runpy.run_path", "import_module"),
    *("importlib.import_module", "tarfile.open", "shutil.unpack_archive", "extractall", "xml.etree.ElementTree.parse"),
}
ALLOWED = {
    ("tune/search_space.py", "runpy.run_path"),  # a search space that is Python is its user's own program
    ("fedsim/data/encoders.py", "import_module"),  # of the encoders' packages, by names that stand in the code
}
LOADERS = {"np.load": ("allow_pickle", False), "torch.load": ("weights_only", True)}
PICKLE_READERS = {"fedsim/data/importers/fede.py"}  # by an unpickler that knows numpy arrays alone


def _calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Go through all calls of the three packages: file, name as it is written, call."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path.relative_to(ROOT).as_posix(), ast.unparse(node.func), node


def test_nothing_that_executes_what_it_reads_is_called() -> None:
    assert len(SOURCES) > 100
    found = {
        (file, name)
        for file, name, _ in _calls()
        if name in FORBIDDEN or name.rpartition(".")[2] in ("extractall", "unsafe_load")
    }
    assert found <= ALLOWED


def test_shells_are_not_used() -> None:
    for file, name, call in _calls():
        shell = [item for item in call.keywords if item.arg == "shell"]
        assert not shell, f"{file}: {name} with a shell"
        if name in ("subprocess.run", "subprocess.Popen"):
            assert not isinstance(call.args[0], ast.Constant), f"{file}: a command as one text"


def test_every_loader_of_arrays_refuses_pickles() -> None:
    seen = set()
    for file, name, call in _calls():
        if name in LOADERS:
            key, value = LOADERS[name]
            given = {item.arg: item.value for item in call.keywords}
            assert key in given, f"{file}: {name} without {key}"
            assert ast.literal_eval(given[key]) is value, f"{file}: {name} with {key}={ast.unparse(given[key])}"
            seen.add(name)
    assert seen == LOADERS.keys()


def test_pickle_is_imported_where_it_is_restricted_alone() -> None:
    pattern = re.compile(r"^\s*(?:import|from) (?:pickle|cloudpickle|dill|joblib|marshal|shelve)\b", re.MULTILINE)
    users = {path.relative_to(ROOT).as_posix() for path in SOURCES if pattern.search(path.read_text(encoding="utf-8"))}
    assert users == PICKLE_READERS


def test_yaml_is_read_in_one_place() -> None:
    """`fedsim.parsing` bounds what a few lines can stand for; nobody goes around it."""
    users = {file for file, name, _ in _calls() if name == "yaml.safe_load"}
    assert users == {"fedsim/parsing.py"}


def test_templates_escape_what_they_are_given() -> None:
    made = [call for _, name, call in _calls() if name.rpartition(".")[2] == "Environment"]
    assert made
    for call in made:
        assert {item.arg: ast.unparse(item.value) for item in call.keywords}["autoescape"] == "True"
    pages = list((ROOT / "fedsim" / "report" / "pages").glob("*.html"))
    assert pages
    # What is let through unescaped is our own: style, scripts, and JSON made for a script element.
    unescaped = {
        found for page in pages for found in re.findall(r"(\w+)\s*\|\s*safe", page.read_text(encoding="utf-8"))
    }
    assert unescaped <= {"style", "library", "drawing", "plots"}


def test_ray_listens_to_this_machine_alone_and_asks_for_its_token() -> None:
    """Ray's defaults since 2.59, which no call and no environment of ours may loosen."""
    seen = 0
    for file, name, call in _calls():
        if name == "ray.init":
            seen += 1
            given = {item.arg for item in call.keywords}
            assert not given & {"dashboard_host", "_node_ip_address"}, f"{file} opens Ray to the network"
    assert seen
    for path in SOURCES:
        texts = [node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if _is_text(node)]
        assert "RAY_AUTH_MODE" not in texts, f"{path} sets the mode"
    minimum = next(
        Requirement(line.split('"')[1])
        for line in (ROOT / "pyproject.toml").read_text().splitlines()
        if '"ray[' in line
    )
    assert "2.58.0" not in minimum.specifier
    assert "2.60.0" in minimum.specifier


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


class _Harmful:
    """Pickled, it asks the reader to call something."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def _harm(place: Path) -> list[Any]:
    """Make what would leave the file `place` if it were executed, in several ways."""
    return [
        _Harmful(place.touch),
        _Harmful(eval, f"open({str(place)!r}, 'w')"),
        _Harmful(exec, f"open({str(place)!r}, 'w')"),
        _Harmful(os.system, f"touch {place}"),
        _Harmful(np.save, str(place), np.zeros(1)),
        _Harmful(np.memmap, str(place), "uint8", "w+", 0, (1,)),
    ]


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_harmful_pickle_is_refused_unexecuted(tmp_path: Path, protocol: int) -> None:
    harmed = tmp_path / "harmed"
    for harmful in _harm(harmed):
        for whole in (harmful, [harmful], [{"train": {"edge_index_ori": harmful}}]):
            path = tmp_path / "fede.pkl"
            path.write_bytes(pickle.dumps(whole, protocol))
            with pytest.raises(DataError, match="refused"):
                import_dataset(path, tmp_path / "out")
            assert not harmed.exists()
            assert not (tmp_path / "out").exists()


def test_allowed_names_do_not_lead_further(tmp_path: Path) -> None:
    """`getattr` by dotted names ("ndarray.tofile") and the modules' other names stay closed."""
    harmed = tmp_path / "harmed"
    dotted = b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93."
    other = b"\x80\x04\x8c\x16numpy._core.multiarray\x8c\x08fromfile\x93."
    old = b"cos\nsystem\n(S'touch " + str(harmed).encode() + b"'\ntR."
    for content in (dotted, other, old):
        (tmp_path / "fede.pkl").write_bytes(content)
        with pytest.raises(DataError, match="only numpy arrays are accepted"):
            import_dataset(tmp_path / "fede.pkl", tmp_path / "out")
    assert not harmed.exists()


def test_arrays_of_objects_are_refused_in_every_kind_of_file(tmp_path: Path) -> None:
    import torch

    harmed = tmp_path / "harmed"
    harmful = np.array([_Harmful(harmed.touch)], dtype=object)
    np.save(tmp_path / "image.npy", harmful, allow_pickle=True)
    np.savez(tmp_path / "image.npz", values=harmful)
    np.savez(tmp_path / "split.npz", train=harmful, valid=harmful, test=harmful)
    torch.save({"image": _Harmful(harmed.touch)}, tmp_path / "image.pth")
    for name in ("image.npy", "image.npz", "image.pth"):
        with pytest.raises(DataError):
            read_features(tmp_path / name, "image", 1)
    with pytest.raises(DataError, match="without pickle"):
        read_split_rows(tmp_path / "split.npz")
    assert not harmed.exists()


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """A zip file of half a megabyte whose member unpacks to 512 MB is refused before it is unpacked."""
    import zipfile

    header = np.lib.format.magic(1, 0)
    text = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 134217728), }".ljust(117) + "\n"
    with (
        zipfile.ZipFile(tmp_path / "image.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("image.npy", "w") as member,
    ):
        member.write(header + struct.pack("<H", len(text)) + text.encode())
        for _ in range(512):
            member.write(bytes(1 << 20))
    with pytest.raises(DataError, match="would unpack to 536,"):
        read_features(tmp_path / "image.npz", "image", 1)


def test_the_bill_of_materials_agrees_with_the_constraints() -> None:
    """When this fails: `python scripts/build_sbom.py`."""
    bill = json.loads((ROOT / "sbom.json").read_text(encoding="utf-8"))
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    expected = {canonicalize_name(item.name): str(item.specifier).removeprefix("==") for item in pins}
    assert bill["bomFormat"] == "CycloneDX"
    assert {canonicalize_name(item["name"]): item["version"] for item in bill["components"]} == expected
    assert all(item["purl"].startswith("pkg:pypi/") for item in bill["components"])
    refs = {item["bom-ref"] for item in bill["components"]} | {bill["metadata"]["component"]["bom-ref"]}
    assert {item["ref"] for item in bill["dependencies"]} <= refs
    assert {ref for item in bill["dependencies"] for ref in item.get("dependsOn", ())} <= refs
