"""The training step and its parts (method.md eq. 8)."""

from typing import Any

import pytest
import torch

from builders import tiny_graph
from experiments import small_client, small_config, small_runtime
from fedsim.errors import RunError
from fedsim.federated.client import Client
from fedsim.models import training
from fedsim.models.client_stack import ClientStack, ClientValues
from fedsim.models.fusion import FUSIONS
from fedsim.models.training import update_ema


def _local(**overrides: Any) -> Client:
    return small_client({"federation.strategy": "local", **overrides})


def test_the_average_of_the_denoiser_by_hand() -> None:
    """The decay warms up: min(0.995, 2/11) at the first step, so 0 moves 9/11 of the way to 1; at step 9, 10/19."""
    values = ClientValues({"g/imputer.a": torch.ones(1)}, {}, {"g/imputer.a": torch.zeros(1)})
    update_ema(values, 0.995, [1])
    assert torch.allclose(values.ema["g/imputer.a"], torch.tensor([9 / 11]))
    update_ema(values, 0.995, [9])
    assert torch.allclose(values.ema["g/imputer.a"], torch.tensor([1 - (2 / 11) * (10 / 19)]))
    update_ema(values, 0.0, [1])
    assert torch.equal(values.ema["g/imputer.a"], torch.ones(1))


@pytest.mark.parametrize("loss", ["one_vs_all", "sampled_softmax", "self_adversarial"])
def test_training_learns_its_triples(loss: str) -> None:
    client = _local(**{"training.local_epochs": 40, "training.loss": loss, "training.margin": 1.0})
    first = client.train(1, None)[1].losses["local/link"]
    last = client.train(2, None)[1].losses["local/link"]
    assert last < 0.9 * first


@pytest.mark.parametrize("loss", ["one_vs_all", "sampled_softmax"])
def test_the_split_fusion_trains_each_token_apart(loss: str) -> None:
    """Other relations of the last token change what is learned of it, and nothing else to the last bit."""
    settings = {"model.fusion": "split", "model.imputer": "zero", "training.loss": loss}
    one, other = _local(**settings), _local(**settings)
    before = one.values.params["relation"].clone()
    other.values.params["relation"][-1] += 0.1
    one.train(1, None)
    other.train(1, None)
    ours, theirs = one.values.params, other.values.params
    assert not torch.equal(ours["relation"][:-1], before[:-1])
    assert torch.equal(ours["relation"][:-1], theirs["relation"][:-1])
    assert not torch.equal(ours["relation"][-1], theirs["relation"][-1] - 0.1)
    changed = {name for name in ours if name != "relation" and not torch.equal(ours[name], theirs[name])}
    last = list(one.model.feature_dims)[-1]
    assert changed == {f"local/projection.{last}.{part}" for part in ("weight", "bias")}


def test_training_is_a_function_of_seed_round_and_client() -> None:
    one, same, other = _local(), _local(), _local(seed=1, **{"data.seed": 0})
    assert one.train(1, None)[1].losses == same.train(1, None)[1].losses
    assert all(torch.equal(value, same.state()[name]) for name, value in one.state().items())
    assert not torch.equal(one.state()["params/relation"], other.state()["params/relation"])
    one.train(2, None)
    same.train(3, None)
    assert not torch.equal(one.state()["params/relation"], same.state()["params/relation"])


def test_losses_are_means_over_steps_and_total_is_their_sum() -> None:
    losses = _local().train(1, None)[1].losses
    assert set(losses) == {"local/link", "local/diffusion", "total"}
    assert losses["total"] == pytest.approx(losses["local/link"] + losses["local/diffusion"])


def test_a_loss_that_is_not_finite_stops_with_client_round_and_term() -> None:
    client = _local()
    client.values.params["relation"].fill_(float("nan"))
    with pytest.raises(RunError, match=r"client 0, round 3: the loss is not finite \(terms: local/link\); lower"):
        client.train(3, None)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_score_that_is_not_finite_stops_with_client_round_and_split(split: str) -> None:
    client = _local()
    client.values.params["relation"].fill_(float("nan"))
    with pytest.raises(RunError, match=rf"^client 0, round 3, {split}: \d+ of \d+ scores are NaN"):
        client.evaluate(split, 3, choose=split == "valid")


def test_a_client_without_validation_triples_keeps_the_even_combination() -> None:
    client = small_runtime({"federation.strategy": "mmfed3"}).clients[0]
    (group,) = client.data.groups
    group.triples["valid"] = group.triples["valid"][:0]
    (evaluation,) = client.evaluate("valid", 0, choose=True)
    assert (evaluation.metrics.num_queries, evaluation.combination, client.combination) == (0, 0.5, 0.5)


def test_a_gpu_that_torch_does_not_find_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RunError, match=r"no CUDA device; .* runtime\.gpus_per_client to 0"):
        small_runtime({"runtime.gpus_per_client": 0.5})


def test_one_vs_all_asks_both_sides_unless_tails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[torch.Size] = []
    real = training.forward_view

    def spy(*args: Any) -> Any:
        forward = real(*args)
        sizes.append(forward.logits.shape)
        assert forward.target.shape == forward.logits.shape[:1]
        return forward

    monkeypatch.setattr(training, "forward_view", spy)
    for corruption in ("both", "tail"):
        sides = {"training.corruption": corruption, "evaluation.protocol": "fede"}
        _local(**sides, **{"training.batch_size": 4096}).train(1, None)
    num_triples, num_entities = sizes[1]
    assert sizes == [(2 * num_triples, num_entities), (num_triples, num_entities)]


@pytest.mark.parametrize("kind", ["per_triple", "filtered", "shared"])
def test_negatives_are_entities_of_the_client(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each query has its own, known answers among them or not, or all the same; the true answer is in column 0."""
    batches: list[Any] = []
    forwards: list[Any] = []
    real = training.forward_view

    def spy(stack: Any, params: Any, view: str, batch: Any, *args: Any) -> Any:
        forward = real(stack, params, view, batch, *args)
        batches.append(batch)
        forwards.append(forward)
        return forward

    monkeypatch.setattr(training, "forward_view", spy)
    overrides = {"training.loss": "self_adversarial", "training.batch_size": 4096, "training.negatives": kind}
    client = _local(**overrides)
    client.train(1, None)
    batch, forward = batches[0], forwards[0]
    num_queries, num_negatives = 2 * len(client.triples), small_config().training.num_negatives
    assert batch.negatives.shape == (1 if kind == "shared" else num_queries, num_negatives)
    assert 0 <= int(batch.negatives.min()) <= int(batch.negatives.max()) < len(client.data.entity_ids)
    assert forward.logits.shape == (num_queries, 1 + num_negatives)
    assert not bool(forward.target.any())
    if kind != "shared":
        known = {(h, r, t) for h, r, t in client.triples.tolist()}
        own = batch.triples.tolist()
        asked = [*((h, r, None) for h, r, _ in own), *((None, r, t) for _, r, t in own)]
        hit = False
        for (h, r, t), drawn in zip(asked, batch.negatives.tolist(), strict=True):
            hit |= any(((h, r, e) if t is None else (e, r, t)) in known for e in drawn)
        assert hit == (kind == "per_triple")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_client_without_modalities_trains(fusion: str) -> None:
    """Structure alone, whether the data has nothing else or the config leaves it out."""
    for client in (
        small_client({"federation.strategy": "local", "model.fusion": fusion}, tiny_graph(modalities={})),
        _local(**{"model.fusion": fusion, "data.modalities": []}),
    ):
        assert set(client.train(1, None)[1].losses) == {"local/link", "total"}
        assert bool(torch.isfinite(client.scores(torch.tensor([0]), torch.tensor([0]), False, 1)).all())


def test_a_client_with_one_triple_trains() -> None:
    client = _local()
    client.triples = client.triples[:1]
    assert client.train(1, None)[1].losses["total"] > 0


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_training_without_and_with_everything_missing(rate: float) -> None:
    client = _local(**{"data.missing_rate": rate})
    losses = client.train(1, None)[1].losses
    assert losses["total"] > 0
    assert ("local/diffusion" in losses) == (rate == 0.0)


def test_the_optimizer_state_lasts_only_where_asked() -> None:
    """State that the next round starts without is freed at the end of its round, and takes no memory or disk."""
    for reset, steps in (("never", 2), ("global", 2), ("always", None)):
        client = _local(**{"training.reset_optimizer": reset, "training.batch_size": 4096})
        client.train(1, None)
        client.train(2, None)
        count = client.values.optimizer.get("steps/local/entity")
        assert (None if count is None else int(count)) == steps
    runtime = small_runtime({"federation.strategy": "mmfed3", "training.reset_optimizer": "global"})
    runtime.train(1, [0])
    names = {name.split("/")[1] for name in runtime.clients[0].values.optimizer}
    assert names == {"local", "relation"}


@pytest.mark.parametrize(
    ("imputer", "settings", "expected"),
    [
        ("mean", {}, 3),
        ("diffusion", {}, 1),
        ("diffusion", {"diffusion.impute_each": "epoch"}, 3),
        ("diffusion", {"diffusion.hide_rate": 0.3}, 3),
        ("nearest", {}, 1),
        ("ridge", {"imputer.hide_rate": 0.3}, 3),
        ("mlp", {"imputer.impute_each": "epoch"}, 3),
        ("mlp", {"imputer.hide_rate": 0.3}, 3),
    ],
)
def test_tokens_are_filled_each_epoch_or_round(
    imputer: str, settings: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where training hides tokens, what is missing changes by epoch, and so must what fills it."""
    client = _local(**{"training.local_epochs": 3, "model.imputer": imputer, **settings})
    calls = []
    fill = ClientStack.impute
    monkeypatch.setattr(ClientStack, "impute", lambda *args: calls.append(1) or fill(*args))
    client.train(1, None)
    assert len(calls) == expected


@pytest.mark.parametrize("kind", ["per_triple", "shared"])
def test_sampled_softmax_leaves_out_the_answer_itself(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negatives that are their query's answer score -1e6, and no others do."""
    batches: list[Any] = []
    forwards: list[Any] = []
    real = training.forward_view

    def spy(stack: Any, params: Any, view: str, batch: Any, *args: Any) -> Any:
        forwards.append(real(stack, params, view, batch, *args))
        batches.append(batch)
        return forwards[-1]

    monkeypatch.setattr(training, "forward_view", spy)
    _local(**{"training.loss": "sampled_softmax", "training.negatives": kind}).train(1, None)
    num_left_out = 0
    for batch, forward in zip(batches, forwards, strict=True):
        head, _, tail = batch.triples.unbind(-1)
        is_answer = batch.negatives == torch.cat([tail, head]).unsqueeze(-1)
        assert torch.equal(forward.logits[:, 1:] == -1e6, is_answer.expand_as(forward.logits[:, 1:]))
        assert bool((forward.logits[:, 0] > -1e6).all())
        num_left_out += int(is_answer.sum())
    assert num_left_out > 0
