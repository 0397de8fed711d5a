"""What `fedsim data info` finds, on graphs whose faults are counted by hand."""

from dataclasses import replace

import numpy as np
from rich.console import Console

from builders import tiny_graph
from fedsim.data.dataset import Features, KnowledgeGraph
from fedsim.data.inspection import Fault, find_faults, inspect_dataset, inspect_split, render_report
from fedsim.data.splits import FederatedSplit, split_by_relation, split_dirichlet


def faulty_graph() -> KnowledgeGraph:
    """Make a graph of 6 entities and 3 relations with one fault of each kind."""
    return replace(
        tiny_graph(num_entities=6, num_relations=3, num_triples=20),
        train=np.array([[0, 0, 1], [1, 0, 2], [2, 1, 3], [3, 1, 3], [0, 0, 1]]),
        valid=np.array([[0, 0, 1], [2, 1, 0], [3, 1, 3]]),
        test=np.array([[1, 1, 0], [0, 1, 1], [2, 1, 0], [4, 0, 1], [0, 2, 3]]),
    )


def test_each_fault_is_counted() -> None:
    """Train repeats (0,0,1). Valid: (0,0,1), (3,1,3) are in train, (2,1,0) in test.

    Test: (1,1,0) reverses train's (0,0,1); (0,1,1) has the pair of (0,0,1) by another relation; (4,0,1) has an
    unseen entity and (0,2,3) an unseen relation. The loop (3,1,3) is not its own inverse.
    """
    assert find_faults(faulty_graph()) == [
        Fault("train", "repeated", 1, 1 / 5),
        Fault("valid", "in train", 2, 2 / 3),
        Fault("valid", "in test", 1, 1 / 3),
        Fault("test", "inverse in train", 1, 1 / 5),
        Fault("test", "pair in train", 1, 1 / 5),
        Fault("test", "unseen in train", 2, 2 / 5),
    ]


def test_a_clean_graph_has_no_repeats_or_leaks() -> None:
    kinds = {fault.kind for fault in find_faults(tiny_graph(num_entities=200, num_relations=3, num_triples=400))}
    assert kinds <= {"inverse in train", "pair in train"}


def small_split() -> tuple[KnowledgeGraph, FederatedSplit]:
    graph = replace(
        tiny_graph(num_entities=6, num_relations=2, num_triples=20),
        train=np.array([[0, 0, 1], [1, 0, 2], [2, 1, 3], [3, 1, 4]]),
        valid=np.array([[0, 0, 2]]),
        test=np.array([[4, 1, 2]]),
        features={"image": Features(np.ones((2, 3), np.float32), np.array([0, 2]))},
    )
    rows = {
        "train": np.array([[0, 0, 0, 1], [0, 1, 0, 2], [1, 2, 1, 3], [1, 3, 1, 4]]),
        "valid": np.array([[0, 0, 0, 2]]),
        "test": np.array([[1, 4, 1, 2]]),
    }
    return graph, FederatedSplit(2, **rows, num_moved=0)


def test_clients_and_their_overlap_are_counted() -> None:
    """Client 0 holds entities 0, 1, 2 and client 1 holds 2, 3, 4: one of five is shared; images are 0 and 2."""
    graph, split = small_split()
    report = inspect_split(graph, split)
    assert report.shared_entities.tolist() == [[3, 1], [1, 3]]
    assert report.share_overlapping == 1 / 5
    first, second = report.clients
    assert (first.num_entities, first.num_relations) == (3, 1)
    assert first.num_triples == {"train": 2, "valid": 1, "test": 0}
    assert first.coverage == {"image": 2 / 3}
    assert second.coverage == {"image": 1 / 3}


def shown(graph: KnowledgeGraph, split: FederatedSplit | None = None) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render_report(inspect_dataset(graph, split)))
    return capture.get()


def test_the_report_shows_counts_coverage_and_faults() -> None:
    text = shown(faulty_graph())
    for expected in ("tiny (CC0-1.0)", "inverse in train", "unseen in train", "40.0 %", "text features", "50.0 %"):
        assert expected in text


def test_the_report_lists_few_clients_and_sums_up_many() -> None:
    graph = tiny_graph(num_entities=60, num_relations=9, num_triples=600)
    few = shown(graph, split_by_relation(graph, 3, seed=0))
    assert "entities in common" in few
    many = shown(graph, split_dirichlet(graph, 100, 0.5, 0))
    assert "88 more clients not shown" in many
    assert "entities in common" not in many
