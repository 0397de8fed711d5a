"""Robust aggregators: against numpy formulas of their papers, by hand, by their properties (method.md section 5)."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from experiments import MIXED, small_config, small_experiment, small_runtime
from fedsim.errors import ConfigError
from fedsim.federated.aggregation import ModuleMean
from fedsim.federated.messages import ClientUpdate
from fedsim.federated.robust import AGGREGATORS, Aggregator, check_robustness, collected, make_aggregator
from fedsim.federated.robust.base import combine, expected_attackers
from fedsim.federated.robust.collected import CollectedModules, CollectedRows
from fedsim.federated.runtime import InProcessRuntime, make_strategy
from fedsim.federated.server import Server
from fedsim.robustness_config import RobustnessConfig

Floats = npt.NDArray[np.float64]
ROBUST = [name for name, chosen in AGGREGATORS.items() if chosen is not None]
NEEDS_NO_FALLBACK = 11  # senders: 4 f + 3 = 11 with f = 2, a share of 0.18


def _make(name: str, **changes: Any) -> Aggregator:
    made = make_aggregator(name, RobustnessConfig(**changes))
    assert made is not None
    return made


def _combine(name: str, values: Any, reference: Any = 0.0, weights: Any = None, **changes: Any) -> Floats:
    """Combine one row, [num_senders, dim] -> [dim]."""
    sent = torch.as_tensor(values, dtype=torch.float64)
    before = torch.as_tensor(reference, dtype=torch.float64).expand(sent.shape[1])
    given_weights = torch.ones(len(sent)) if weights is None else torch.as_tensor(weights)
    made = combine(_make(name, **changes), sent.unsqueeze(0), before.unsqueeze(0), given_weights.double())
    found: Floats = made[0].numpy()
    return found


def _numpy_clipping(sent: Floats, before: Floats, f: int) -> Floats:
    norms = [float(np.sqrt(((row - before) ** 2).sum())) for row in sent]
    bound = sorted(norms)[(len(norms) - 1) // 2]
    clipped = [(row - before) * min(1.0, bound / norm) for row, norm in zip(sent, norms, strict=True)]
    return np.asarray(before + np.mean(clipped, axis=0))


def _numpy_trimmed(sent: Floats, before: Floats, f: int) -> Floats:
    columns = [np.sort(column)[f : len(column) - f] for column in sent.T]
    return np.array([column.mean() for column in columns])


def _krum_scores(sent: Floats, f: int, num_near: int) -> list[float]:
    scores = []
    for i, row in enumerate(sent):
        others = sorted(float(((row - other) ** 2).sum()) for j, other in enumerate(sent) if j != i)
        scores.append(sum(others[:num_near]))
    return scores


def _numpy_krum(sent: Floats, before: Floats, f: int) -> Floats:
    return np.asarray(sent[int(np.argmin(_krum_scores(sent, f, len(sent) - f - 2)))])


def _numpy_multi_krum(sent: Floats, before: Floats, f: int) -> Floats:
    return np.asarray(sent[np.argsort(_krum_scores(sent, f, len(sent) - f - 2))[: len(sent) - f]].mean(0))


def _numpy_bulyan(sent: Floats, before: Floats, f: int) -> Floats:
    left, kept = list(sent), []
    while len(kept) < len(sent) - 2 * f:
        best = int(np.argmin(_krum_scores(np.array(left), f, max(len(left) - f - 2, 2))))
        kept.append(left.pop(best))
    result = []
    for column in np.array(kept).T:
        near = sorted(column, key=lambda value: abs(value - np.median(column)))
        result.append(np.mean(near[: len(sent) - 4 * f]))
    return np.array(result)


FORMULAS: dict[str, Callable[[Floats, Floats, int], Floats]] = {
    "norm_clipping": _numpy_clipping,
    "median": lambda sent, before, f: np.asarray(np.median(sent, axis=0)),
    "trimmed_mean": _numpy_trimmed,
    "krum": _numpy_krum,
    "multi_krum": _numpy_multi_krum,
    "bulyan": _numpy_bulyan,
}


def test_every_aggregator_has_a_formula() -> None:
    assert list(FORMULAS) == ROBUST


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("num_senders", [11, 12, 17])
def test_the_formulas_of_the_papers(name: str, num_senders: int) -> None:
    """F = 18 % of the senders, rounded up, is 2, 3 and 4: Bulyan needs 11, 15 and 19, so it is held at the first."""
    if name == "bulyan" and num_senders != NEEDS_NO_FALLBACK:
        return
    draws = np.random.default_rng(num_senders)
    for _ in range(5):
        sent, before = 3 + draws.standard_normal((num_senders, 6)), draws.standard_normal(6)
        f = int(np.ceil(0.18 * num_senders))
        expected = FORMULAS[name](sent, before, f)
        assert np.allclose(_combine(name, sent, before, attacker_share=0.18), expected, rtol=1e-9, atol=1e-12)


def test_norm_clipping_by_hand() -> None:
    """From 0: changes 1, 2 and 6 have the median 2, so 6 becomes 2: (1 + 2 + 2) / 3. Factor 2 lets 4 through: 7/3.

    Weights 1, 1, 2: (1 + 2 + 2 * 2) / 4. Two senders are cut to the smaller change, (1 - 1) / 2.
    """
    sent = [[1.0], [2.0], [6.0]]
    assert _combine("norm_clipping", sent) == pytest.approx(5 / 3)
    assert _combine("norm_clipping", sent, clip_factor=2.0) == pytest.approx(7 / 3)
    assert _combine("norm_clipping", sent, weights=[1.0, 1.0, 2.0]) == pytest.approx(7 / 4)
    assert _combine("norm_clipping", [[1.0], [-50.0]]) == pytest.approx(0.0)
    assert _combine("norm_clipping", [[7.0]]) == pytest.approx(7.0)
    assert _combine("norm_clipping", [[1.0], [1.0], [5.0]], reference=1.0) == pytest.approx(1.0), "most did not move"


def test_median_and_trimmed_mean_by_hand() -> None:
    """Of 1, 2, 9 the middle is 2, of 1, 2, 4, 9 it is 3. Of 0, 1, 2, 3, 100 a fifth at each end leaves 1, 2, 3."""
    assert _combine("median", [[9.0], [1.0], [2.0]]) == pytest.approx(2.0)
    assert _combine("median", [[9.0], [1.0], [2.0], [4.0]]) == pytest.approx(3.0)
    assert _combine("trimmed_mean", [[0.0], [100.0], [1.0], [2.0], [3.0]]) == pytest.approx(2.0)
    assert _combine("trimmed_mean", [[0.0], [100.0], [5.0]], attacker_share=0.45) == pytest.approx(5.0)


def test_krum_by_hand() -> None:
    """N = 5, f = 1: two nearest count. 2 has 1 + 1 (to 1 and 3), 1 and 3 have 1 + 4, 6 has 9 + 16, 90 more.

    Multi-Krum keeps the best four: (1 + 2 + 3 + 6) / 4 = 3. Of equal scores the first sender is taken.
    """
    sent = [[1.0], [2.0], [3.0], [6.0], [90.0]]
    assert _combine("krum", sent) == pytest.approx(2.0)
    assert _combine("multi_krum", sent) == pytest.approx(3.0)
    assert _combine("krum", [[0.0], [1.0], [0.0], [1.0], [0.0], [1.0], [9.0]], attacker_share=0.1) == pytest.approx(0.0)


def test_bulyan_by_hand() -> None:
    """N = 7, f = 1: five are kept, of which the three nearest to their median count.

    -90 and 90 are never Krum's choice, so 1, 2, 3, 4, 5 are kept; the nearest to 3 are 2, 3, 4.
    """
    sent = [[-90.0], [1.0], [2.0], [3.0], [4.0], [5.0], [90.0]]
    assert _combine("bulyan", sent, attacker_share=0.1) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("name", "num_senders", "fallback"),
    [
        ("median", 2, "norm_clipping"),
        ("trimmed_mean", 2, "norm_clipping"),
        ("krum", 4, "trimmed_mean"),
        ("multi_krum", 6, "trimmed_mean"),
        ("krum", 2, "norm_clipping"),
        ("bulyan", 10, "multi_krum"),
        ("bulyan", 6, "trimmed_mean"),
        ("bulyan", 1, "norm_clipping"),
    ],
)
def test_with_too_few_senders_the_fallback_is_taken(name: str, num_senders: int, fallback: str) -> None:
    """Share 0.2: f is 1 up to 5 senders and 2 up to 10, so that 4 are fewer than 2 f + 3 and so are 6."""
    sent = np.random.default_rng(0).standard_normal((num_senders, 4))
    assert np.array_equal(_combine(name, sent), _combine(fallback, sent))


def test_attackers_are_rounded_up_and_a_share_that_is_exact_is_exact() -> None:
    assert [expected_attackers(0.2, number) for number in (1, 5, 6, 10, 15)] == [1, 1, 2, 2, 3]
    assert expected_attackers(0.0, 9) == 0


@pytest.mark.parametrize("name", ROBUST)
@given(num_senders=st.integers(1, 13), seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.1, 0.2, 0.4]))
@settings(max_examples=20, deadline=None)
def test_the_order_of_the_senders_does_not_matter(name: str, num_senders: int, seed: int, share: float) -> None:
    draws = np.random.default_rng(seed)
    sent, before = draws.standard_normal((num_senders, 3)), draws.standard_normal(3)
    one = _combine(name, sent, before, attacker_share=share)
    other = _combine(name, sent[draws.permutation(num_senders)], before, attacker_share=share)
    assert np.allclose(one, other, atol=1e-9)


@pytest.mark.parametrize("name", ROBUST)
@given(num_senders=st.integers(1, 13), value=st.floats(-100, 100), share=st.sampled_from([0.0, 0.2, 0.4]))
@settings(max_examples=20, deadline=None)
def test_equal_updates_are_their_mean(name: str, num_senders: int, value: float, share: float) -> None:
    sent = np.full((num_senders, 3), value)
    assert np.allclose(_combine(name, sent, 1.0, attacker_share=share), value, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in ROBUST if name != "norm_clipping"])
@given(
    num_senders=st.integers(3, 13), seed=st.integers(0, 999), size=st.sampled_from([1e2, 1e4, 1e8]), alike=st.booleans()
)
@settings(max_examples=30, deadline=None)
def test_attackers_do_not_move_the_result_out_of_the_honest_range(
    name: str, num_senders: int, seed: int, size: float, alike: bool
) -> None:
    """Breakdown: as many outliers as the aggregator is told of, anywhere and alike or apart, number by number."""
    draws = np.random.default_rng(seed)
    f = min(expected_attackers(0.2, num_senders), (num_senders - 1) // 2)
    honest = draws.standard_normal((num_senders - f, 4))
    bad = size * draws.standard_normal((1 if alike else f, 4)) + np.zeros((f, 1))
    sent = draws.permutation(np.concatenate([honest, bad]))
    found = _combine(name, sent)
    assert (found >= honest.min(0) - 1e-9).all()
    assert (found <= honest.max(0) + 1e-9).all()


@given(num_senders=st.integers(2, 13), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_norm_clipping_bounds_what_attackers_can_do(num_senders: int, seed: int) -> None:
    """The result is not further away than the longest honest change, however long the attackers' are."""
    draws = np.random.default_rng(seed)
    f = (num_senders - 1) // 2
    honest = draws.standard_normal((num_senders - f, 4))
    sent = np.concatenate([1e6 * draws.standard_normal((f, 4)), honest])
    assert np.linalg.norm(_combine("norm_clipping", sent)) <= np.linalg.norm(honest, axis=1).max() + 1e-9


def _owned(num_clients: int, num_rows: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Rows that clients own, each another part of the table, and what they send."""
    draws = np.random.default_rng(seed)
    owned = [np.sort(draws.choice(num_rows, draws.integers(1, num_rows), replace=False)) for _ in range(num_clients)]
    return [(torch.from_numpy(ids), torch.from_numpy(draws.standard_normal((len(ids), 4))).float()) for ids in owned]


@pytest.mark.parametrize("name", ROBUST)
def test_each_row_is_combined_over_those_who_own_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, previous = _owned(9, 30, 0), torch.randn(31, 4, generator=torch.Generator().manual_seed(0))
    table = CollectedRows(_make(name), 31)
    for ids, values in sent:
        table.add(ids, values)
    found = table.result(previous)
    for row in range(31):
        values = [own[ids == row][0] for ids, own in sent if bool((ids == row).any())]
        assert int(table.counts[row]) == len(values)
        expected = _combine(name, torch.stack(values), previous[row]) if values else previous[row].numpy()
        assert np.allclose(found[row].numpy(), expected, atol=1e-6)
    monkeypatch.setattr(collected, "_CHUNK_VALUES", 1)
    assert torch.equal(table.result(previous), found), "the size of a chunk decides nothing"


def test_modules_are_one_vector_per_client() -> None:
    """Krum takes all modules of one client: here of the second, whose vector is in the middle of the others'."""
    modules = CollectedModules(_make("krum", attacker_share=0.1))
    sent = [{"b": torch.full((2, 2), value), "a": torch.tensor([10 * value])} for value in (0.0, 2.0, 3.0, 1.0, 99.0)]
    for own in sent:
        modules.add(own, 0.2)
    found = modules.result({"b": torch.zeros(2, 2), "a": torch.zeros(1)})
    assert list(found) == ["b", "a"]
    assert any(all(torch.equal(found[name], own[name]) for name in own) for own in (sent[1], sent[3]))
    assert CollectedModules(_make("median")).result(sent[0]) is sent[0]


def _server_and_updates(**overrides: Any) -> tuple[InProcessRuntime, Callable[[], Server], list[ClientUpdate]]:
    """A server that can be opened anew, and the updates of three clients in round 1."""
    runtime = small_runtime({**MIXED, "federation.strategy": "mmfed3", "model.imputer": "mean", **overrides})
    server = runtime.server
    assert server is not None
    broadcast = server.begin_round(1)
    updates = [client.train(1, client.own_part(broadcast))[0] for client in runtime.clients.values()]

    def opened() -> Server:
        other = Server(server.config, server.strategy, len(server.global_model.entity), {"text": 12, "image": 8})
        for client in runtime.clients.values():
            other.register(client.hello())
        other.begin_round(1)
        return other

    return runtime, opened, [update for update in updates if update is not None]


@pytest.mark.parametrize("name", ["trimmed_mean", "multi_krum"])
@pytest.mark.parametrize("communication", [{}, {"communication.dtype": "float16"}])
def test_the_order_of_arrival_does_not_matter_to_the_bit(name: str, communication: dict[str, Any]) -> None:
    _, opened, updates = _server_and_updates(**{"federation.aggregator": name, **communication})
    states = []
    for order in itertools.permutations(updates):
        server = opened()
        for update in order:
            server.receive(update)
        assert server.finish_round().num_updates == 3
        states.append(server.state())
    for state in states[1:]:
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())


def test_the_server_combines_rows_modules_and_tokens() -> None:
    """Three copies of one client's rows and modules, of which one is far off, have the median of the other two."""
    runtime, opened, updates = _server_and_updates(
        **{"federation.aggregator": "median", "distillation.server_steps": 0}
    )
    server = opened()
    base, ids = updates[0], updates[0].entity_ids
    for client in runtime.clients:
        server.ownership[client] = ids
        assert base.tokens is not None
        off = 100.0 if client == 1 else 0.0
        modules = {name: value + off for name, value in base.modules.items()}
        num_triples = server.num_triples[client]
        tokens = base.tokens + off
        server.receive(
            replace(
                base, client=client, num_triples=num_triples, entity=base.entity + off, modules=modules, tokens=tokens
            )
        )
    server.finish_round()
    model = server.global_model
    assert torch.allclose(model.entity[ids], base.entity)
    assert all(torch.allclose(model.modules[name], value) for name, value in base.modules.items())
    assert model.prototypes is not None
    assert base.token_present is not None
    assert base.tokens is not None
    present = base.token_present[0]
    assert torch.allclose(model.prototypes.values[0, ids[present]], base.tokens[: int(present.sum())])
    assert model.prototypes.counts[0, ids[present]].tolist() == [3] * int(present.sum())


def test_the_mean_is_the_exact_one() -> None:
    runtime = small_runtime(MIXED)
    assert runtime.server is not None
    assert isinstance(runtime.server.sums.modules, ModuleMean)
    assert len(runtime.placement) == 1


def test_holding_all_updates_is_said() -> None:
    (_, line) = small_runtime({**MIXED, "federation.aggregator": "krum"}).placement
    assert line == "the server holds all updates of a round for federation.aggregator: its memory grows with the cohort"
    (_, line) = small_runtime({**MIXED, "robustness.max_norm_ratio": 9.0}).placement
    assert "for robustness.max_norm_ratio" in line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"federation.aggregator": "mode"}, "'federation.aggregator' = 'mode': unknown name; choose from mean, norm"),
        ({"federation.aggregator": "median", "federation.strategy": "pfedeg"}, "'pfedeg' mixes each client's rows"),
        ({"federation.aggregator": "median", "federation.strategy": "local"}, "has no use with .*'local'"),
        ({"adversary.attack": "noise", "federation.strategy": "central"}, "'adversary.attack' has no use"),
        ({"robustness.attacker_share": 0.5}, "robustness.attacker_share.*less than 0.5"),
        ({"robustness.clip_factor": 0.5}, "robustness.clip_factor.*greater than or equal to 1"),
    ],
)
def test_what_cannot_be_is_refused(overrides: dict[str, Any], message: str) -> None:
    def load() -> None:
        config = small_config(overrides)
        check_robustness(config, make_strategy(config))

    with pytest.raises(ConfigError, match=message):
        load()


def test_an_experiment_with_a_robust_aggregator_learns() -> None:
    runtime = InProcessRuntime(small_experiment({**MIXED, "federation.aggregator": "bulyan"}))
    losses = [runtime.train(number, [0, 1, 2]).reports[0].losses["total"] for number in (1, 2, 3)]
    assert losses[-1] < losses[0]
