"""Simulated participation: the schedule by hand, its purity, what is refused, and whole runs on the virtual clock."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from builders import tiny_graph
from experiments import small_config, small_experiment
from fedsim import simulation
from fedsim.data.dataset import save_dataset
from fedsim.errors import ConfigError, DataError, RunError
from fedsim.federated.participation import (
    ClientWork,
    Schedule,
    cohort_size,
    draw_availability,
    draw_slowness,
    make_schedule,
)
from fedsim.federated.trace_file import TraceRow, read_trace
from fedsim.federation_config import ParticipationConfig
from fedsim.report.console import show_result
from fedsim.results import SilentObserver
from fedsim.run_folder import RunFolder

CLIENTS = list(range(6))


def _schedule(num_rounds: int = 4, steps: dict[int, int] | None = None, **settings: Any) -> Schedule:
    """Six clients; client c takes c + 1 steps of one virtual second, and has no bytes."""
    steps = steps or {client: client + 1 for client in CLIENTS}
    federation = {name: settings.pop(name) for name in list(settings) if name in ("cohort_size", "seed")}
    seed = federation.pop("seed", 0)
    paths = {"federation.num_rounds": num_rounds, "seed": seed, "participation.seconds_per_step": 1.0}
    paths |= {f"federation.{name}": value for name, value in federation.items()}
    config = small_config(paths | {f"participation.{name}": value for name, value in settings.items()})
    nothing = np.zeros(num_rounds, dtype=np.int64)
    return Schedule(config, {client: ClientWork(number, nothing) for client, number in steps.items()})


def test_a_round_by_hand() -> None:
    """All six are asked and arrive after 1, 2, ..., 6 s; the deadline of 4.5 s leaves 0 to 3, a cohort of 3 drops 3.

    The cohort is full when its third client arrives, at 3 s.
    """
    plan = _schedule(cohort_size=3, over_selection=2.0, deadline_seconds=4.5).plan(2)
    assert (plan.num_available, plan.num_selected) == (6, 6)
    assert (plan.cohort, plan.dropped, plan.late) == ([0, 1, 2], [3], [4, 5])
    assert (plan.virtual_seconds, plan.total_seconds) == (3.0, 6.0)


def test_a_cohort_that_is_not_full_waits_for_the_deadline_and_one_without_a_deadline_for_the_last() -> None:
    short = _schedule(deadline_seconds=4.5).plan(1)
    assert (short.cohort, short.late, short.virtual_seconds) == ([0, 1, 2, 3], [4, 5], 4.5)
    assert _schedule(min_clients=2).plan(1).virtual_seconds == 6.0


def test_bytes_and_slowness_make_the_time() -> None:
    """10 steps of 0.5 s at half the speed are 10 s; 3000 bytes at 1500 per second are 2 s more."""
    config = small_config(
        {
            "federation.num_rounds": 2,
            "participation.seconds_per_step": 0.5,
            "participation.bytes_per_second": 1500.0,
            "participation.slowness_spread": 1.0,
        }
    )
    work = {3: ClientWork(10, np.array([3000, 0]))}
    slowness = float(draw_slowness(config.participation, config.seed, [3], 2)[0, 0])
    schedule = Schedule(config, work)
    assert slowness != 1.0
    assert schedule.plan(1).virtual_seconds == pytest.approx(5 * slowness + 2)
    assert schedule.plan(2).virtual_seconds == pytest.approx(5 * slowness)
    assert schedule.plan(2).total_seconds == pytest.approx(10 * slowness + 2)


def test_equal_arrivals_are_kept_in_the_order_of_ids() -> None:
    plan = _schedule(steps=dict.fromkeys(CLIENTS, 4), cohort_size=2, over_selection=3.0).plan(1)
    assert (plan.cohort, plan.dropped) == ([0, 1], [2, 3, 4, 5])


def test_full_availability_samples_as_without_simulation() -> None:
    schedule = _schedule(num_rounds=20, cohort_size=2, min_clients=2)
    config = small_config({"federation.cohort_size": 2})
    cohorts = [schedule.plan(round_num).cohort for round_num in range(1, 21)]
    assert cohorts == [simulation.sample_cohort(config, CLIENTS, round_num) for round_num in range(1, 21)]


def test_a_schedule_is_pure_and_longer_runs_begin_alike() -> None:
    settings: dict[str, Any] = {
        "availability": 0.6,
        "mean_outage_rounds": 2.0,
        "slowness_spread": 0.8,
        "slowness_jitter": 0.3,
        "cohort_size": 2,
        "over_selection": 1.5,
        "deadline_seconds": 6.0,
        "too_few": "skip",
    }
    short, again, long = (_schedule(num_rounds, **settings) for num_rounds in (8, 8, 20))
    assert short.rounds == again.rounds
    assert long.rounds[:8] == short.rounds
    assert _schedule(8, seed=1, **settings).rounds != short.rounds


def test_availability_has_the_asked_share_and_outage_length() -> None:
    """400 clients x 500 rounds: the share within 0.01 and the mean outage within 0.2 of what was asked."""
    settings = ParticipationConfig(availability=0.7, mean_outage_rounds=4.0)
    up = draw_availability(settings, 0, list(range(400)), 500)
    assert up.mean() == pytest.approx(0.7, abs=0.01)
    ends = up[:, 1:] & ~up[:, :-1]
    assert (~up).sum() / ends.sum() == pytest.approx(4.0, abs=0.2)
    alone = draw_availability(ParticipationConfig(availability=0.7), 0, list(range(400)), 500)
    returns = alone[:, 1:][~alone[:, :-1]]
    assert returns.mean() == pytest.approx(0.7, abs=0.01), "independent rounds: as likely after an outage as ever"


def test_slowness_is_lognormal_between_clients_and_rounds() -> None:
    logs = np.log(draw_slowness(ParticipationConfig(slowness_spread=0.5, slowness_jitter=0.2), 0, list(range(500)), 40))
    own = logs.mean(1)
    assert own.mean() == pytest.approx(0.0, abs=0.08)
    assert own.std() == pytest.approx(0.5, abs=0.05)
    assert (logs - own[:, None]).std() == pytest.approx(0.2, abs=0.01)
    assert (draw_slowness(ParticipationConfig(), 0, [0, 1], 3) == 1).all()


def test_too_few_clients_stop_the_run_before_it_starts() -> None:
    with pytest.raises(RunError) as caught:
        _schedule(deadline_seconds=2.5, min_clients=3)
    assert str(caught.value) == (
        "round 1: 2 client(s) would take part (6 of 6 available, 6 selected, 4 later than "
        "participation.deadline_seconds 2.5), fewer than participation.min_clients 3; raise the deadline, the "
        "availability or participation.over_selection, or lower min_clients, or set participation.too_few to skip"
    )


def test_too_few_clients_may_skip_a_round(tmp_path: Path) -> None:
    """All but client 1 are down in round 2: it was in time for nothing."""
    rows = [f"{client},2,0\n{client},3,1" for client in CLIENTS if client != 1]
    trace = tmp_path / "trace.csv"
    trace.write_text("client,round,available\n" + "\n".join(rows) + "\n")
    settings: dict[str, Any] = {"trace_file": str(trace), "min_clients": 2}
    with pytest.raises(RunError, match=r"^round 2: 1 client\(s\) would take part \(1 of 6 available, 1 selected"):
        _schedule(**settings)
    schedule = _schedule(**settings, too_few="skip")
    assert [len(plan.cohort) for plan in schedule.rounds] == [6, 0, 6, 6]
    assert (schedule.plan(2).dropped, schedule.plan(2).virtual_seconds) == ([1], 2.0)
    assert schedule.plan(4).total_seconds == 6 + 2 + 6 + 6


def test_a_deadline_that_nobody_meets_is_refused() -> None:
    with pytest.raises(RunError, match=r"round 1: 0 client\(s\) would take part .* participation.deadline_seconds 0.5"):
        _schedule(deadline_seconds=0.5)
    with pytest.raises(RunError, match=r"leaves no round to train: 0 client\(s\) would take part"):
        _schedule(deadline_seconds=0.5, too_few="skip")


def test_more_clients_than_a_cohort_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'participation.min_clients' = 3, but a cohort has 2"):
        _schedule(cohort_size=2, min_clients=3)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"availability": 0.0}, "participation.availability"),
        ({"deadline_seconds": 0}, "participation.deadline_seconds"),
        ({"over_selection": 0.9}, "participation.over_selection"),
        ({"over_selection": 1.5}, "set federation.cohort_size or federation.cohort_fraction"),
        ({"min_clients": 0}, "participation.min_clients"),
        ({"too_few": "wait"}, "'stop' or 'skip'"),
        ({"availability": 0.2, "mean_outage_rounds": 2}, "availability 0.2: give at least 4"),
        ({"mean_outage_rounds": 2}, "availability 1: nobody is away"),
        ({"trace_file": "t.csv", "availability": 0.5}, "or trace_file out"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small_config({f"participation.{name}": value for name, value in settings.items()})
    assert part in str(caught.value)


def test_a_trace_holds_until_the_next_row(tmp_path: Path) -> None:
    """Client 5 is down from round 2 to 3; client 0 has a third of the speed from round 3 on: 1 step takes 3 s."""
    trace = tmp_path / "trace.csv"
    trace.write_text("client,round,available,speed\n5,4,1,1\n5,2,0,1\n\n0,3,1,0.125\n0,99,0,1\n")
    schedule = _schedule(trace_file=str(trace))
    assert [plan.cohort for plan in schedule.rounds] == [CLIENTS, CLIENTS[:5], CLIENTS[:5], CLIENTS]
    assert [plan.virtual_seconds for plan in schedule.rounds] == [6.0, 5.0, 8.0, 8.0]
    assert read_trace(trace, CLIENTS)[5] == [TraceRow(2, False, 1.0), TraceRow(4, True, 1.0)]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "line 1: the header must be client,round,available"),
        ("client,round,up\n", "line 1: the header must be"),
        ("client,round,available\n", "no row below the header"),
        ("client,round,available\n0,1,1\n9,1,1\n", "line 3: client 9 is none of the run's clients 0 to 5"),
        ("client,round,available\n0,1\n", "line 2: 2 values instead of 3"),
        ("client,round,available\n0,one,1\n", "line 2: round 'one' is not a whole number"),
        ("client,round,available\n0,0,1\n", "line 2: round 0 is not one"),
        ("client,round,available\n0,1,yes\n", "line 2: available 'yes' must be 1 (up) or 0 (down)"),
        ("client,round,available,speed\n0,1,1,-2\n", "line 2: speed '-2' must be a number above 0"),
        ("client,round,available,speed\n0,1,1,fast\n", "line 2: speed 'fast' must be"),
        ("client,round,available\n0,1,1\n1,1,1\n0,1,0\n", "line 4: client 0, round 1 stands in line 2 already"),
    ],
)
def test_a_bad_trace_names_file_and_line(text: str, part: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(text)
    with pytest.raises(DataError) as caught:
        read_trace(trace, CLIENTS)
    assert str(caught.value).startswith(str(trace))
    assert part in str(caught.value)


def test_a_trace_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing, binary = tmp_path / "none.csv", tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"'participation.trace_file' = '.*none.csv' cannot be read: No such file"):
        _schedule(trace_file=str(missing))
    with pytest.raises(ConfigError, match=r"binary.csv' cannot be read: it is not UTF-8 text; give a csv file"):
        _schedule(trace_file=str(binary))


def test_nothing_is_simulated_by_default_and_central_training_cannot_be() -> None:
    assert make_schedule(small_experiment()) is None
    with pytest.raises(ConfigError, match="'participation' simulates clients, and federation.strategy 'central'"):
        make_schedule(small_experiment({"federation.strategy": "central", "participation.availability": 0.5}))


def test_cohorts_have_at_least_one_client() -> None:
    assert cohort_size(small_config({"federation.cohort_fraction": 0.01}).federation, 6) == 1
    assert cohort_size(small_config({"federation.cohort_size": 9}).federation, 6) == 6


@pytest.fixture
def data(tmp_path: Path) -> Path:
    save_dataset(tiny_graph(), tmp_path / "tiny")
    return tmp_path / "tiny"


class Killed(BaseException):
    """Stands for SIGKILL."""


class Killer(SilentObserver):
    """Keeps what it is told, and kills the run before a round."""

    def __init__(self, round_num: int | None = None) -> None:
        self.round_num = round_num
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def round_started(self, round_num: int) -> None:
        if round_num == self.round_num:
            raise Killed


def _run_config(data: Path, name: str, **overrides: Any) -> Any:
    simulated = {
        "data.num_clients": 4,
        "data.split": "dirichlet",
        "federation.num_rounds": 5,
        "federation.cohort_size": 2,
        "participation.availability": 0.7,
        "participation.slowness_spread": 1.0,
        "participation.slowness_jitter": 0.2,
        "participation.bytes_per_second": 1e6,
        "participation.deadline_seconds": 0.25,
        "participation.over_selection": 1.5,
        "participation.too_few": "skip",
        "data.seed": 0,
        "seed": 6,
    }
    return small_config({"data.path": str(data), "output": str(data.parent / name), **simulated, **overrides})


def test_a_run_follows_its_schedule_and_resumes_to_the_same_bits(data: Path) -> None:
    config = _run_config(data, "whole")
    schedule = make_schedule(simulation.prepare(config))
    assert schedule is not None
    observer = Killer()
    result = simulation.run(config, observer=observer)
    skipped = [plan.round_num for plan in schedule.rounds if not plan.cohort]
    assert [text for text in observer.messages if "skipped" in text] == [
        f"round {round_num} is skipped: too few clients, see participation.min_clients" for round_num in skipped
    ]
    rows = RunFolder(result.folder).read_metrics()
    for plan in schedule.rounds:
        own = [row for row in rows if row["round"] == plan.round_num]
        assert [row["client"] for row in own if "losses" in row] == plan.cohort
        (total,) = (row for row in own if row["client"] is None)
        assert total["participation"] == {
            "virtual_seconds": plan.virtual_seconds,
            "virtual_seconds_total": plan.total_seconds,
            "available": plan.num_available,
            "selected": plan.num_selected,
            "trained": len(plan.cohort),
            "late": plan.late,
            "dropped": plan.dropped,
        }
    plans = schedule.rounds
    assert any(plan.late for plan in plans), "the example must show lateness"
    assert skipped, "and a round that is skipped"
    assert any(plan.dropped for plan in plans if plan.cohort), "and clients that were not needed"
    stored = json.loads((result.folder / "result.json").read_text())["participation"]
    assert stored == {
        "virtual_seconds": plans[-1].total_seconds,
        "num_late": sum(len(plan.late) for plan in plans),
        "num_dropped": sum(len(plan.dropped) for plan in plans),
        "num_skipped": sum(not plan.cohort for plan in plans),
    }
    with pytest.raises(Killed):
        simulation.run(_run_config(data, "broken"), observer=Killer(3))
    resumed = simulation.resume(data.parent / "broken")
    assert resumed.participation == result.participation
    models = [
        {path.name: path.read_bytes() for path in sorted((run / "models").glob("*.safetensors"))}
        for run in (result.folder, resumed.folder)
    ]
    assert models[0] == models[1]
    assert simulation.evaluate(result.folder).participation == result.participation


def test_the_clock_is_shown_only_if_there_is_one(data: Path) -> None:
    shown = []
    for name, changes in (("off", {}), ("on", {"participation.seconds_per_step": 2.0})):
        settings = {"data.path": str(data), "output": str(data.parent / name), "federation.num_rounds": 1, **changes}
        result = simulation.run(small_config(settings))
        console = Console(width=200, record=True, file=io.StringIO())
        show_result(result, console)
        shown.append(console.export_text())
    assert "Virtual clock" not in shown[0]
    assert "Virtual clock: " in shown[1]
    assert "0 late, 0 dropped, 0 round(s) skipped" in shown[1]


@pytest.mark.parametrize("strategy", ["local", "fede", "mmfed3"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_predicted_bytes_are_those_that_are_measured(strategy: str, dtype: str, data: Path) -> None:
    """Full participation: the clock's bytes are the messages'."""
    config = small_config(
        {
            "data.path": str(data),
            "federation.strategy": strategy,
            "communication.dtype": dtype,
            "participation.bytes_per_second": 1.0,
            "participation.seconds_per_step": 0.0,
        }
    )
    experiment = simulation.prepare(config)
    schedule = make_schedule(experiment)
    assert schedule is not None
    runtime = simulation.in_process_runtime(experiment)
    for round_num in (1, 2):
        reports = runtime.train(round_num, [0, 1]).reports
        slowest = max(report.bytes_up + report.bytes_down for report in reports)
        assert schedule.plan(round_num).virtual_seconds == slowest
