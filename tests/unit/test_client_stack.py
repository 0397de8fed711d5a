"""Clients trained as one stacked computation, against each alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from builders import tiny_graph
from experiments import COUPLINGS, small_runtime
from fedsim.errors import RunError
from fedsim.federated.client import Client, impute_together, train_together
from fedsim.models.fusion import FUSIONS
from fedsim.models.imputers import IMPUTERS
from fedsim.models.scorers import SCORERS
from fedsim.models.stacking import StackShape, over_clients, pad_stack

METHODS: dict[str, dict[str, Any]] = {
    "structure": {"federation.strategy": "fede", "model.fusion": "none"},
    "one client runs out of batches": {"federation.strategy": "fede", "training.batch_size": 16},
    "label smoothing, n3, dropout": {
        "federation.strategy": "fede",
        "training.label_smoothing": 0.1,
        "training.n3_weight": 0.01,
        "model.dropout": 0.3,
    },
    "no reciprocal relations": {"federation.strategy": "fede", "training.reciprocal": False},
    "adagrad": {"federation.strategy": "fede", "training.optimizer": "adagrad"},
    "tails alone": {
        "federation.strategy": "fede",
        "training.corruption": "tail",
        "evaluation.protocol": "fede",
    },
    **{
        f"imputer {name}": {"federation.strategy": "fede", "model.imputer": name, "imputer.hide_rate": 0.3}
        for name in IMPUTERS
        if name != "diffusion"
    },
    "HidE, epsilon": {"federation.strategy": "fede", "diffusion.prediction": "epsilon", "diffusion.hide_rate": 0.3},
    "MMFeD3-HidE": {"federation.strategy": "mmfed3", **{f"distillation.{name}": 0.5 for name in COUPLINGS}},
    **{
        name: {"federation.strategy": name, "model.imputer": "zero", "model.fusion": "split"}
        for name in ("fedprox", "fedec", "fedlu", "fedr", "pfedeg")
    },
    **{
        f"{name} fusion": {
            "federation.strategy": "mmfed3",
            "model.imputer": "zero",
            "model.fusion": name,
            "model.dropout": 0.3,
        }
        for name in FUSIONS
        if name not in ("gate", "none")
    },
    **{
        f"{name} fusion, distances, weights by entropy": {
            "federation.strategy": "mmfed3",
            "model.imputer": "zero",
            "model.fusion": name,
            "model.scorer": "transe",
            "training.loss": "self_adversarial",
            "training.negative_weighting": "entropy",
        }
        for name in ("ikrl", "tbkgc")
    },
    "filtered negatives": {
        "federation.strategy": "fede",
        "training.loss": "self_adversarial",
        "training.negatives": "filtered",
    },
    "shared negatives": {
        "federation.strategy": "fede",
        "training.loss": "self_adversarial",
        "training.negatives": "shared",
    },
    **{
        f"shared negatives, imputer {name}": {
            "federation.strategy": "mmfed3",
            "model.imputer": name,
            "diffusion.hide_rate": 0.3,
            "imputer.hide_rate": 0.3,
            "training.batch_size": 4,
            "training.loss": "sampled_softmax",
            "training.negatives": "shared",
        }
        for name in ("gan", "nearest", "diffusion")
    },
    "sampled softmax": {
        "federation.strategy": "mmfed3",
        "training.loss": "sampled_softmax",
        "training.negatives": "shared",
    },
    **{
        f"{scorer} with negatives": {
            "federation.strategy": "mmfed3",
            "model.scorer": scorer,
            "training.loss": "self_adversarial",
        }
        for scorer in SCORERS
    },
}


def _clients(
    overrides: dict[str, Any], rounds: int, size: int, *, largest_has_few: bool = False
) -> tuple[list[Client], list[dict[str, float]]]:
    """Train four clients of different sizes for some rounds, so many at once.

    With `largest_has_few` the client with the most entities has the fewest triples, so that the stack goes on without.
    """
    fixed = {"data.num_clients": 4, "training.local_epochs": 2, "distillation.warmup_rounds": 0}
    runtime = small_runtime(fixed | overrides, tiny_graph(num_entities=50, num_triples=400, num_relations=9))
    server = runtime.server
    assert server is not None
    clients = list(runtime.clients.values())
    if largest_has_few:
        largest = max(clients, key=lambda client: len(client.data.entity_ids))
        largest.triples = largest.triples[:6]
    losses: list[dict[str, float]] = []
    for round_num in range(1, rounds + 1):
        broadcast = server.begin_round(round_num)
        results = []
        for start in range(0, len(clients), size):
            part = clients[start : start + size]
            results += train_together(part, round_num, [client.own_part(broadcast) for client in part])
        losses = [report.losses for _, report in results]
        for update, _ in results:
            assert update is not None
            server.receive(update)
        server.finish_round()
    return clients, losses


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / one.double().norm().clamp(min=1e-6))


@pytest.mark.parametrize("method", METHODS)
def test_a_stack_equals_its_clients_one_by_one(method: str) -> None:
    """After a full round with an exchange before it, all state and losses agree within 1e-4."""
    alone, alone_losses = _clients(METHODS[method], rounds=2, size=1)
    stacked, stacked_losses = _clients(METHODS[method], rounds=2, size=4)
    assert len({len(client.triples) for client in alone}) > 1, "the clients differ in size"
    for one, other, one_loss, other_loss in zip(alone, stacked, alone_losses, stacked_losses, strict=True):
        assert other_loss == pytest.approx(one_loss, rel=1e-4, abs=1e-6)
        before, after = one.state(), other.state()
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert after[name].shape == value.shape
            assert after[name].dtype == value.dtype
            if not name.startswith("optimizer/"):
                assert _relative(value, after[name]) < 1e-4, name


@pytest.mark.parametrize("negatives", ["per_triple", "shared"])
@pytest.mark.parametrize("imputer", ["diffusion", "gan"])
def test_a_stack_goes_on_without_its_largest_client(imputer: str, negatives: str) -> None:
    """What an epoch hides is padded for the whole stack, and read by the part of it that still has batches."""
    method = {
        "federation.strategy": "mmfed3",
        "model.imputer": imputer,
        "diffusion.hide_rate": 0.3,
        "imputer.hide_rate": 0.3,
        "training.loss": "sampled_softmax",
        "training.negatives": negatives,
    }
    alone, alone_losses = _clients(method, rounds=2, size=1, largest_has_few=True)
    stacked, stacked_losses = _clients(method, rounds=2, size=4, largest_has_few=True)
    for one, other, one_loss, other_loss in zip(alone, stacked, alone_losses, stacked_losses, strict=True):
        assert other_loss == pytest.approx(one_loss, rel=1e-4, abs=1e-6)
        for name, value in one.values.params.items():
            assert _relative(value, other.values.params[name]) < 1e-4, name


def test_a_stack_imputes_as_each_client_alone() -> None:
    clients, _ = _clients(METHODS["MMFeD3-HidE"], rounds=1, size=4)
    together = {client.data.client: dict(client._imputations) for client in clients}
    for client in clients:
        client._imputations.clear()
        impute_together([client], 1)
        for key, alone in client._imputations.items():
            made = together[client.data.client][key]
            assert alone is not None
            assert made is not None
            missing = ~client.available
            assert torch.allclose(made.values[missing], alone.values[missing], atol=1e-4)
            assert torch.allclose(made.uncertainty, alone.uncertainty, atol=1e-4)


def test_a_loss_that_is_not_finite_names_its_client() -> None:
    clients, _ = _clients(METHODS["structure"], rounds=1, size=4)
    clients[2].values.params["relation"].fill_(float("nan"))
    with pytest.raises(RunError, match=r"^client 2, round 5: the loss is not finite \(terms: global/link\); lower"):
        train_together(clients, 5, [None] * 4)


def test_padding_by_hand() -> None:
    """Two lists of rows, padded by 9; then to a wanted shape."""
    found = [torch.tensor([1, 2]), torch.tensor([3])]
    assert pad_stack(found, value=9).tolist() == [[1, 2], [3, 9]]
    assert pad_stack(found, (3,)).tolist() == [[1, 2, 0], [3, 0, 0]]


@pytest.mark.parametrize("reciprocal", [True, False])
def test_a_stack_gives_back_what_it_took(reciprocal: bool) -> None:
    """Tables of different sizes, state that one client lacks, and counts of steps."""
    halves = 2 if reciprocal else 1
    shape = StackShape((3, 5), (2, 4), reciprocal)
    states = [
        {
            "relation": torch.randn(1, halves * relations, 4),
            "global/entity": torch.randn(entities, 4),
            "steps/global/entity": torch.tensor(7),
        }
        for entities, relations in ((3, 2), (5, 4))
    ]
    stacked = shape.stack(states)
    assert stacked["global/entity"].shape == (2, 6, 4), "one row belongs to no entity"
    for index, state in enumerate(states):
        back = shape.unstack(stacked, index)
        assert all(torch.equal(back[name], value) for name, value in state.items())
    if reciprocal:
        assert torch.equal(stacked["relation"][0, :, 4:6], states[0]["relation"][:, 2:]), "the halves stay halves"
    del states[0]["global/entity"]
    assert float(shape.stack(states)["global/entity"][0].abs().max()) == 0.0


def test_functions_of_one_client_apply_to_all() -> None:
    """Trees of tensors and None go in and come out."""

    def function(first: dict[str, Tensor], second: Tensor | None, third: tuple[Tensor, ...]) -> dict[str, Tensor]:
        assert second is None
        return {"sum": first["a"].sum() + third[0], "same": torch.zeros(2)}

    result = over_clients(function, {"a": torch.arange(6.0).view(2, 3)}, None, (torch.tensor([1.0, 2.0]),))
    assert result["sum"].tolist() == [4.0, 14.0]
    assert result["same"].shape == (2, 2)
    with pytest.raises(TypeError, match="list is not a tree of tensors"):
        over_clients(lambda tree: tree, [torch.zeros(2)])
