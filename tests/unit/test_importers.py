"""Importing what people have: each format gives the same graph, and what is broken is named and leaves nothing."""

import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from builders import tiny_graph, write_ids, write_lines
from fedsim.data.dataset import KnowledgeGraph, load_dataset
from fedsim.data.importers import import_dataset
from fedsim.data.splits import FederatedSplit, load_split, split_by_relation
from fedsim.errors import ConfigError, DataError

GRAPH = tiny_graph()


def write_names(graph: KnowledgeGraph, folder: Path) -> None:
    for name, triples in graph.triples.items():
        rows = [(graph.entity_keys[h], graph.relation_keys[r], graph.entity_keys[t]) for h, r, t in triples]
        write_lines(folder / f"{name}.txt", rows)


def write_named_tables(graph: KnowledgeGraph, folder: Path) -> None:
    write_names(graph, folder)
    write_lines(folder / "entities.tsv", [("key", "label"), *zip(graph.entity_keys, graph.entity_labels, strict=True)])


def write_openke(graph: KnowledgeGraph, folder: Path) -> None:
    for file, keys in (("entity2id", graph.entity_keys), ("relation2id", graph.relation_keys)):
        # In reverse, since the ids and not the lines give the order.
        rows = [(key, i) for i, key in enumerate(keys)][::-1]
        write_lines(folder / f"{file}.txt", [(len(keys),), *rows])
    for name, triples in graph.triples.items():
        write_lines(folder / f"{name}2id.txt", [(len(triples),), *triples[:, [0, 2, 1]].tolist()])


def named(graph: KnowledgeGraph, name: str) -> list[tuple[str, str, str]]:
    return sorted(
        (graph.entity_keys[h], graph.relation_keys[r], graph.entity_keys[t]) for h, r, t in graph.triples[name].tolist()
    )


@pytest.mark.parametrize(
    ("write", "kind"),
    [(write_names, "names"), (write_named_tables, "names"), (write_ids, "ids"), (write_openke, "openke")],
)
def test_each_format_gives_the_same_graph(
    tmp_path: Path, write: Callable[[KnowledgeGraph, Path], None], kind: str
) -> None:
    write(GRAPH, tmp_path / "in")
    report = import_dataset(tmp_path / "in", tmp_path / "out")
    assert report.triples_format == kind
    assert report.num_triples == {"train": 160, "valid": 20, "test": 20}
    assert report.notes == []
    loaded = load_dataset(tmp_path / "out")
    assert loaded.name == "out"
    for name in ("train", "valid", "test"):
        assert named(loaded, name) == named(GRAPH, name)
    if kind != "names":
        assert loaded.entity_keys == GRAPH.entity_keys


def test_tables_bring_labels_descriptions_and_the_order_of_ids(tmp_path: Path) -> None:
    write_ids(GRAPH, tmp_path / "in")
    import_dataset(tmp_path / "in", tmp_path / "out", licence="CC0-1.0", description="a test")
    loaded = load_dataset(tmp_path / "out")
    assert loaded.entity_labels == GRAPH.entity_labels
    assert loaded.entity_descriptions == GRAPH.entity_descriptions
    assert loaded.meta["licence"] == "CC0-1.0"
    np.testing.assert_array_equal(loaded.train, GRAPH.train)


def test_name_and_phrase_columns_become_key_and_label(tmp_path: Path) -> None:
    write_ids(GRAPH, tmp_path / "in")
    rows = [(i, key, f"phrase {i}") for i, key in enumerate(GRAPH.relation_keys)]
    write_lines(tmp_path / "in/relations.tsv", [("id", "name", "phrase"), *rows])
    import_dataset(tmp_path / "in", tmp_path / "out")
    loaded = load_dataset(tmp_path / "out")
    assert (loaded.relation_keys[2], loaded.relation_labels[2]) == ("r2", "phrase 2")


def spoil(path: Path, line: int, text: str) -> None:
    lines = path.read_text().split("\n")
    lines[line - 1] = text
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("write", "file", "line", "text", "message"),
    [
        (write_names, "train.txt", 3, "e0\tr0", r"train\.txt:3: 2 columns where 3"),
        (write_named_tables, "test.txt", 2, "e0\tr0\tnobody", r"test\.txt:2: unknown entity 'nobody'"),
        (write_ids, "train.tsv", 5, "0\t1\t40", r"train\.tsv:5: unknown entity id 40; the table has 0\.\.39"),
        (write_ids, "valid.tsv", 1, "0\t6\t1", r"valid\.tsv:1: unknown relation id 6; the table has 0\.\.5"),
        (write_ids, "entities.tsv", 3, "0\te1\tx\ty", r"entities\.tsv:3: id '0'; ids must be 0\.\.39, each once"),
        (write_openke, "train2id.txt", 4, "0\t1", r"train2id\.txt:4: 2 columns where 3"),
        (write_openke, "train2id.txt", 9, "0\t1\t6", r"train2id\.txt:9: unknown relation id 6"),
        (write_openke, "train2id.txt", 7, "0\t1\tx", r"train2id\.txt:7: 'x' is not an id"),
        (write_openke, "test2id.txt", 1, "99", r"test2id\.txt:1: the first line says '99' but 20 lines follow"),
        (write_openke, "entity2id.txt", 2, "e39\tx", r"entity2id\.txt:2: id 'x'"),
    ],
)
def test_a_broken_line_is_named_and_nothing_is_left(
    tmp_path: Path,
    write: Callable[[KnowledgeGraph, Path], None],
    file: str,
    line: int,
    text: str,
    message: str,
) -> None:
    write(GRAPH, tmp_path / "in")
    spoil(tmp_path / "in" / file, line, text)
    with pytest.raises(DataError, match=message):
        import_dataset(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_empty_and_missing_splits_are_refused(tmp_path: Path) -> None:
    write_names(GRAPH, tmp_path / "in")
    (tmp_path / "in/test.txt").write_text("")
    with pytest.raises(DataError, match=r"test\.txt: empty split"):
        import_dataset(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/test.txt").unlink()
    with pytest.raises(DataError, match=r"in: no test triples; give one of test\.tsv, test\.txt"):
        import_dataset(tmp_path / "in", tmp_path / "out")


def test_wrong_sources_and_outputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: not found"):
        import_dataset(tmp_path / "nowhere", tmp_path / "out")
    write_names(GRAPH, tmp_path / "in")
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="out: already exists"):
        import_dataset(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ConfigError, match="'rdf' is not known; choose one of auto, names, ids, openke, fede"):
        import_dataset(tmp_path / "in", tmp_path / "new", triples_format="rdf")


def test_repeated_triples_are_left_out_and_counted(tmp_path: Path) -> None:
    write_ids(replace(GRAPH, train=np.concatenate([GRAPH.train, GRAPH.train[:7]])), tmp_path / "in")
    report = import_dataset(tmp_path / "in", tmp_path / "out")
    assert report.notes == ["train: 7 repeated triples left out, 160 kept"]
    np.testing.assert_array_equal(load_dataset(tmp_path / "out").train, GRAPH.train)


# Features


def save_torch(path: Path, values: np.ndarray) -> None:
    torch.save(torch.from_numpy(values), path)


@pytest.mark.parametrize(
    ("suffix", "save"),
    [
        (".npy", np.save),
        (".npz", lambda path, values: np.savez(path, image=values)),
        (".safetensors", lambda path, values: save_file({"values": values}, str(path))),
        (".pth", save_torch),
    ],
)
def test_each_kind_of_feature_file_is_read(tmp_path: Path, suffix: str, save: Callable[[Path, Any], None]) -> None:
    write_ids(GRAPH, tmp_path / "in")
    values = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)
    save(tmp_path / f"image{suffix}", values)
    report = import_dataset(tmp_path / "in", tmp_path / "out", features={"image": tmp_path / f"image{suffix}"})
    assert report.features == {"image": 40}
    np.testing.assert_array_equal(load_dataset(tmp_path / "out").features["image"].values, values)


def test_rows_with_ids_are_sorted_and_keep_half_precision(tmp_path: Path) -> None:
    write_ids(GRAPH, tmp_path / "in")
    values = np.arange(6, dtype=np.float16).reshape(3, 2) + 1
    np.savez(tmp_path / "in/features.npz", image=values, image_entity=np.array([9, 2, 5], dtype=np.int32))
    import_dataset(tmp_path / "in", tmp_path / "out")
    features = load_dataset(tmp_path / "out").features["image"]
    assert features.entity.tolist() == [2, 5, 9]
    assert features.values.tolist() == [[3, 4], [5, 6], [1, 2]]
    assert features.values.dtype == np.float16


def test_rows_of_zeros_count_as_missing(tmp_path: Path) -> None:
    write_ids(GRAPH, tmp_path / "in")
    values = np.ones((40, 3), dtype=np.float32)
    values[[4, 8]] = 0.0
    np.save(tmp_path / "image.npy", values)
    report = import_dataset(tmp_path / "in", tmp_path / "out", features={"image": tmp_path / "image.npy"})
    assert report.features == {"image": 38}
    assert report.notes == ["image: 2 rows are all zero and count as missing"]


def nan_row(values: np.ndarray) -> dict[str, np.ndarray]:
    values[3, 1] = np.nan
    return {"image": values}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nan_row, r"image row 3 holds NaN or infinity \(in all 1 rows do\)"),
        (lambda values: {"image": values[:39]}, "image has 39 rows but there are 40 entities"),
        (lambda values: {"image": values[:, 0]}, r"image is float64 \[40\], need numbers \[rows, dim\]"),
        (lambda values: {"image": values * 1e300}, "image row 0 holds NaN or infinity"),
        (lambda values: {"a": values, "b": values}, "no array 'image' or 'values' among a, b"),
        (lambda values: {"image": values, "entity": np.arange(39)}, "40 rows of image but 39 entity ids"),
        (lambda values: {"image": values, "entity": np.arange(1, 41)}, "image row 39: entity id 40 is out of range"),
        (lambda values: {"image": values[:2], "entity": np.array([5, 5])}, "image row 1: a second row for entity 5"),
        (lambda values: {"image": values, "entity": np.ones(40)}, "entity is float64, need whole numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_broken_features_are_refused(tmp_path: Path, make: Callable[[Any], Any], message: str) -> None:
    write_ids(GRAPH, tmp_path / "in")
    np.savez(tmp_path / "image.npz", **make(np.ones((40, 3))))
    with pytest.raises(DataError, match=r"image\.npz: .*" + message):
        import_dataset(tmp_path / "in", tmp_path / "out", features={"image": tmp_path / "image.npz"})
    assert not (tmp_path / "out").exists()


class Evil:
    """Unpickles to a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("pwned"),))


def test_pickles_that_call_something_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_ids(GRAPH, tmp_path / "in")
    torch.save({"image": Evil()}, tmp_path / "image.pth")
    np.save(tmp_path / "image.npy", np.array([Evil()], dtype=object))
    for file, message in (("image.pth", "not a file of tensors alone"), ("image.npy", "without pickle")):
        with pytest.raises(DataError, match=message):
            import_dataset(tmp_path / "in", tmp_path / "out", features={"image": tmp_path / file})
    (tmp_path / "fed.pkl").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(DataError, match=r"fed\.pkl: refused.*only numpy arrays are accepted"):
        import_dataset(tmp_path / "fed.pkl", tmp_path / "out")
    assert not (tmp_path / "pwned").exists()


def test_features_need_an_order_of_the_entities(tmp_path: Path) -> None:
    write_names(GRAPH, tmp_path / "in")
    np.save(tmp_path / "image.npy", np.ones((40, 3)))
    with pytest.raises(DataError, match=r"features need the order of the entities; add entities\.tsv"):
        import_dataset(tmp_path / "in", tmp_path / "out", features={"image": tmp_path / "image.npy"})
    write_ids(GRAPH, tmp_path / "ids")
    with pytest.raises(DataError, match=r"image\.csv: file not found"):
        import_dataset(tmp_path / "ids", tmp_path / "out", features={"image": tmp_path / "image.csv"})


# FedE pickles


def fede_clients(split: FederatedSplit) -> list[dict[str, dict[str, np.ndarray]]]:
    """Lay a split out as FedE does, with client-local ids beside the global ones."""
    clients = []
    for client in range(split.num_clients):
        data = {}
        for name in ("train", "valid", "test"):
            triples = split.client_triples(name, client)
            edges, relation = triples[:, [0, 2]].T, triples[:, 1]
            _, local = np.unique(edges, return_inverse=True)
            data[name] = {
                "edge_index": local.reshape(edges.shape),
                "edge_type": np.unique(relation, return_inverse=True)[1],
                "edge_index_ori": edges,
                "edge_type_ori": relation,
            }
        clients.append(data)
    return clients


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_a_fede_pickle_gives_graph_and_split(tmp_path: Path, protocol: int) -> None:
    split = split_by_relation(GRAPH, 3, seed=0)
    (tmp_path / "tiny-Fed3.pkl").write_bytes(pickle.dumps(fede_clients(split), protocol))
    report = import_dataset(tmp_path / "tiny-Fed3.pkl", tmp_path / "out")
    assert report.triples_format == "fede"
    assert report.splits == {"tiny-Fed3": 3}
    loaded = load_dataset(tmp_path / "out")
    assert sorted(loaded.train.tolist()) == sorted(split.train[:, 1:].tolist())
    stored = load_split(tmp_path / "out/splits/tiny-Fed3.safetensors", loaded)
    for name, rows in split.rows.items():
        np.testing.assert_array_equal(stored.rows[name], rows)


def test_pickles_of_numpy_1_are_read(tmp_path: Path) -> None:
    """Numpy 1 names its modules numpy.core, numpy 2 numpy._core; published files are of numpy 1."""
    data = pickle.dumps(fede_clients(split_by_relation(GRAPH, 3, seed=0)), 2)
    (tmp_path / "old.pkl").write_bytes(data.replace(b"numpy._core", b"numpy.core"))
    assert import_dataset(tmp_path / "old.pkl", tmp_path / "out").splits == {"old": 3}


def test_arrays_are_made_without_numpys_own_unpickling(tmp_path: Path) -> None:
    """Numpy trusts the state that a pickle gives an array: this one, objects for numbers, breaks its memory."""
    clients = fede_clients(split_by_relation(GRAPH, 3, seed=0))
    whole = pickle.dumps(clients, 2)
    for content, message in (
        (whole.replace(b"i8", b"O8"), "holds an array of 'O8', only numbers"),
        (whole.replace(b"i8", b"i4"), "not as long as its shape says"),
        (whole.replace(b"X\x01\x00\x00\x00<", b"X\x01\x00\x00\x00x"), "the type of an array is damaged"),
        (whole.replace(b"X\x06\x00\x00\x00latin1", b"X\x06\x00\x00\x00rot_13"), "bytes are damaged"),
    ):
        assert content != whole
        (tmp_path / "fed.pkl").write_bytes(content)
        with pytest.raises(DataError, match=f"refused, not a FedE pickle.*{message}"):
            import_dataset(tmp_path / "fed.pkl", tmp_path / "out")


def test_broken_fede_pickles_are_refused(tmp_path: Path) -> None:
    clients = fede_clients(split_by_relation(GRAPH, 3, seed=0))
    whole = pickle.dumps(clients)
    clients[1]["valid"]["edge_type_ori"] = np.arange(3)
    for content, message in (
        (whole[:-50], "refused, not a FedE pickle"),
        (pickle.dumps({}), "holds a dict"),
        (pickle.dumps([{"train": {}}]), "client 0, train: no edge_index_ori"),
        (pickle.dumps(clients), r"client 1, valid: edge_index_ori is \[2, \d+\] and edge_type_ori \[3\]"),
    ):
        (tmp_path / "fed.pkl").write_bytes(content)
        with pytest.raises(DataError, match=message):
            import_dataset(tmp_path / "fed.pkl", tmp_path / "out")
        assert not (tmp_path / "out").exists()


# Splits and pictures that the source brings


def test_federated_splits_are_imported_and_mended(tmp_path: Path) -> None:
    write_ids(GRAPH, tmp_path / "in")
    split = split_by_relation(GRAPH, 3, seed=0)
    (tmp_path / "in/federated").mkdir()
    np.savez(tmp_path / "in/federated/three.npz", **split.rows)
    # Every triple of client 0's train about one entity goes to its test: the test cannot be answered and moves back.
    train = split.client_triples("train", 0)
    entity = train[0, 0]
    about = (split.train[:, 0] == 0) & ((split.train[:, 1] == entity) | (split.train[:, 3] == entity))
    rows = split.rows | {"train": split.train[~about], "test": np.concatenate([split.test, split.train[about]])}
    np.savez(tmp_path / "in/federated/torn.npz", **rows)
    report = import_dataset(tmp_path / "in", tmp_path / "out")
    assert report.splits == {"three": 3, "torn": 3}
    graph = load_dataset(tmp_path / "out")
    torn = load_split(tmp_path / "out/splits/torn.safetensors", graph)
    assert torn.num_moved >= int(about.sum()) > 0
    assert report.notes == [f"split torn: {torn.num_moved} valid or test triples moved to the train of their client"]


def test_a_broken_federated_split_leaves_nothing(tmp_path: Path) -> None:
    write_ids(GRAPH, tmp_path / "in")
    write_lines(tmp_path / "in/federated/bad.tsv", [("split", "client", "head", "relation", "tail"), ("train", 0, 1)])
    with pytest.raises(DataError, match=r"bad\.tsv:2: 3 columns where 5"):
        import_dataset(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def write_with_picture(folder: Path, picture: str) -> None:
    write_ids(GRAPH, folder)
    rows = [(i, key, picture if i == 3 else "") for i, key in enumerate(GRAPH.entity_keys)]
    write_lines(folder / "entities.tsv", [("id", "label", "picture"), *rows])


def test_pictures_come_out_of_a_zip(tmp_path: Path) -> None:
    write_with_picture(tmp_path / "in", "a.png")
    with zipfile.ZipFile(tmp_path / "in/pictures.zip", "w") as archive:
        archive.writestr("folder/a.png", b"picture")
        archive.writestr("unused.png", b"other")
    import_dataset(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out/pictures").iterdir()] == ["a.png"]
    assert load_dataset(tmp_path / "out").entity_pictures[3] == "a.png"
    assert not (tmp_path / "out/.pictures").exists()


def test_missing_pictures_and_broken_zips_are_refused(tmp_path: Path) -> None:
    write_with_picture(tmp_path / "in", "a.png")
    with zipfile.ZipFile(tmp_path / "in/pictures.zip", "w") as archive:
        archive.writestr("b.png", b"picture")
    with pytest.raises(DataError, match=r"pictures\.zip: no picture 'a\.png'"):
        import_dataset(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/pictures.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"pictures\.zip: not a readable zip file"):
        import_dataset(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_picture_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    write_with_picture(tmp_path / "in", "../a.png")
    (tmp_path / "in/pictures").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"picture")
    with pytest.raises(DataError, match="picture not found"):
        import_dataset(tmp_path / "in", tmp_path / "out")
