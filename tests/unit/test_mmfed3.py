"""MMFeD3: each term by hand, its direction, its switch, and the server's steps (method.md eq. 9 to 13)."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from builders import tiny_graph
from experiments import COUPLINGS, generator, small_config, small_runtime, token_table
from fedsim.federated.messages import PrototypeTable, SoftQueries
from fedsim.federated.mmfed3 import MMFeD3
from fedsim.federated.runtime import InProcessRuntime, make_strategy
from fedsim.federated.server_distillation import distil_global_model, global_tokens
from fedsim.federated.strategy import GlobalModel
from fedsim.models.client_model import ClientModel
from fedsim.models.imputers import TokenTable
from fedsim.models.steps import Forward, Step

OFF = {f"distillation.{name}": 0.0 for name in (*COUPLINGS, "prototype")}


def _strategy(**weights: Any) -> MMFeD3:
    return MMFeD3(small_config({**OFF, **{f"distillation.{name}": value for name, value in weights.items()}}))


def _forward(logits: Tensor, tokens: TokenTable) -> Forward:
    weight = torch.full((len(logits),), 1 / len(logits))
    return Forward(tokens, logits, torch.zeros(len(logits), dtype=torch.int64), weight, {})


def _couple(strategy: MMFeD3, round_num: int, views: dict[str, Forward]) -> dict[str, Tensor]:
    """The strategy's terms of a step in which nothing but the views' passes is known."""
    return strategy.couple(round_num, Step(views, {}, {}, None, lambda function, *arguments: function(*arguments)))


def _leaves() -> dict[str, Forward]:
    """Passes of both views on the same mask, whose logits and tokens are leaves that can take a gradient."""
    views = {}
    for seed, view in enumerate(("local", "global")):
        table = token_table([[1, 1, 1], [1, 0, 1]], seed=seed)
        mask = table.available.bool()
        values = table.values.requires_grad_()
        logits = torch.randn(4, 5, generator=generator(seed)).requires_grad_()
        views[view] = _forward(logits, TokenTable(values, mask))
    return views


def test_the_logit_terms_by_hand() -> None:
    """At tau = 2 the scores (2 ln 3, 0) are p = (3/4, 1/4), and (0, 0) is q = (1/2, 1/2).

    KL(p || q) = 0.75 ln 1.5 + 0.25 ln 0.5 = 0.130812 and KL(q || p) = 0.5 ln (2/3) + 0.5 ln 2 = 0.143841; tau^2 = 4,
    and the weights 0.5 and 0.25 give 0.261624 and 0.143841.
    """
    tokens = token_table([[1]])
    skewed = _forward(torch.tensor([[2 * math.log(3), 0.0]]), tokens)
    even = _forward(torch.zeros(1, 2), tokens)
    strategy = _strategy(logit_to_client=0.5, logit_to_global=0.25, temperature=2.0)
    losses = _couple(strategy, 1, {"local": even, "global": skewed})
    assert float(losses["logit_to_client"]) == pytest.approx(0.261624, rel=1e-5), "the global copy p teaches"
    assert float(losses["logit_to_global"]) == pytest.approx(0.143841, rel=1e-5), "the private model q teaches"


def test_the_feature_terms_by_hand() -> None:
    """Cosines 1, 0 and -1 of the available tokens: (0 + 1 + 2) / 3 = 1; a missing token does not count."""
    mask = torch.tensor([[True, True], [True, False]])
    own = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [9.0, 9.0]]])
    shared = torch.tensor([[[3.0, 0.0], [0.0, 2.0]], [[-1.0, 0.0], [-9.0, 9.0]]])
    views = {
        name: _forward(torch.zeros(1, 2), TokenTable(values, mask))
        for name, values in (("local", own), ("global", shared))
    }
    losses = _couple(_strategy(feature_to_client=0.5, feature_to_global=2.0), 1, views)
    assert float(losses["feature_to_client"]) == pytest.approx(0.5)
    assert float(losses["feature_to_global"]) == pytest.approx(2.0)


@pytest.mark.parametrize("name", COUPLINGS)
def test_each_term_teaches_its_student_alone(name: str) -> None:
    """The teacher's side is behind a stop-gradient; a step against the gradient lowers the term."""
    views = _leaves()
    losses = _couple(_strategy(**{name: 1.0}), 1, views)
    assert set(losses) == {name}, "the other terms are switched off by their weight"
    student, teacher = ("local", "global") if name.endswith("to_client") else ("global", "local")
    of = (lambda item: item.logits) if name.startswith("logit") else (lambda item: item.tokens.values)
    losses[name].backward()
    back = of(views[teacher]).grad
    assert back is None or float(back.abs().max()) == 0.0
    gradient = of(views[student]).grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0
    with torch.no_grad():
        of(views[student]).sub_(0.1 * gradient)
    assert float(_couple(_strategy(**{name: 1.0}), 1, views)[name].detach()) < float(losses[name].detach())


@pytest.mark.parametrize("weights", [(0.7, 0.0), (0.0, 0.4), (0.7, 0.4)])
def test_the_logit_gradients_equal_those_of_the_formula(weights: tuple[float, float]) -> None:
    """Eq. 9 written out with torch's own KL and stop-gradients gives the same values and gradients."""
    strategy = _strategy(logit_to_client=weights[0], logit_to_global=weights[1], temperature=1.5)
    ours, reference = _leaves(), _leaves()
    torch.stack(list(_couple(strategy, 1, ours).values())).sum().backward()
    logs = {view: torch.log_softmax(item.logits / 1.5, 1) for view, item in reference.items()}
    total = torch.zeros(())
    for weight, student, teacher in ((weights[0], "local", "global"), (weights[1], "global", "local")):
        divergence = torch.nn.functional.kl_div(
            logs[student], logs[teacher].detach(), log_target=True, reduction="batchmean"
        )
        total = total + weight * 1.5**2 * divergence
    total.backward()
    for view, item in ours.items():
        expected = reference[view].logits.grad
        found = item.logits.grad
        assert found is not None
        assert torch.allclose(found, torch.zeros(4, 5) if expected is None else expected, atol=1e-6)


def test_equal_views_have_nothing_to_teach() -> None:
    views = _leaves()
    losses = _couple(_strategy(**dict.fromkeys(COUPLINGS, 1.0)), 1, {"local": views["local"], "global": views["local"]})
    assert all(float(loss.detach()) == pytest.approx(0.0, abs=1e-6) for loss in losses.values())


def test_the_terms_wait_for_the_warm_up() -> None:
    strategy = _strategy(**dict.fromkeys(COUPLINGS, 1.0), warmup_rounds=2)
    assert _couple(strategy, 2, _leaves()) == {}
    assert set(_couple(strategy, 3, _leaves())) == set(COUPLINGS)


@pytest.mark.parametrize("imputer", ["zero", "diffusion"])
@pytest.mark.parametrize("strategy", ["mmfed3", "fedlu"])
def test_with_all_weights_zero_the_private_model_is_that_of_local_training(strategy: str, imputer: str) -> None:
    """From the same values, three rounds end in the same bits of the private model, and in the same metrics.

    Dropout, both clients and all rounds: nothing of the federation, not even the shared relations, reaches it. (HidE
    also takes the server's prototypes as a condition; they are switched off.)
    """
    settings = {**OFF, "model.imputer": imputer, "model.dropout": 0.3, "distillation.send_prototypes": False}
    runtime = small_runtime({**settings, "federation.strategy": strategy})
    alone = small_runtime({**settings, "federation.strategy": "local"})
    for number, client in alone.clients.items():
        ours = runtime.clients[number].values
        for values, source in ((client.values.params, ours.params), (client.values.ema, ours.ema)):
            for name in values:
                values[name] = source[name].clone()
    for round_num in (1, 2, 3):
        runtime.train(round_num, [0, 1])
        alone.train(round_num, [0, 1])
        for number, client in alone.clients.items():
            ours = runtime.clients[number].values
            for values, source in ((client.values.params, ours.params), (client.values.ema, ours.ema)):
                assert all(torch.equal(value, source[name]) for name, value in values.items()), round_num
    for client in runtime.clients.values():
        client.combination = 0.0
    found, expected = (each.evaluate("test", 3, choose=False) for each in (runtime, alone))
    assert [item.metrics for item in found] == [item.metrics for item in expected]


def test_with_any_weight_both_views_train_the_relations() -> None:
    """The relation table is shared: a federation without coupling is told apart from one with some."""
    assert _strategy().relation_views == ("local",)
    for name in COUPLINGS:
        assert _strategy(**{name: 0.1}).relation_views is None


def test_the_private_model_never_comes_from_the_server_again() -> None:
    """A broadcast of zeros resets the global copy and leaves the private model alone."""
    client = small_runtime().clients[0]
    before = client.values.params["local/entity"].clone()
    broadcast = small_runtime().server
    assert broadcast is not None
    sent = broadcast.begin_round(1).for_entities(client.entity_ids)
    sent.entity.zero_()
    client.join(sent)
    assert torch.equal(client.values.params["local/entity"], before)
    assert float(client.values.params["global/entity"].abs().max()) == 0.0


def test_soft_queries_are_labelled_by_the_private_model_in_the_space_of_the_global_copy() -> None:
    """Labels are log-probabilities over the private model's best candidates, in falling order; ids are owned."""
    runtime = small_runtime()
    client = runtime.clients[0]
    assert runtime.server is not None
    update, _ = client.train(1, runtime.server.begin_round(1).for_entities(client.entity_ids))
    assert update is not None
    soft = update.soft_queries
    assert soft is not None
    assert soft.queries.shape == (1, 4, 8)
    assert soft.candidates.shape == soft.log_labels.shape == (4, 4)
    assert torch.allclose(soft.log_labels.exp().sum(1), torch.ones(4))
    assert bool((soft.log_labels.diff(dim=1) <= 0).all())
    assert bool(torch.isin(soft.candidates, client.entity_ids).all())


@pytest.mark.parametrize(
    ("overrides", "tokens", "soft"),
    [
        ({}, True, True),
        ({"distillation.send_prototypes": False}, False, True),
        ({"distillation.num_soft_queries": 0}, True, False),
        ({"data.modalities": []}, False, True),
    ],
)
def test_what_is_sent_can_be_switched_off(overrides: dict[str, Any], tokens: bool, soft: bool) -> None:
    runtime = small_runtime(overrides)
    client = runtime.clients[0]
    assert runtime.server is not None
    update, report = client.train(1, runtime.server.begin_round(1).for_entities(client.entity_ids))
    assert update is not None
    assert (update.tokens is not None, update.soft_queries is not None) == (tokens, soft)
    assert report.bytes_up > 0


def test_only_really_available_tokens_are_sent() -> None:
    """Token rows follow `token_present.nonzero()`; hidden and imputed ones are not among them."""
    runtime = small_runtime()
    client = runtime.clients[0]
    assert runtime.server is not None
    update, _ = client.train(1, runtime.server.begin_round(1).for_entities(client.entity_ids))
    assert update is not None
    assert update.token_present is not None
    assert update.tokens is not None
    for index, name in enumerate(client.model.feature_dims):
        rows = update.token_present[index].nonzero().flatten()
        assert torch.equal(rows, client.features[name].rows)
        start = int(update.token_present[:index].sum())
        expected = client.project("global", name, client.features[name].values)
        assert torch.allclose(update.tokens[start : start + len(rows)], expected, atol=1e-5)


def _global_model(config_overrides: dict[str, Any], num_entities: int = 12) -> tuple[Any, ClientModel, GlobalModel]:
    config = small_config(config_overrides)
    model = ClientModel(config, {"text": 5})
    entity = model.init_entities(num_entities, generator())
    table = PrototypeTable(
        torch.randn(1, num_entities, 8, generator=generator(1)),
        (torch.arange(num_entities) % 3).unsqueeze(0),
        torch.ones(1, num_entities).long(),
    )
    return config, model, GlobalModel(entity, model.init_modules(generator(2)), table)


def _soft(num_entities: int = 12) -> SoftQueries:
    candidates = torch.stack([torch.randperm(num_entities, generator=generator(i))[:4] for i in range(6)])
    labels = torch.log_softmax(torch.randn(6, 4, generator=generator(3)) * 3, 1)
    return SoftQueries(torch.randn(1, 6, 8, generator=generator(4)), candidates, labels)


def test_global_tuples_hold_what_no_client_has() -> None:
    """[G[e]; Z[e]]: structure of all entities, a token where any client sent one."""
    _, model, state = _global_model({})
    tuples = global_tokens(model, state.entity, state.prototypes)
    assert tuples.available[0].all()
    assert tuples.available[1].int().tolist() == [int(i % 3 > 0) for i in range(12)]
    assert state.prototypes is not None
    assert torch.equal(tuples.values[1], state.prototypes.values[0])
    without = global_tokens(model, state.entity, None)
    assert not bool(without.available[1:].any())


def test_the_server_steps_lower_both_losses_and_leave_the_input_alone() -> None:
    overrides = {"distillation.server_steps": 40, "distillation.server_learning_rate": 0.02, "model.imputer": "zero"}
    config, model, state = _global_model(overrides)
    before = state.entity.clone()
    config_short = config.model_copy(
        update={"distillation": config.distillation.model_copy(update={"server_steps": 1})}
    )
    _, first = distil_global_model(config_short, model, state, [_soft()], generator(5))
    after, _ = distil_global_model(config, model, state, [_soft()], generator(5))
    _, last = distil_global_model(config_short, model, after, [_soft()], generator(5))
    assert last["server_logit"] < 0.8 * first["server_logit"]
    assert first["server_proximal"] == 0.0, "at Gbar itself"
    assert torch.equal(state.entity, before)
    assert after.prototypes is state.prototypes


def test_the_proximal_term_holds_the_table_near_the_mean() -> None:
    moved = []
    for mu in (0.0, 100.0):
        overrides = {"distillation.server_steps": 30, "distillation.proximal": mu, "model.imputer": "zero"}
        config, model, state = _global_model({**overrides, "distillation.server_learning_rate": 0.02})
        after, _ = distil_global_model(config, model, state, [_soft()], generator(5))
        moved.append(float((after.entity - state.entity).square().sum()))
    assert moved[1] < 0.5 * moved[0]


def test_the_server_denoiser_learns_on_global_tuples() -> None:
    """Eq. 12: the imputer's parameters move, the entity table does not (no soft query came)."""
    config, model, state = _global_model({"distillation.server_steps": 3})
    after, losses = distil_global_model(config, model, state, [], generator(5))
    assert set(losses) == {"server_diffusion"}
    assert torch.equal(after.entity, state.entity)
    changed = {name for name, value in after.modules.items() if not torch.equal(value, state.modules[name])}
    assert changed
    assert all(name.startswith("imputer.") for name in changed)
    config, model, state = _global_model({"distillation.server_steps": 0})
    after, losses = distil_global_model(config, model, state, [_soft()], generator(5))
    assert (losses, after.entity.equal(state.entity)) == ({}, True)


def test_soft_queries_with_fewer_candidates_are_cut_to_the_smallest() -> None:
    """A client with two entities sends two candidates per query; the labels are normalised again."""
    config, model, state = _global_model({"model.imputer": "zero"})
    wide = _soft()
    narrow = SoftQueries(wide.queries, wide.candidates[:, :2], torch.log_softmax(wide.log_labels[:, :2], 1))
    _, losses = distil_global_model(config, model, state, [wide, narrow], generator(5))
    assert math.isfinite(losses["server_logit"])
    assert losses["server_logit"] >= 0


def _private_entity(runtime: InProcessRuntime) -> Tensor:
    return runtime.clients[0].values.params["local/entity"]


@pytest.mark.parametrize("name", COUPLINGS)
def test_each_weight_reaches_the_training(name: str) -> None:
    """Turning one term on changes the run, and its loss is reported under its name."""
    graph = tiny_graph()
    base, with_term = small_runtime(OFF, graph), small_runtime({**OFF, f"distillation.{name}": 1.0}, graph)
    reports = [runtime.train(1, [0, 1]).reports[0].losses for runtime in (base, with_term)]
    assert set(reports[1]) - set(reports[0]) == {name}
    assert not torch.equal(_private_entity(base), _private_entity(with_term))


def test_the_strategy_names_its_views() -> None:
    strategy = make_strategy(small_config())
    assert strategy.views == ("local", "global")
    assert strategy.sends_prototypes
