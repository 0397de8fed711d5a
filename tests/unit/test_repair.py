"""The repair of a validation set that train or test holds too."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from builders import tiny_graph, write_ids
from fedsim.data.dataset import load_dataset
from fedsim.data.importers import import_dataset
from fedsim.data.importers.repair import repair_valid

GRAPH = tiny_graph()


def test_a_leaking_validation_set_is_reported(tmp_path: Path) -> None:
    write_ids(replace(GRAPH, valid=np.concatenate([GRAPH.valid, GRAPH.train[:3], GRAPH.test[:2]])), tmp_path / "in")
    report = import_dataset(tmp_path / "in", tmp_path / "out")
    assert report.notes[0].startswith("valid: 3 triples are also in train")
    assert report.notes[1].startswith("valid: 2 triples are also in test")


def test_few_leaks_are_dropped(tmp_path: Path) -> None:
    write_ids(replace(GRAPH, valid=np.concatenate([GRAPH.valid, GRAPH.train[:3], GRAPH.test[:2]])), tmp_path / "in")
    report = import_dataset(tmp_path / "in", tmp_path / "out", mend_valid=True)
    assert report.notes == ["valid: 5 triples dropped that train or test holds too"]
    loaded = load_dataset(tmp_path / "out")
    np.testing.assert_array_equal(loaded.valid, GRAPH.valid)
    np.testing.assert_array_equal(loaded.train, GRAPH.train)


def test_mostly_leaked_validation_is_carved_anew() -> None:
    """Of 340 train triples 5 % are 17; the 30 clean valid triples stay, all triples stay in the graph."""
    graph = tiny_graph(num_entities=40, num_triples=400)
    num_train = len(graph.train)
    faulty = replace(graph, valid=np.concatenate([graph.valid[:30], graph.train[:50]]))
    train, valid, done = repair_valid(faulty, seed=0)
    num_carved = round(0.05 * num_train)
    assert (done.num_dropped, done.num_carved) == (50, num_carved)
    assert len(train) == num_train - num_carved
    assert len(valid) == 30 + num_carved
    assert not np.isin(graph.pack(valid), graph.pack(train)).any()
    before = np.concatenate([graph.train, faulty.valid])
    after = np.concatenate([train, valid])
    assert set(graph.pack(before).tolist()) == set(graph.pack(after).tolist())
    assert set(np.unique(train[:, [0, 2]])) == set(np.unique(graph.train[:, [0, 2]]))
    assert set(np.unique(train[:, 1])) == set(np.unique(graph.train[:, 1]))
    again, _, _ = repair_valid(faulty, seed=0)
    other, _, _ = repair_valid(faulty, seed=1)
    assert np.array_equal(train, again)
    assert not np.array_equal(train, other)
