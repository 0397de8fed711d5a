"""Differential privacy: bounds and noise by number, the accountant against another library, and whole runs."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from builders import write_tiny_dataset
from experiments import MIXED, all_values, generator, same_values, small_config, small_runtime
from fedsim import simulation
from fedsim.config import Config
from fedsim.dp_config import DifferentialPrivacyConfig
from fedsim.errors import ConfigError, RunError
from fedsim.federated import STRATEGIES
from fedsim.federated.aggregation import ModuleMean, RowMean
from fedsim.federated.messages import Broadcast, ClientUpdate, SoftQueries
from fedsim.federated.runtime import InProcessRuntime, make_strategy
from fedsim.federated.strategy import GlobalModel
from fedsim.privacy.accounting import PrivacyLedger, epsilon_of, make_ledger
from fedsim.privacy.differential_privacy import check_privacy, noise_scales, noised_model, privatise
from fedsim.results import SilentObserver
from fedsim.run_folder import RunFolder
from fedsim.simulation import sample_cohort
from runs import outcome
from runs import small_config as run_config

NUM_ROWS, DIM = 300, 8
QUIET = 1e-12  # a noise multiplier that leaves the clipped values
UNITS = ("client", "entity")


def _settings(**changes: Any) -> DifferentialPrivacyConfig:
    return DifferentialPrivacyConfig(**{"noise": "client", **changes})


def _messages(size: float = 1.0, num_rows: int = NUM_ROWS, *, whole: bool = True) -> tuple[ClientUpdate, Broadcast]:
    """Make an update whose numbers are of some size; `whole` has tokens of two modalities and soft queries too."""
    draws = generator(3)
    received = Broadcast(2, torch.randn(num_rows, DIM, generator=draws), {"w": torch.randn(5, generator=draws)}, None)
    entity = received.entity + size * torch.randn(num_rows, DIM, generator=draws)
    modules = {"w": received.modules["w"] + size * torch.randn(5, generator=draws)}
    update = ClientUpdate(0, 2, 77, torch.arange(num_rows), entity, modules, None, None, None)
    if not whole:
        return update, received
    present = torch.rand(2, num_rows, generator=draws) < 0.7
    tokens = torch.nn.functional.layer_norm(torch.randn(int(present.sum()), DIM, generator=draws), (DIM,))
    labels = torch.log_softmax(torch.randn(6, 4, generator=draws), 1)
    soft = SoftQueries(size * torch.randn(1, 6, DIM, generator=draws), torch.zeros(6, 4, dtype=torch.int64), labels)
    return replace(update, token_present=present, tokens=tokens, soft_queries=soft), received


def _changes(sent: ClientUpdate, received: Broadcast) -> tuple[Tensor, Tensor]:
    return sent.entity - received.entity, sent.modules["w"] - received.modules["w"]


@given(size=st.floats(1e-4, 1e4), bound=st.floats(1e-2, 1e2), unit=st.sampled_from(UNITS), num_rows=st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_nothing_that_is_sent_exceeds_its_bound(size: float, bound: float, unit: str, num_rows: int) -> None:
    """What comes out is within the bound, to the rounding of a sum with the rows received, and keeps its direction."""
    update, received = _messages(size, num_rows)
    chosen = _settings(unit=unit, clip_norm=bound, module_clip_norm=bound, query_clip_norm=bound, noise="server")
    sent = privatise(update, received, chosen, generator())
    rows, module = _changes(sent, received)
    before, _ = _changes(update, received)
    assert sent.soft_queries is not None
    norms = rows.norm() if unit == "client" else rows.norm(dim=1)
    assert bool((norms <= bound * (1 + 1e-5) + 1e-5).all())
    assert float(module.norm()) <= bound * (1 + 1e-5) + 1e-5
    assert bool((sent.soft_queries.queries.norm(dim=(0, 2)) <= bound * (1 + 1e-5)).all())
    cosine = torch.nn.functional.cosine_similarity(rows, before, dim=1)
    assert bool((cosine > 0.99).logical_or(rows.norm(dim=1) < 1e-3).all())


def test_what_is_within_the_bounds_is_sent_as_it_is() -> None:
    update, received = _messages(1e-3)
    sent = privatise(update, received, _settings(clip_norm=10.0, noise_multiplier=QUIET), generator())
    assert torch.allclose(sent.entity, update.entity, atol=1e-6)
    assert torch.allclose(sent.modules["w"], update.modules["w"], atol=1e-6)
    assert sent.tokens is not None
    assert update.tokens is not None
    assert torch.allclose(sent.tokens, update.tokens, atol=1e-4)
    assert sent.soft_queries is not None
    assert update.soft_queries is not None
    assert torch.allclose(sent.soft_queries.log_labels, update.soft_queries.log_labels, atol=1e-4)


def test_a_client_does_not_say_how_many_triples_it_has() -> None:
    update, received = _messages()
    assert privatise(update, received, _settings(), generator()).num_triples == 1


@pytest.mark.parametrize(
    ("unit", "whole", "of_rows", "of_modules"),
    [
        ("client", True, math.sqrt(5) * 2, math.sqrt(5) * 3),
        ("client", False, math.sqrt(2) * 2, math.sqrt(2) * 3),
        ("entity", True, math.sqrt(2) * 2, 3.0),
        ("entity", False, 2.0, 3.0),
    ],
)
def test_noise_is_z_sqrt_parts_times_the_bound(unit: str, whole: bool, of_rows: float, of_modules: float) -> None:
    """Bounds are 2 for rows and 3 for modules, z is 0.5.

    A client's message has five parts (rows, modules, tokens, query vectors, labels) or two; an entity has a row and its
    tokens, or a row alone; modules are a unit by themselves. The standard deviation over 2,400 numbers is within 5 %.
    """
    update, received = _messages(0.0, whole=whole)
    chosen = _settings(unit=unit, clip_norm=2.0, module_clip_norm=3.0, noise_multiplier=0.5)
    assert noise_scales(chosen, update) == pytest.approx((of_rows, of_modules))
    rows, _ = _changes(privatise(update, received, chosen, generator()), received)
    assert float(rows.std()) == pytest.approx(0.5 * of_rows, rel=0.05)
    modules = [_changes(privatise(update, received, chosen, generator(seed)), received)[1] for seed in range(200)]
    assert float(torch.stack(modules).std()) == pytest.approx(0.5 * of_modules, rel=0.1)


@pytest.mark.parametrize("unit", UNITS)
def test_tokens_and_labels_keep_their_form_under_noise(unit: str) -> None:
    update, received = _messages()
    sent = privatise(update, received, _settings(unit=unit, noise_multiplier=3.0), generator())
    assert sent.tokens is not None
    assert sent.soft_queries is not None
    assert torch.allclose(sent.tokens.mean(1), torch.zeros(len(sent.tokens)), atol=1e-5)
    assert torch.allclose(sent.tokens.square().mean(1), torch.ones(len(sent.tokens)), atol=1e-3)
    assert torch.allclose(sent.soft_queries.log_labels.exp().sum(1), torch.ones(6), atol=1e-5)
    assert update.tokens is not None
    alike = torch.nn.functional.cosine_similarity(sent.tokens, update.tokens, dim=1)
    assert float(alike.mean()) < 0.5  # they were noised


def test_server_noise_by_hand() -> None:
    """Two clients own row 0, one owns row 1, nobody row 2; both are expected at a rate of 0.5.

    Client 0 moves row 0 by 3, clipped to 1 in all; client 1 is away. Row 0 moves by 1 / (0.5 * 2) = 1, and the module,
    moved by 4 and clipped to 2, by 2 / (0.5 * 2) = 2.
    """
    changes = {"privacy.noise": "server", "federation.strategy": "fede", "federation.cohort_fraction": 0.5}
    config = small_config({**changes, "privacy.module_clip_norm": 2.0, "privacy.noise_multiplier": QUIET})
    old = GlobalModel(torch.tensor([[5.0, 0.0], [7.0, 0.0], [9.0, 0.0]]), {"w": torch.tensor([1.0])}, None)
    received = Broadcast(1, old.entity[:1], old.modules, None)
    moved = ClientUpdate(
        0, 1, 1, torch.tensor([0]), torch.tensor([[8.0, 0.0]]), {"w": torch.tensor([5.0])}, *[None] * 3
    )
    update = privatise(moved, received, config.privacy, generator())
    rows, modules = RowMean(3, 2), ModuleMean()
    rows.add(update.entity_ids, update.entity)
    modules.add(update.modules, 0.5)
    ownership = {0: torch.tensor([0]), 1: torch.tensor([0, 1])}
    entity, made = noised_model(config, rows, modules, old, ownership, generator())
    assert entity[:, 0].tolist() == pytest.approx([6.0, 7.0, 9.0], abs=1e-5)
    assert float(made["w"]) == pytest.approx(3.0, abs=1e-5)


def test_server_noise_is_on_every_owned_row_even_if_nobody_came() -> None:
    """With z 0.5, bound 2 and two parts, 0.5 * sqrt(2) * 2 over an expected 0.5 owners is 2.83.

    The modules' 0.5 * sqrt(2) * 1, over a rate of 0.5, is 1.41 with one client.
    """
    changes = {"privacy.noise": "server", "privacy.clip_norm": 2.0, "privacy.noise_multiplier": 0.5}
    config = small_config({**changes, "federation.strategy": "fede", "federation.cohort_fraction": 0.5})
    old = GlobalModel(torch.zeros(NUM_ROWS, DIM), {"w": torch.zeros(2000)}, None)
    owned = {0: torch.arange(NUM_ROWS - 1)}
    entity, modules = noised_model(config, RowMean(NUM_ROWS, DIM), ModuleMean(), old, owned, generator())
    assert float(entity[:-1].std()) == pytest.approx(math.sqrt(2) * 2, rel=0.05)
    assert bool((entity[-1] == 0).all())
    assert float(modules["w"].std()) == pytest.approx(math.sqrt(2), rel=0.05)


def test_epsilon_of_the_gaussian_mechanism_solves_its_equation() -> None:
    """Balle and Wang 2018: delta = Phi(1/2s - es) - e^e Phi(-1/2s - es); four uses at z = 2 are one at s = 1."""
    epsilon = epsilon_of(2.0, 1.0, 4, 1e-5)

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    assert phi(0.5 - epsilon) - math.exp(epsilon) * phi(-0.5 - epsilon) == pytest.approx(1e-5, rel=1e-6)
    assert epsilon == pytest.approx(epsilon_of(1.0, 1.0, 1, 1e-5))


@pytest.mark.parametrize(("noise_multiplier", "rate", "rounds"), [(1.0, 0.1, 30), (0.8, 0.5, 10)])
def test_epsilon_agrees_with_another_library(noise_multiplier: float, rate: float, rounds: int) -> None:
    """Opacus' numerical accountant of privacy random variables (Gopi et al. 2021) bounds it from above within 1e-3."""
    accountants = pytest.importorskip("opacus.accountants.prv")
    other = accountants.PRVAccountant()
    other.history = [(noise_multiplier, rate, rounds)]
    expected = other.get_epsilon(1e-5, eps_error=5e-4, delta_error=1e-10)
    assert epsilon_of(noise_multiplier, rate, rounds, 1e-5) == pytest.approx(expected, abs=1e-3)


def test_sampling_lowers_epsilon_and_rounds_raise_it() -> None:
    assert epsilon_of(1.0, 0.1, 5, 1e-5) < epsilon_of(1.0, 0.1, 10, 1e-5) < epsilon_of(1.0, 1.0, 10, 1e-5)
    assert epsilon_of(1.0, 0.5, 0, 1e-5) == 0


def test_with_noise_at_the_clients_the_busiest_one_counts() -> None:
    """Client 2 takes part in rounds 1, 2 and 4: one, two, two and three releases."""
    config = small_config({"privacy.noise": "client", "federation.num_rounds": 4})
    cohorts = {1: [0, 2], 2: [2], 3: [1], 4: [1, 2]}
    ledger = make_ledger(config, [0, 1, 2], cohorts.__getitem__)
    assert ledger is not None
    assert ledger.releases == [1, 2, 2, 3]
    assert ledger.epsilon(3) == ledger.epsilon(2) < ledger.epsilon(4)


@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_the_last_round_is_the_last_one_within_the_budget(rate: float) -> None:
    budget = epsilon_of(1.0, rate, 7, 1e-5) + 1e-6
    ledger = PrivacyLedger(_settings(max_epsilon=budget), range(1, 13), rate)
    assert ledger.last_round == 7
    assert ledger.epsilon(7) <= budget < ledger.epsilon(8)
    assert "after round 7 of 12" in (ledger.stop_message() or "")
    assert PrivacyLedger(_settings(max_epsilon=1e6), range(1, 13), rate).stop_message() is None


def test_a_budget_that_allows_no_round_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"privacy.max_epsilon' = 0.1: round 1 alone spends 4\.\d+; raise it"):
        PrivacyLedger(_settings(max_epsilon=0.1), range(1, 4), 1.0)


def test_each_client_joins_a_cohort_on_its_own() -> None:
    """Rates 0.3 over 400 rounds, standard error 0.023; pairs together at 0.09, standard error 0.014.

    Another client beside them changes nobody's rounds; a fixed size would.
    """
    config = small_config({"privacy.noise": "server", "federation.strategy": "fede", "federation.cohort_fraction": 0.3})
    rounds = [set(sample_cohort(config, [0, 1, 2], number)) for number in range(1, 401)]
    for client in range(3):
        assert sum(client in cohort for cohort in rounds) / 400 == pytest.approx(0.3, abs=0.08)
    assert sum({0, 1} <= cohort for cohort in rounds) / 400 == pytest.approx(0.09, abs=0.05)
    assert set() in rounds
    more = [set(sample_cohort(config, [0, 1, 2, 3], number)) for number in range(1, 401)]
    assert [cohort - {3} for cohort in more] == rounds


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"federation.strategy": "local"}, "they send nothing"),
    ({"federation.strategy": "central"}, "they send nothing"),
    ({"communication.top_k": 0.5}, "communication.top_k"),
    ({"privacy.noise": "server", "federation.cohort_size": 1}, "federation.cohort_fraction instead"),
    ({"privacy.noise": "server", "participation.availability": 0.5}, "'participation'"),
    (
        {"privacy.noise": "server", "participation.over_selection": 1.5, "federation.cohort_fraction": 0.5},
        "'participation'",
    ),
    ({"privacy.noise": "server", "federation.strategy": "pfedeg"}, "a table of its own"),
    ({"privacy.noise": "server", "federation.strategy": "mmfed3"}, "distillation.send_prototypes"),
    ({"privacy.noise": "server", "federation.aggregator": "median"}, "federation.aggregator"),
    ({"privacy.noise": "server", "robustness.max_norm_ratio": 3.0}, "robustness.max_norm_ratio"),
    (
        {"privacy.noise": "server", "secure_aggregation.enabled": True, "federation.cohort_fraction": 0.5},
        "secure aggregation needs two",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_breaks_the_guarantee_is_refused(changes: dict[str, Any], message: str) -> None:
    config = small_config({"federation.strategy": "fede", "privacy.noise": "client", **changes})
    with pytest.raises(ConfigError, match=message):
        check_privacy(config, make_strategy(config))


def test_a_budget_without_noise_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set privacy.noise to client or server"):
        small_config({"privacy.max_epsilon": 3.0})


def _trained(strategy: str, **changes: Any) -> InProcessRuntime:
    runtime = small_runtime({"federation.strategy": strategy, **MIXED, **changes})
    for round_num in (1, 2):
        runtime.train(round_num, list(runtime.clients))
    return runtime


FEDERATED = [name for name in STRATEGIES if name not in ("local", "central")]
EXCHANGED_ALIKE = {"distillation.server_steps": 0, "privacy.clip_norm": 1e6, "privacy.module_clip_norm": 1e6}


@pytest.mark.parametrize("strategy", FEDERATED)
def test_every_strategy_trains_under_noise_and_is_repeated_to_the_bit(strategy: str) -> None:
    changes = {"privacy.noise": "client", "privacy.noise_multiplier": 0.01}
    once = all_values(_trained(strategy, **changes))
    assert same_values(once, all_values(_trained(strategy, **changes)))
    assert all(bool(torch.isfinite(value).all()) for value in once.values())
    plain = all_values(_trained(strategy))
    name = "server/entity"
    assert not torch.allclose(once[name], plain[name], atol=1e-3)


@pytest.mark.parametrize("who", ["client", "server"])
def test_without_noise_and_bounds_the_federation_is_that_without_privacy(who: str) -> None:
    """Clients of one size in triples weigh alike in both; what is left is rounding."""
    changes = {"model.imputer": "zero", "model.fusion": "none", **EXCHANGED_ALIKE}
    plain = all_values(_trained("fede", **changes))
    quiet = all_values(_trained("fede", **changes, **{"privacy.noise": who, "privacy.noise_multiplier": QUIET}))
    assert plain.keys() == quiet.keys()
    for name, value in plain.items():
        assert torch.allclose(value.float(), quiet[name].float(), atol=2e-3), name


def test_a_stack_of_clients_sends_what_each_sends_alone() -> None:
    changes = {"privacy.noise": "client", "model.imputer": "zero"}
    together = all_values(_trained("fede", **changes, **{"runtime.clients_per_batch": 3}))
    alone = all_values(_trained("fede", **changes, **{"runtime.clients_per_batch": 1}))
    assert torch.allclose(together["server/entity"], alone["server/entity"], atol=1e-3)


def _config(folder: Path, output: str, num_rounds: int = 4, **changes: Any) -> Config:
    if not (folder / "data").exists():
        write_tiny_dataset(folder / "data")
    fixed = {"federation__strategy": "fede", "model__imputer": "zero", "privacy__noise_multiplier": 2.0}
    return run_config(folder / "data", folder / output, num_rounds, **{**fixed, **changes})


class _Listener(SilentObserver):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def test_a_run_stops_before_its_budget_and_ends_as_a_finished_one(tmp_path: Path) -> None:
    """Two rounds at z = 2 spend 3.0, three 3.8: the third is not begun."""
    listener = _Listener()
    result = simulation.run(
        _config(tmp_path, "run", privacy__noise="client", privacy__max_epsilon=3.5, evaluation__every=4),
        observer=listener,
    )
    rows = [row for row in RunFolder(tmp_path / "run").read_metrics() if row["client"] is None]
    assert [row["round"] for row in rows] == [1, 2]
    assert rows[-1]["privacy"]["epsilon"] == pytest.approx(epsilon_of(2.0, 1.0, 2, 1e-5))
    assert result.privacy is not None
    assert result.privacy.epsilon == rows[-1]["privacy"]["epsilon"] <= 3.5
    assert any("stopped after round 2 of 4" in line for line in listener.lines)
    assert (tmp_path / "run" / "result.json").is_file()


def test_an_empty_cohort_is_a_round_with_noise(tmp_path: Path) -> None:
    """At a rate of 0.05 hardly any round has a client, and each moves the model."""
    config = _config(tmp_path, "run", 3, privacy__noise="server", federation__cohort_fraction=0.05)
    listener = _Listener()
    simulation.run(config, observer=listener)
    rows = [row for row in RunFolder(tmp_path / "run").read_metrics() if row["client"] is None]
    assert 0 in [row["num_trained"] for row in rows]
    assert not any("skipped" in line for line in listener.lines)
    spent = [row["privacy"]["epsilon"] for row in rows]
    assert spent == sorted(spent)
    assert spent[0] > 0


def test_a_resumed_run_goes_on_with_the_epsilon_that_was_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"privacy__noise": "server", "federation__cohort_fraction": 0.6}
    simulation.run(_config(tmp_path, "whole", **changes))
    train = InProcessRuntime.train

    def failing(self: InProcessRuntime, round_num: int, cohort: Any) -> Any:
        if round_num == 3:
            raise RunError("cut off")
        return train(self, round_num, cohort)

    monkeypatch.setattr(InProcessRuntime, "train", failing)
    with pytest.raises(RunError, match="cut off"):
        simulation.run(_config(tmp_path, "broken", **changes))
    monkeypatch.undo()
    file = tmp_path / "broken" / "config.yaml"
    text = file.read_text()
    file.write_text(text.replace("noise_multiplier: 2.0", "noise_multiplier: 3.0"))
    with pytest.raises(RunError, match="privacy"):
        simulation.resume(tmp_path / "broken")
    file.write_text(text)
    simulation.resume(tmp_path / "broken")
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
