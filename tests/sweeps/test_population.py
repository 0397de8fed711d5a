"""Weights that change in a running federation: a run that continues another one with other weights hides nothing."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from builders import write_tiny_dataset
from fedsim import simulation
from fedsim.config import Config, dump_config, load_config, make_config
from fedsim.errors import ConfigError, RunError
from fedsim.run_folder import RunFolder
from runs import outcome, small_config
from tune.population import finish_fork, fork, forked_config, make_population, snapshot, weights_at
from tune.search_space import parse_space

SPACE = parse_space(
    {
        "space": {
            "distillation.logit_to_client": [0.5, 2.0],
            "distillation.feature_to_client, distillation.feature_to_global": [0.1, 1.0],
        }
    },
    "space",
)
NEW = {"distillation.logit_to_client": 0.5, "distillation.feature_to_client, distillation.feature_to_global": 1.0}
NUM_ROUNDS = 5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def make(dataset: Path) -> Callable[..., Config]:
    def made(output: Path, **changes: Any) -> Config:
        return small_config(dataset, output, NUM_ROUNDS, data__num_clients=2, checkpoint__keep=9, **changes)

    return made


def test_weights_hold_from_their_round_on() -> None:
    changes = [{"from_round": 3, "logit_to_client": 1.5}, {"from_round": 5, "feature_to_client": 0.0}]
    weights = make_config({}, {"distillation.schedule": changes}).distillation
    found = [(weights.at(n).logit_to_client, weights.at(n).feature_to_client) for n in (1, 2, 3, 4, 5, 99)]
    assert found == [(2.0, 0.1), (2.0, 0.1), (1.5, 0.1), (1.5, 0.1), (1.5, 0.0), (1.5, 0.0)]
    assert weights.ever_positive("feature_to_client")
    assert not weights.at(5).model_copy(update={"schedule": ()}).ever_positive("feature_to_client")


def test_a_schedule_is_written_as_it_is_read(tmp_path: Path) -> None:
    config = make_config({}, {"distillation.schedule": [{"from_round": 3, "logit_to_client": 1.5}]})
    for comments in (True, False):
        (tmp_path / "config.yaml").write_text(dump_config(config, comments=comments))
        assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("rounds", [[4, 3], [3, 3], [1]])
def test_a_schedule_goes_forward(rounds: list[int]) -> None:
    with pytest.raises(ConfigError, match="from_round"):
        make_config({}, {"distillation.schedule": [{"from_round": number} for number in rounds]})


def test_a_continued_run_is_to_the_bit_a_run_with_the_schedule_from_its_start(
    make: Callable[..., Config], tmp_path: Path
) -> None:
    simulation.run(make(tmp_path / "first"))
    snapshot(RunFolder(tmp_path / "first"), 3, tmp_path / "kept")
    config = forked_config(load_config(tmp_path / "kept" / "config.yaml"), SPACE, NEW, 3)
    assert [change.from_round for change in config.distillation.schedule] == [4]
    assert weights_at(config, 4, SPACE) == NEW
    assert weights_at(config, 3, SPACE) == weights_at(make(tmp_path), 1, SPACE)
    fork(tmp_path / "kept", tmp_path / "second", config.model_copy(update={"output": str(tmp_path / "second")}))
    simulation.resume(tmp_path / "second")
    simulation.run(config.model_copy(update={"output": str(tmp_path / "third")}))
    assert outcome(tmp_path / "second") == outcome(tmp_path / "third")
    last = {
        name: [
            path.read_bytes()
            for path in sorted(RunFolder(tmp_path / name).checkpoint(NUM_ROUNDS).glob("*.safetensors"))
        ]
        for name in ("first", "second", "third")
    }
    assert last["second"] == last["third"]
    assert last["second"] != last["first"]
    # The schedule changes nothing before its round.
    first, third = (RunFolder(tmp_path / name).read_metrics() for name in ("first", "third"))
    before, after = ([row.get("valid") for row in rows if row["round"] <= 3] for rows in (first, third))
    assert before == after


def test_a_snapshot_lasts_when_its_run_goes_on(make: Callable[..., Config], tmp_path: Path) -> None:
    config = make(tmp_path / "run").model_copy(
        update={"checkpoint": make_config({}, {"checkpoint.keep": 1}).checkpoint}
    )
    kept: list[bytes] = []

    class Snap(simulation.SilentObserver):
        def round_finished(self, summary: Any) -> None:
            if summary.round_num == 2:
                snapshot(RunFolder(tmp_path / "run"), 2, tmp_path / "kept")
                kept.extend(path.read_bytes() for path in sorted((tmp_path / "kept").rglob("*.safetensors")))

    simulation.run(config, observer=Snap())
    assert kept
    assert [path.read_bytes() for path in sorted((tmp_path / "kept").rglob("*.safetensors"))] == kept
    assert {row["round"] for row in RunFolder(tmp_path / "kept").read_metrics()} == {1, 2}


def test_a_second_change_forgets_what_comes_after_its_round() -> None:
    config = make_config({}, {"distillation.schedule": [{"from_round": 3, "logit_to_client": 1.0}]})
    assert forked_config(config, SPACE, weights_at(config, 99, SPACE), 6) == config
    later = forked_config(config, SPACE, NEW, 6)
    assert [change.from_round for change in later.distillation.schedule] == [3, 7]
    earlier = forked_config(later, SPACE, NEW | {"distillation.logit_to_client": 2.0}, 2)
    assert [change.from_round for change in earlier.distillation.schedule] == [3]


def test_a_config_that_would_change_past_rounds_is_refused(make: Callable[..., Config], tmp_path: Path) -> None:
    simulation.run(make(tmp_path / "run"))
    snapshot(RunFolder(tmp_path / "run"), 3, tmp_path / "kept")
    with pytest.raises(RunError, match="was run with another config up to round 3"):
        fork(tmp_path / "kept", tmp_path / "other", make(tmp_path / "other", training__learning_rate=0.5))
    early = make(tmp_path / "other", distillation__schedule=[{"from_round": 3, "logit_to_client": 0.5}])
    with pytest.raises(RunError, match="was run with another config up to round 3"):
        fork(tmp_path / "kept", tmp_path / "other", early)
    assert not (tmp_path / "other").exists()


def test_an_interrupted_fork_leaves_the_old_run(tmp_path: Path) -> None:
    (tmp_path / ".run.old").mkdir()
    (tmp_path / ".run.old" / "config.yaml").write_text("old")
    finish_fork(tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_text() == "old"


class _Member:
    """As much of Tune's trial as the scheduler looks at."""

    def __init__(self, number: int) -> None:
        self.trial_id, self.experiment_tag, self.status = str(number), "", "PAUSED"
        self.config: dict[str, Any] = {}


def test_members_that_waited_for_one_that_ended_go_on() -> None:
    """Two wait in round 4 for the third, which fails: no result would wake them."""
    population = make_population(SPACE, interval=2)
    members = [_Member(number) for number in range(3)]
    for member, round_num in zip(members, (4, 4, 2), strict=True):
        population._trial_state[member] = SimpleNamespace(last_train_time=round_num)  # type: ignore[index,assignment]
    population._next_perturbation_sync = 4
    members[2].status = "ERROR"
    controller: Any = SimpleNamespace(get_live_trials=lambda: members[:2], get_trials=lambda: members)
    assert population.choose_trial_to_run(controller) is None
    population.on_trial_error(controller, members[2])  # type: ignore[arg-type]
    assert population.choose_trial_to_run(controller) is members[0]


def test_a_member_that_copies_another_keeps_its_name() -> None:
    population = make_population(SPACE, interval=2)
    values = {item.name: item.values[0] for item in SPACE.parameters}
    one, other = _Member(1), _Member(2)
    for member in (one, other):
        member.config = {"trial": {"id": member.trial_id, "params": values}}
    config, _ = population._get_new_config(one, other)  # type: ignore[arg-type]
    assert config["trial"]["id"] == "1"
    assert other.config["trial"]["id"] == "2"


def test_changed_weights_stay_in_their_range() -> None:
    space = parse_space({"space": {"distillation.logit_to_client": {"uniform": [1.0, 2.0]}}}, "space")
    explore = make_population(space, interval=2)._custom_explore_fn
    found = [
        explore({"trial": {"params": {"distillation.logit_to_client": value}}}) for value in (0.8, 1.23456789, 2.4)
    ]
    assert [item["trial"]["params"]["distillation.logit_to_client"] for item in found] == [1.0, 1.23457, 2.0]
