"""Clients ranked as one stacked computation, against each alone."""

from typing import Any

import pytest
import torch

from builders import tiny_graph
from experiments import small_runtime
from fedsim.errors import RunError
from fedsim.federated import stacked_ranking
from fedsim.federated.client import Client, impute_together, train_together
from fedsim.federated.stacked_ranking import evaluate_together

METHODS: dict[str, dict[str, Any]] = {
    "structure": {"federation.strategy": "fede", "model.fusion": "none"},
    "MMFeD3-HidE": {"federation.strategy": "mmfed3"},
    "the private model alone": {"federation.strategy": "fedlu"},
    "several scores": {"federation.strategy": "mmfed3", "model.fusion": "ikrl", "model.imputer": "mean"},
    "distances": {"federation.strategy": "fede", "model.scorer": "transe", "training.reciprocal": False},
    "tails alone": {"federation.strategy": "fede", "training.corruption": "tail", "evaluation.protocol": "fede"},
    "many pieces": {"federation.strategy": "mmfed3", "model.imputer": "zero", "evaluation.batch_size": 12},
}


def _trained(overrides: dict[str, Any]) -> list[Client]:
    """Train four clients of different sizes for a round."""
    fixed = {"data.num_clients": 4, "training.local_epochs": 2, "distillation.warmup_rounds": 0}
    runtime = small_runtime(fixed | overrides, tiny_graph(num_entities=50, num_triples=400, num_relations=9))
    server = runtime.server
    assert server is not None
    clients = list(runtime.clients.values())
    broadcast = server.begin_round(1)
    train_together(clients, 1, [client.own_part(broadcast) for client in clients])
    impute_together(clients, 1)
    return clients


@pytest.mark.parametrize("method", METHODS)
def test_a_stack_ranks_as_its_clients_one_by_one(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = _trained(METHODS[method])
    counts = [len(client.data.groups[0].triples["valid"]) for client in clients]
    assert len(set(counts)) > 1, "the clients differ in what they rank"
    expected = [client.evaluate("valid", 1, choose=True) for client in clients]
    combinations = [client.combination for client in clients]
    expected_test = [client.evaluate("test", 1, choose=False) for client in clients]
    for client in clients:
        client.combination = None if client.combination is None else client.strategy.combinations[0]
    monkeypatch.setattr(Client, "evaluate", None)  # nothing below may go one by one
    assert evaluate_together(clients, "valid", 1, True) == expected
    assert [client.combination for client in clients] == combinations
    assert evaluate_together(clients, "test", 1, False) == expected_test


def test_clients_may_prefer_different_combinations() -> None:
    """The test split is ranked with each client's own weight."""
    clients = _trained(METHODS["MMFeD3-HidE"])
    for client, weight in zip(clients, (0.0, 0.25, 1.0, 0.5), strict=True):
        client.combination = weight
    expected = [client.evaluate("test", 1, choose=False) for client in clients]
    found = evaluate_together(clients, "test", 1, False)
    assert [own[0].combination for own in found] == [0.0, 0.25, 1.0, 0.5]
    assert found == expected


def test_a_client_without_triples_takes_part() -> None:
    clients = _trained(METHODS["MMFeD3-HidE"])
    group = clients[1].data.groups[0]
    group.triples["valid"] = group.triples["valid"][:0]
    expected = [client.evaluate("valid", 1, choose=False) for client in clients]
    found = evaluate_together(clients, "valid", 1, False)
    assert found == expected
    assert found[1][0].metrics.num_queries == 0


def test_the_client_with_a_score_that_is_not_finite_is_named() -> None:
    clients = _trained(METHODS["structure"])
    clients[2].values.params["global/entity"][0] = torch.nan
    with pytest.raises(RunError, match=r"client 2, round 1, valid: .* NaN or infinite"):
        evaluate_together(clients, "valid", 1, True)


def test_a_client_alone_is_not_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = _trained(METHODS["structure"])
    monkeypatch.setattr(stacked_ranking, "ClientStack", None)
    assert evaluate_together(clients[:1], "valid", 1, True) == [clients[0].evaluate("valid", 1, choose=True)]
