"""What each client holds: local ids, visible features, and refusals."""

import pickle
from typing import Any

import numpy as np
import pytest

from builders import tiny_graph
from experiments import small_config, small_experiment
from fedsim.data.clients import (
    build_client,
    build_clients,
    chosen_modalities,
    load_federated_split,
    shared_matrices,
    with_matrices,
    without_matrices,
)
from fedsim.data.dataset import KnowledgeGraph
from fedsim.data.splits import FederatedSplit
from fedsim.errors import ConfigError, DataError

EMPTY = np.empty((0, 4), dtype=np.int64)


def _split(graph: KnowledgeGraph, **overrides: Any) -> FederatedSplit:
    return load_federated_split(graph, small_config(overrides))


def test_local_ids_lead_back_to_the_clients_triples() -> None:
    graph = tiny_graph()
    config = small_config({"data.num_clients": 3})
    split = load_federated_split(graph, config)
    for number, data in enumerate(build_clients(graph, split, config)):
        (group,) = data.groups
        for name in ("train", "valid", "test"):
            local = group.triples[name]
            columns = [data.entity_ids[local[:, 0]], data.relation_ids[local[:, 1]], data.entity_ids[local[:, 2]]]
            assert np.array_equal(np.column_stack(columns), split.client_triples(name, number))
        assert np.array_equal(data.train, group.triples["train"])
        assert np.array_equal(group.candidates, np.arange(len(data.entity_ids)))


def test_features_are_the_rows_of_the_clients_entities() -> None:
    graph = tiny_graph()
    data = small_experiment(graph=graph).clients[0]
    for name, item in data.features.items():
        whole = graph.features[name]
        held = np.isin(whole.entity, data.entity_ids)
        assert np.array_equal(data.entity_ids[item.rows], whole.entity[held])
        assert np.array_equal(item.values, whole.values[held])
        assert item.visible.sum() == len(item.rows) - round(0.5 * len(item.rows))


def test_clients_share_one_matrix_which_is_sent_apart() -> None:
    """What is sent of the clients has no row of the matrix; put back, they are as before."""
    graph = tiny_graph()
    clients = small_experiment(graph=graph).clients
    shared = shared_matrices(clients)
    assert list(shared) == list(graph.features)
    for data in clients:
        sent = pickle.loads(pickle.dumps(without_matrices(data, shared)))
        assert all(len(item.matrix) == 0 for item in sent.features.values())
        back = with_matrices(sent, shared)
        for name, item in data.features.items():
            assert back.features[name].matrix is shared[name]
            assert np.array_equal(back.features[name].values, item.values)
    noisy = small_experiment({"data.feature_noise": 0.5}, graph).clients
    assert shared_matrices(noisy) == {}, "disturbed features are a client's own"


def test_a_rate_per_modality_and_its_default() -> None:
    data = small_experiment({"data.missing_rate": {"text": 1.0}}).clients[0]
    assert not data.features["text"].visible.any()
    assert data.features["image"].visible.all(), "a modality that is not named loses nothing"
    with pytest.raises(ConfigError, match=r"'data\.missing_rate' names 'txt', but tiny has text, image"):
        small_experiment({"data.missing_rate": {"txt": 1.0}})


def test_modalities_are_chosen_in_the_order_of_the_data() -> None:
    graph = tiny_graph()
    assert chosen_modalities(graph, small_config({"data.modalities": ["image", "text"]})) == list(graph.features)
    assert chosen_modalities(graph, small_config({"data.modalities": []})) == []
    with pytest.raises(ConfigError, match=r"'data\.modalities' names 'audio', but tiny has"):
        chosen_modalities(graph, small_config({"data.modalities": ["audio"]}))


def test_noise_is_relative_to_the_features_and_differs_between_clients() -> None:
    """The difference has the size of 0.5 RMS; the same client sees the same noise again."""
    graph = tiny_graph(200, 6, 900)
    plain = small_experiment(graph=graph).clients
    noisy, again = (small_experiment({"data.feature_noise": 0.5}, graph).clients for _ in range(2))
    item = noisy[0].features["text"]
    difference = item.values - plain[0].features["text"].values
    size = np.sqrt(np.mean(np.square(plain[0].features["text"].values)))
    assert np.sqrt(np.mean(np.square(difference))) == pytest.approx(0.5 * size, rel=0.05)
    assert np.array_equal(item.values, again[0].features["text"].values)
    assert not np.array_equal(difference[:5], noisy[1].features["text"].values[:5] - graph.features["text"].values[:5])


def test_together_is_one_client_ranked_group_by_group() -> None:
    graph = tiny_graph()
    parts = small_experiment({"data.num_clients": 3}, graph).clients
    (whole,) = small_experiment({"data.num_clients": 3, "federation.strategy": "central"}, graph).clients
    assert whole.client == 0
    assert len(whole.train) == sum(len(part.train) for part in parts)
    assert [group.name for group in whole.groups] == [0, 1, 2]
    for group, part in zip(whole.groups, parts, strict=True):
        assert np.array_equal(whole.entity_ids[group.candidates], part.entity_ids)
        assert len(group.triples["test"]) == len(part.groups[0].triples["test"])


def test_a_client_without_training_triples_is_refused() -> None:
    graph = tiny_graph()
    split = _split(graph)
    bare = FederatedSplit(3, split.train, split.valid, split.test, 0)
    with pytest.raises(DataError, match=r"client 2 has no training triple; use fewer clients or another data\.split"):
        build_client(graph, bare, small_config(), [2])


@pytest.mark.parametrize("name", ["valid", "test"])
def test_an_entity_that_a_client_never_saw_is_refused(name: str) -> None:
    graph = tiny_graph()
    train = np.array([[0, 0, 0, 1]])
    unseen = np.array([[0, 0, 0, 2]])
    parts = {"valid": EMPTY, "test": EMPTY, name: unseen}
    split = FederatedSplit(1, train, parts["valid"], parts["test"], 0)
    with pytest.raises(DataError, match="client 0 has a valid or test triple whose entity or relation is not in its"):
        build_client(graph, split, small_config(), [0])
