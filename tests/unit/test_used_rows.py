"""With negatives that a batch shares, a step computes on the entities that it uses alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from builders import tiny_graph
from experiments import COUPLINGS, small_runtime
from fedsim.federated.client import Client
from fedsim.models import training
from fedsim.models.client_model import EntityInput, ModalityInput, Prototypes
from fedsim.models.client_stack import ClientStack
from fedsim.models.imputers import Imputation, TokenTable
from fedsim.models.step_entities import StepEntities
from fedsim.models.used_rows import UsedRows

SHARED = {
    "training.loss": "sampled_softmax",
    "training.negatives": "shared",
    "training.num_negatives": 3,
    "training.batch_size": 4,
    "diffusion.batch_size": 4,
    "imputer.batch_size": 4,
    "imputer.link_rows": 2,
}
NO_FEATURE_TERMS = {"distillation.feature_to_client": 0.0, "distillation.feature_to_global": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "structure alone": {"federation.strategy": "fede", "model.fusion": "none"},
    "TransE": {"federation.strategy": "fede", "model.scorer": "transe", "training.loss": "self_adversarial"},
    "FedEC": {"federation.strategy": "fedec", "model.imputer": "zero"},
    "MoSE": {"federation.strategy": "fede", "model.fusion": "split", "model.imputer": "zero"},
    "N3, tails": {
        "federation.strategy": "fede",
        "training.n3_weight": 0.1,
        "training.corruption": "tail",
        "evaluation.protocol": "fede",
    },
    "GAN": {"federation.strategy": "fede", "model.imputer": "gan", "imputer.hide_rate": 0.3},
    "FedLU": {"federation.strategy": "fedlu", "model.imputer": "random"},
    "MMFeD3-HidE": {"federation.strategy": "mmfed3", "diffusion.hide_rate": 0.3, **NO_FEATURE_TERMS},
}


def _train(overrides: dict[str, Any]) -> tuple[list[Client], list[dict[str, float]]]:
    """Train all clients for two rounds, with what the server makes of the first between them."""
    runtime = small_runtime(SHARED | overrides, tiny_graph(num_entities=60, num_triples=200, num_relations=6))
    server = runtime.server
    assert server is not None
    clients, losses = list(runtime.clients.values()), []
    for round_num in (1, 2):
        broadcast = server.begin_round(round_num)
        for client in clients:
            update, report = client.train(round_num, client.own_part(broadcast))
            assert update is not None
            server.receive(update)
            losses.append(report.losses)
        server.finish_round()
    return clients, losses


def _use_all(stack: ClientStack, *parts: Any) -> tuple[StepEntities, Any, Any, Any]:
    return stack.all_entities(), *parts


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Note of each step how many entities it computes on, and how many the client has."""
    noted: list[tuple[int, int]] = []
    real = training.forward_view

    def spy(stack: ClientStack, params: Any, view: str, batch: Any, *args: Any) -> Any:
        forward = real(stack, params, view, batch, *args)
        noted.append((forward.tokens.values.shape[-2], stack.members[0].num_entities))
        return forward

    monkeypatch.setattr(training, "forward_view", spy)
    return noted


@pytest.mark.parametrize("method", METHODS)
def test_a_step_on_the_entities_in_use_is_one_on_all(
    method: str, sizes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the feature terms and HidE's mean tokens, which are means over fewer entities; here they are zero."""
    monkeypatch.setattr(TokenTable, "means", lambda table: torch.zeros_like(table.values[:, 0]))
    own, own_losses = _train(METHODS[method])
    assert max(used for used, _ in sizes) <= 2 * 4 + 3 + 2 * (4 + 4)  # heads and tails, negatives, what two views draw
    assert all(used < there for used, there in sizes)
    sizes.clear()
    monkeypatch.setattr(training, "cut_down", _use_all)
    whole, whole_losses = _train(METHODS[method])
    assert all(used == there for used, there in sizes)
    for one, other in zip(own_losses, whole_losses, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    for client, same in zip(own, whole, strict=True):
        theirs = same.values.params
        for name, value in client.values.params.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("imputer", ["zero", "diffusion"])
def test_feature_terms_are_means_over_entities_of_triples_and_negatives(
    imputer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step's L_feat is that of eq. 10 by hand from all tokens; what the imputer drew does not count."""
    expected: list[tuple[float, float]] = []
    num_drawn: list[int] = []
    real = training.train_step

    def spy(stack: ClientStack, views: Any, batch: Any, epoch: Any, coupling: Any, *args: Any) -> Any:
        asked = torch.cat([batch.triples[:, [0, 2]].flatten(), batch.negatives.flatten()]).unique()
        num_drawn.append(len(batch.entities.rows) - len(asked))
        rows, model, (member,) = batch.entities.rows[asked], stack.model, stack.members
        entities = member.inputs.entities
        tables = [model.tokens(stack.view(view), entities).values[:, rows] for view in ("local", "global")]
        cosine = torch.cosine_similarity(*tables, dim=-1)[entities.available[:, rows]]
        losses = real(stack, views, batch, epoch, coupling, *args)
        expected.append((float((1 - cosine).mean()), float(losses["feature_to_client"].detach())))
        return losses

    monkeypatch.setattr(training, "train_step", spy)
    weights = {f"distillation.{name}": 1.0 for name in COUPLINGS}
    _train({"federation.strategy": "mmfed3", "model.imputer": imputer, **weights})
    assert len(expected) > 10
    assert (max(num_drawn) > 0) == (imputer == "diffusion")
    for wanted, found in expected:
        assert found == pytest.approx(wanted, abs=1e-5)


def test_used_rows_by_hand() -> None:
    triples = torch.tensor([[7, 0, 2], [2, 1, 7]])
    draws = {"rows": torch.tensor([5, 5]), "link_rows": torch.tensor([1]), "noise": torch.zeros(2, 3)}
    draws["entity_noise"] = torch.arange(9.0).expand(2, 9)
    used = UsedRows.of_step(triples, torch.tensor([[[2, 8]]]), [draws, {}], 9)
    assert used.rows.tolist() == [1, 2, 5, 7, 8]
    assert used.linked.tolist() == [False, True, False, True, True]
    assert used.number_triples(triples).tolist() == [[3, 0, 1], [1, 1, 3]]
    assert used.number(torch.tensor([[8, 2]])).tolist() == [[4, 1]]
    found = used.number_draws(draws)
    assert (found["rows"].tolist(), found["link_rows"].tolist()) == ([2, 2], [0])
    assert found["entity_noise"].tolist() == [[1, 2, 5, 7, 8]] * 2
    assert found["noise"] is draws["noise"]


def test_what_is_known_of_some_entities() -> None:
    """Features in any order, of entities that are taken or not; an entity that is taken twice has them twice."""
    available = torch.tensor([[True] * 5, [True, False, True, False, True]])
    prototypes = Prototypes(torch.arange(10.0).view(2, 5, 1), torch.eye(5, dtype=torch.bool)[:2])
    known = EntityInput(
        available, {"text": ModalityInput(torch.tensor([4, 0, 2]), torch.tensor([[40.0], [0.0], [20.0]]))}, prototypes
    )
    rows = torch.tensor([1, 2, 4, 2])
    taken = known.take(rows, ["text"])
    assert known.take(rows, []).features == {}
    assert torch.equal(taken.available, available[:, rows])
    assert taken.features["text"].rows.tolist() == [1, 2, 3]
    assert taken.features["text"].values.flatten().tolist() == [20, 40, 20]
    assert taken.prototypes is not None
    assert taken.prototypes.values.flatten().tolist() == [1, 2, 4, 2, 6, 7, 9, 7]
    assert torch.equal(taken.prototypes.present, prototypes.present[:, rows])
    nothing = EntityInput(available[:, :0], {"text": ModalityInput(rows[:0], torch.zeros(0, 1))})
    assert nothing.take(rows[:0], ["text"]).features["text"].values.shape == (0, 1)


@pytest.mark.parametrize("leading", [(), (2,)])
def test_step_entities_cut_tables_down(leading: tuple[int, ...]) -> None:
    def numbers(*shape: int) -> Tensor:
        return torch.randn(*leading, *shape, generator=torch.Generator().manual_seed(0))

    rows = torch.tensor([3, 0]).expand(*leading, 2)
    if leading:
        rows = torch.stack([rows[0], rows[1].flip(0)])
    linked = torch.tensor([True, False]).expand(*leading, 2)
    entities = StepEntities(EntityInput(torch.ones(*leading, 3, 2, dtype=torch.bool), {}), rows, linked)
    assert entities.compared.tolist() == linked.unsqueeze(-2).expand(*leading, 3, 2).tolist()
    table, tokens, uncertainty = numbers(4, 5), numbers(3, 4, 5), numbers(3, 4)
    imputation = entities.of_imputation(Imputation(tokens, uncertainty))
    hidden = entities.of_hidden(uncertainty > 0)
    assert imputation is not None
    assert hidden is not None
    cut = entities.of_params({"entity": table, "other": uncertainty})
    assert cut["other"] is uncertainty
    for place in [(0,), (1,)] if leading else [()]:
        at = rows[place]
        assert torch.equal(cut["entity"][place], table[place][at])
        assert torch.equal(imputation.values[place], tokens[place][:, at])
        assert torch.equal(imputation.uncertainty[place], uncertainty[place][:, at])
        assert torch.equal(hidden[place], uncertainty[place][:, at] > 0)
    everything = StepEntities(entities.known)
    assert everything.compared is entities.known.available
    assert everything.of_imputation(None) is None
    assert everything.of_hidden(hidden) is hidden
