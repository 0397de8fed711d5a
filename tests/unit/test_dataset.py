"""The data set format: what is written is read back, and each kind of broken file is refused with its place."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from builders import tiny_graph, write_tiny_dataset
from fedsim.data import storage
from fedsim.data.dataset import KnowledgeGraph, load_dataset, resolve_dataset, save_dataset
from fedsim.errors import DataError


def edit_line(path: Path, line: int, text: str) -> None:
    lines = path.read_text().split("\n")
    lines[line - 1] = text
    path.write_text("\n".join(lines))


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    graph = tiny_graph()
    save_dataset(graph, tmp_path / "tiny")
    loaded = load_dataset(tmp_path / "tiny")
    for field in ("name", "entity_keys", "entity_labels", "entity_descriptions", "relation_keys", "relation_labels"):
        assert getattr(loaded, field) == getattr(graph, field)
    for name, triples in graph.triples.items():
        np.testing.assert_array_equal(loaded.triples[name], triples)
    assert set(loaded.features) == {"text", "image"}
    for modality, features in graph.features.items():
        np.testing.assert_array_equal(loaded.features[modality].values, features.values)
        np.testing.assert_array_equal(loaded.features[modality].entity, features.entity)
    assert loaded.meta["licence"] == "CC0-1.0"
    assert loaded.meta["counts"] == {"entities": 40, "relations": 6, "train": 160, "valid": 20, "test": 20}


def test_features_are_mapped_not_copied(tmp_path: Path) -> None:
    loaded = load_dataset(write_tiny_dataset(tmp_path / "tiny"))
    assert isinstance(loaded.features["text"].values, np.memmap)
    assert not loaded.features["text"].values.flags.writeable


def test_pack_is_injective_and_ordered() -> None:
    """With 40 entities and 6 relations (1, 2, 3) packs to (1 * 6 + 2) * 40 + 3 = 323."""
    graph = tiny_graph()
    assert graph.pack(np.array([[1, 2, 3]])).tolist() == [323]
    assert len(np.unique(graph.pack(graph.train))) == len(np.unique(graph.train, axis=0))


def test_parquet_triples_equal_tsv(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    path = write_tiny_dataset(tmp_path / "tiny")
    expected = load_dataset(path)
    for name in ("train", "valid", "test"):
        rows = storage.read_rows(path / "triples" / f"{name}.tsv", 3)
        columns = dict(zip(("head", "relation", "tail"), zip(*rows, strict=True), strict=True))
        write_table(pyarrow.table(columns), path / "triples" / f"{name}.parquet")
        (path / "triples" / f"{name}.tsv").unlink()
    meta = json.loads((path / "meta.json").read_text())
    del meta["checksums"]
    (path / "meta.json").write_text(json.dumps(meta))
    np.testing.assert_array_equal(load_dataset(path).train, expected.train)


@pytest.mark.parametrize(
    ("file", "line", "text", "message"),
    [
        ("triples/train.tsv", 3, "e0\tr0", r"triples/train\.tsv:3: 2 columns where 3 are expected"),
        ("triples/valid.tsv", 2, "e0\tr0\te9999", r"triples/valid\.tsv:2: unknown entity 'e9999'"),
        ("triples/test.tsv", 5, "e0\tr77\te1", r"triples/test\.tsv:5: unknown relation 'r77'"),
        ("entities.tsv", 4, "e0\tagain\t\t", r"entities\.tsv:4: key 'e0' already stands on line 2"),
        ("entities.tsv", 3, "\tno key\t\t", r"entities\.tsv:3: empty key"),
        ("entities.tsv", 1, "name\tlabel\tdescription\tpicture", r"entities\.tsv:1: no column 'key'"),
        ("relations.tsv", 2, "r0\trelation 0\textra", r"relations\.tsv:2: 3 columns where 2"),
        ("meta.json", 2, "nonsense", r"meta\.json:2: not valid JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, file: str, line: int, text: str, message: str) -> None:
    path = write_tiny_dataset(tmp_path / "tiny")
    edit_line(path / file, line, text)
    with pytest.raises(DataError, match=message):
        load_dataset(path)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    path = write_tiny_dataset(tmp_path / "tiny")
    (path / "triples/valid.tsv").write_text("")
    with pytest.raises(DataError, match=r"valid\.tsv: empty split"):
        load_dataset(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = write_tiny_dataset(tmp_path / "tiny")
    (path / "relations.tsv").unlink()
    with pytest.raises(DataError, match=r"relations\.tsv: file not found"):
        load_dataset(path)


def test_an_altered_file_is_noticed(tmp_path: Path) -> None:
    path = write_tiny_dataset(tmp_path / "tiny")
    edit_line(path / "entities.tsv", 2, "e0\tanother label\t\t")
    with pytest.raises(DataError, match=r"entities\.tsv: altered since it was written"):
        load_dataset(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan", r"text\.safetensors: row 7 \(entity 7\) holds NaN or infinity"),
        ("rows", r"text\.safetensors: 39 feature rows but entity ids int64 \[40\]"),
        ("dim", r"text\.safetensors: values are float32 \[40\], need float16 or float32 \[rows, dim\]"),
        ("order", r"text\.safetensors: entity ids must increase"),
        ("range", r"text\.safetensors: entity ids must increase from row to row and lie in 0\.\.39"),
        ("double", r"text\.safetensors: values are float64"),
        ("narrow", r"text\.safetensors: dim is 11 but meta\.json says 12"),
    ],
)
def test_broken_features_are_refused(tmp_path: Path, change: str, message: str) -> None:
    path = write_tiny_dataset(tmp_path / "tiny")
    values, entity = tiny_graph().features["text"].values.copy(), np.arange(40)
    if change == "nan":
        values[7, 3] = np.nan
    elif change == "rows":
        values = values[:39]
    elif change == "dim":
        values = values[:, 0].copy()
    elif change == "order":
        entity = entity[::-1].copy()
    elif change == "range":
        entity[-1] = 40
    elif change == "double":
        values = values.astype(np.float64)
    else:
        values = values[:, :11].copy()
    save_file({"values": values, "entity": entity}, str(path / "features/text.safetensors"))
    with pytest.raises(DataError, match=message):
        load_dataset(path)


def test_a_feature_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_tiny_dataset(tmp_path / "tiny")
    file = path / "features/image.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"image\.safetensors: not a whole safetensors file"):
        load_dataset(path)
    file.write_bytes(b"abc")
    with pytest.raises(DataError, match=r"image\.safetensors: not a whole safetensors file"):
        load_dataset(path)


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    path = write_tiny_dataset(tmp_path / "tiny")
    before = sorted(path.rglob("*"))
    with pytest.raises(DataError, match="already exists"):
        save_dataset(tiny_graph(seed=1), path)
    assert sorted(path.rglob("*")) == before


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "sha256_file", fail)
    with pytest.raises(DataError, match=r"tiny: cannot be written \(No space left on device\)"):
        save_dataset(tiny_graph(), tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []


def with_pictures(folder: Path) -> KnowledgeGraph:
    folder.mkdir()
    (folder / "a.png").write_bytes(b"picture a")
    graph = tiny_graph()
    return replace(graph, entity_pictures=["a.png", *[""] * (graph.num_entities - 1)])


def test_pictures_are_copied(tmp_path: Path) -> None:
    graph = with_pictures(tmp_path / "source")
    save_dataset(graph, tmp_path / "tiny", tmp_path / "source")
    assert (tmp_path / "tiny/pictures/a.png").read_bytes() == b"picture a"
    assert load_dataset(tmp_path / "tiny").entity_pictures[0] == "a.png"


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    graph = with_pictures(tmp_path / "source")
    (tmp_path / "source/a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png: picture not found"):
        save_dataset(graph, tmp_path / "tiny", tmp_path / "source")
    assert not (tmp_path / "tiny").exists()


def test_labels_with_tabs_and_exotic_line_separators_survive(tmp_path: Path) -> None:
    graph = tiny_graph()
    graph = replace(graph, entity_labels=["tab\there", "next\x85line", *graph.entity_labels[2:]])
    save_dataset(graph, tmp_path / "tiny")
    assert load_dataset(tmp_path / "tiny").entity_labels[:2] == ["tab here", "next\x85line"]


def test_a_data_set_is_found_by_folder_and_by_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_dataset(tmp_path / "root/tiny")
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    assert resolve_dataset(str(path)) == path
    with pytest.raises(DataError, match=r"data set 'tiny' not found; .*FEDSIM_DATA"):
        resolve_dataset("tiny")
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "root"))
    assert resolve_dataset("tiny") == path


def test_a_folder_that_is_no_data_set_says_how_to_import(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "x", ignore_errors=True)
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match=r"no meta\.json.*fedsim data import"):
        resolve_dataset(str(tmp_path / "x"))
