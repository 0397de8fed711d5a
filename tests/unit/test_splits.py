"""Federated splits: every triple at exactly one client, nothing unanswerable, and split files held to the graph."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import tiny_graph
from fedsim.data.dataset import KnowledgeGraph
from fedsim.data.splits import (
    SPLITTERS,
    FederatedSplit,
    load_split,
    make_split,
    resolve_split,
    save_split,
    split_by_cluster,
    split_by_relation,
    split_dirichlet,
)
from fedsim.errors import ConfigError, DataError

GRAPH = tiny_graph(num_entities=60, num_relations=9, num_triples=600)


def all_triples(graph: KnowledgeGraph) -> list[list[int]]:
    return sorted(np.concatenate(list(graph.triples.values())).tolist())


def check_promises(graph: KnowledgeGraph, split: FederatedSplit) -> None:
    """Hold a split to what the module promises."""
    rows = np.concatenate(list(split.rows.values()))
    assert sorted(rows[:, 1:].tolist()) == all_triples(graph)
    assert set(split.train[:, 0].tolist()) == set(range(split.num_clients))
    moved = len(graph.valid) + len(graph.test) - len(split.valid) - len(split.test)
    assert split.num_moved == moved == len(split.train) - len(graph.train)
    for name in ("valid", "test"):
        original = {tuple(triple) for triple in graph.triples[name].tolist()}
        for client in range(split.num_clients):
            train = split.client_triples("train", client)
            held = split.client_triples(name, client)
            assert {tuple(triple) for triple in held.tolist()} <= original
            assert np.isin(held[:, [0, 2]], train[:, [0, 2]]).all()
            assert np.isin(held[:, 1], train[:, 1]).all()


@pytest.mark.parametrize("kind", SPLITTERS)
@pytest.mark.parametrize("num_clients", [1, 3, 9])
def test_every_splitter_keeps_its_promises(kind: str, num_clients: int) -> None:
    split = make_split(GRAPH, kind, num_clients, seed=0)
    assert split.num_clients == num_clients
    check_promises(GRAPH, split)


@pytest.mark.parametrize("kind", SPLITTERS)
def test_a_split_is_a_function_of_the_seed(kind: str) -> None:
    first, second = (make_split(GRAPH, kind, 4, seed=5) for _ in range(2))
    for name, rows in first.rows.items():
        np.testing.assert_array_equal(rows, second.rows[name])


@pytest.mark.parametrize("kind", ["relation", "dirichlet"])
def test_another_seed_gives_another_split(kind: str) -> None:
    first, second = (make_split(GRAPH, kind, 4, seed=seed) for seed in (0, 1))
    assert not np.array_equal(first.train[:, 0], second.train[:, 0]) or not np.array_equal(first.train, second.train)


def test_relation_groups_are_equal_in_size_and_disjoint() -> None:
    split = split_by_relation(GRAPH, 4, seed=0)
    groups = [set(split.client_triples("train", client)[:, 1].tolist()) for client in range(4)]
    assert sorted(map(len, groups)) == [2, 2, 2, 3]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 9


def test_clusters_join_relations_that_share_entities() -> None:
    """Relations 0..2 link entities 0..19, relations 3..5 link 20..39: two clusters, whatever the seed."""
    generator = np.random.default_rng(0)
    relation = generator.integers(0, 6, 300)
    ends = generator.integers(0, 20, (300, 2)) + np.where(relation < 3, 0, 20)[:, None]
    triples = np.column_stack([ends[:, 0], relation, ends[:, 1]])
    graph = replace(tiny_graph(), train=triples[:240], valid=triples[240:270], test=triples[270:])
    for seed in range(3):
        split = split_by_cluster(graph, 2, seed)
        groups = [set(split.client_triples("train", client)[:, 1].tolist()) for client in range(2)]
        assert groups == [{0, 1, 2}, {3, 4, 5}]


@given(num_clients=st.integers(1, 150), alpha=st.sampled_from([1e-3, 0.1, 1.0, 100.0]), seed=st.integers(0, 3))
def test_dirichlet_gives_each_client_a_train_triple(num_clients: int, alpha: float, seed: int) -> None:
    check_promises(GRAPH, split_dirichlet(GRAPH, num_clients, alpha, seed))


def test_dirichlet_serves_a_thousand_clients() -> None:
    graph = tiny_graph(num_entities=300, num_relations=5, num_triples=5000)
    split = split_dirichlet(graph, 1000, 0.5, 0)
    assert np.bincount(split.train[:, 0], minlength=1000).min() >= 1
    assert sum(map(len, split.rows.values())) == 5000


def test_a_small_alpha_is_more_skewed() -> None:
    def skew(alpha: float) -> float:
        """Mean over relations of the share that the largest holder has."""
        train = split_dirichlet(GRAPH, 5, alpha, 0).train
        counts = np.array([np.bincount(train[train[:, 2] == relation, 0], minlength=5) for relation in range(9)])
        return float((counts.max(axis=1) / counts.sum(axis=1)).mean())

    assert skew(0.05) > 0.7 > 0.4 > skew(100.0)


def test_dirichlet_keeps_copies_of_a_triple_together() -> None:
    graph = replace(GRAPH, valid=np.concatenate([GRAPH.valid, GRAPH.train[:50]]))
    split = split_dirichlet(graph, 7, 0.5, 0)
    client_of: dict[tuple[int, ...], set[int]] = {}
    for client, *triple in np.concatenate(list(split.rows.values())).tolist():
        client_of.setdefault(tuple(triple), set()).add(client)
    assert all(len(clients) == 1 for clients in client_of.values())


def test_an_unseen_triple_moves_to_train() -> None:
    """Client 1 holds relation 1 only for entities 0 and 1, so its valid triple about entity 5 cannot stay."""
    graph = tiny_graph(num_entities=6, num_relations=2, num_triples=20)
    graph = replace(
        graph,
        train=np.array([[0, 0, 1], [5, 0, 2], [0, 1, 1]]),
        valid=np.array([[5, 1, 0], [1, 1, 0]]),
        test=np.array([[1, 0, 5]]),
    )
    split = split_by_relation(graph, 2, seed=0)
    assert split.num_moved == 1
    assert [5, 1, 0] in split.train[:, 1:].tolist()
    assert split.valid[:, 1:].tolist() == [[1, 1, 0]]


def test_more_clients_than_relations_are_refused() -> None:
    for kind in ("relation", "cluster"):
        with pytest.raises(
            DataError, match=r"tiny has 9 and 10 clients are asked for; choose 1\.\.9 or the split 'dir"
        ):
            make_split(GRAPH, kind, 10, seed=0)
    with pytest.raises(DataError, match=r"choose 1\.\.480"):
        split_dirichlet(GRAPH, 481, 0.5, 0)
    with pytest.raises(ConfigError, match="'metis' is not known; choose one of relation, cluster, dirichlet"):
        make_split(GRAPH, "metis", 2, seed=0)
    with pytest.raises(ConfigError, match="alpha"):
        split_dirichlet(GRAPH, 2, 0.0, 0)


def write_npz(split: FederatedSplit, path: Path) -> None:
    np.savez(path, **{name: rows.astype(np.int32) for name, rows in split.rows.items()})


def write_tsv(split: FederatedSplit, path: Path) -> None:
    lines = ["split\tclient\thead\trelation\ttail"]
    for name, rows in split.rows.items():
        lines += ["\t".join([name, *map(str, row)]) for row in rows.tolist()]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("suffix", "write"), [("safetensors", save_split), ("npz", write_npz), ("tsv", write_tsv)])
def test_a_split_file_gives_the_split_back(
    tmp_path: Path, suffix: str, write: Callable[[FederatedSplit, Path], None]
) -> None:
    split = split_by_relation(GRAPH, 3, seed=0)
    path = tmp_path / f"split.{suffix}"
    write(split, path)
    loaded = load_split(path, GRAPH)
    assert loaded.num_clients == 3
    assert loaded.num_moved == (split.num_moved if suffix == "safetensors" else 0)
    for name, rows in split.rows.items():
        np.testing.assert_array_equal(loaded.rows[name], rows)


def edited(split: FederatedSplit, edit: str) -> FederatedSplit:
    """Spoil the train rows of a split in one way."""
    train = split.train.copy()
    if edit == "range":
        train[4, 1] = 60
    elif edit == "negative":
        train[0, 0] = -1
    elif edit == "two clients":
        train = np.concatenate([train, [[(train[0, 0] + 1) % split.num_clients, *train[0, 1:]]]])
    elif edit == "twice":
        train = np.concatenate([train, train[:1]])
    elif edit == "absent":
        train = train[1:]
    elif edit == "empty":
        train = train[:0]
    return replace(split, train=train)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("range", r"bad\.npz: train row 4: head 60 is out of range.*tiny \(60 entities"),
        ("negative", r"bad\.npz: train row 0: client -1 is out of range"),
        ("two clients", r"bad\.npz: train row \d+: client \d holds a triple that client \d holds too"),
        ("twice", r"bad\.npz: train row \d+: the same triple stands in an earlier row"),
        ("absent", r"bad\.npz: 1 triples of tiny belong to no client"),
        ("empty", r"bad\.npz: train is empty"),
    ],
)
def test_a_broken_split_file_is_refused(tmp_path: Path, edit: str, message: str) -> None:
    write_npz(edited(split_by_relation(GRAPH, 3, seed=0), edit), tmp_path / "bad.npz")
    with pytest.raises(DataError, match=message):
        load_split(tmp_path / "bad.npz", GRAPH)


def test_a_client_without_train_triples_is_refused(tmp_path: Path) -> None:
    split = split_by_relation(GRAPH, 3, seed=0)
    shifted = {name: rows.copy() for name, rows in split.rows.items()}
    for rows in shifted.values():
        rows[rows[:, 0] == 2, 0] = 3
    np.savez(tmp_path / "gap.npz", **shifted)
    with pytest.raises(DataError, match=r"gap\.npz: client 2 has no train triple"):
        load_split(tmp_path / "gap.npz", GRAPH)


def test_a_triple_of_another_data_set_is_refused(tmp_path: Path) -> None:
    save_split(split_by_relation(GRAPH, 3, seed=0), tmp_path / "split.safetensors")
    other = tiny_graph(num_entities=60, num_relations=9, num_triples=600, seed=1)
    with pytest.raises(DataError, match=r"this triple is not in tiny; is it a split of another data set"):
        load_split(tmp_path / "split.safetensors", other)


def test_a_test_entity_that_the_client_never_saw_is_refused_or_moved(tmp_path: Path) -> None:
    """A line number is named, because the file is text; the option moves the triple instead."""
    graph = replace(
        tiny_graph(num_entities=6, num_relations=2, num_triples=20),
        train=np.array([[0, 0, 1], [3, 1, 4]]),
        valid=np.array([[1, 0, 0]]),
        test=np.array([[4, 1, 3], [3, 1, 0]]),
    )
    lines = ["split client head relation tail", "train 0 0 0 1", "train 1 3 1 4", "valid 0 1 0 0"]
    lines += ["test 1 4 1 3", "test 1 3 1 0"]
    (tmp_path / "split.tsv").write_text("\n".join(lines).replace(" ", "\t") + "\n")
    with pytest.raises(DataError, match=r"split\.tsv: line 6: client 1 does not have .*--move-unseen"):
        load_split(tmp_path / "split.tsv", graph)
    split = load_split(tmp_path / "split.tsv", graph, move_unseen=True)
    assert split.num_moved == 1
    assert split.train.tolist() == [[0, 0, 0, 1], [1, 3, 1, 4], [1, 3, 1, 0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("split\tclient\thead\trelation\n", r"split\.tsv:1: no column 'tail'"),
        ("split\tclient\thead\trelation\ttail\ntrain\t0\t1\t2\n", r"split\.tsv:2: 4 columns where 5"),
        ("split\tclient\thead\trelation\ttail\ndev\t0\t1\t2\t3\n", r"split\.tsv:2: split is 'dev'"),
        ("split\tclient\thead\trelation\ttail\ntrain\tx\t1\t2\t3\n", r"split\.tsv:2: client is 'x', need an id"),
    ],
)
def test_a_broken_split_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "split.tsv").write_text(text)
    with pytest.raises(DataError, match=message):
        load_split(tmp_path / "split.tsv", GRAPH)


def test_split_files_of_a_wrong_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "split.json").write_text("{}")
    (tmp_path / "split.npz").write_text("no zip")
    np.savez(tmp_path / "flat.npz", train=np.arange(4), valid=np.arange(4), test=np.arange(4))
    np.savez(tmp_path / "part.npz", train=np.zeros((1, 4), int))
    for name, message in (
        ("split.json", "unknown kind of split file"),
        ("split.npz", "not a readable npz"),
        ("flat.npz", r"train is int64 \[4\]"),
        ("part.npz", "no array 'valid'"),
    ):
        with pytest.raises(DataError, match=message):
            load_split(tmp_path / name, GRAPH)


def test_a_split_is_found_by_name_and_by_path(tmp_path: Path) -> None:
    graph = replace(GRAPH, path=tmp_path)
    split = split_by_relation(graph, 3, seed=0)
    save_split(split, tmp_path / "splits/three.safetensors")
    assert resolve_split(graph, "three") == tmp_path / "splits/three.safetensors"
    assert resolve_split(graph, str(tmp_path / "splits/three.safetensors")).is_file()
    with pytest.raises(DataError, match=r"split 'four' not found; .*that tiny brings: three"):
        resolve_split(graph, "four")
    assert [file.name for file in (tmp_path / "splits").iterdir()] == ["three.safetensors"]
