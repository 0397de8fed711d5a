"""The record of a sweep: what its tables say, and that a killed one is read again."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from fedsim.config import load_config
from tune.plan import Settings, SweepPlan, make_plan, name_trial
from tune.records import (
    FAILED,
    FINISHED,
    PENDING,
    RUNNING,
    STOPPED,
    Progress,
    Records,
    Trial,
    _labels,
    read_progress,
)
from tune.search import make_search
from tune.search_space import parse_space

SPEC: dict[str, Any] = {
    "data.num_clients": [3, 5],
    "training.learning_rate": {"uniform": [0.1, 1.0]},
}


def _plan(folder: Path, **settings: Any) -> SweepPlan:
    return make_plan(parse_space({"space": SPEC}, "s"), folder, {}, {}, Settings(num_trials=3, **settings))


def _run(plan: SweepPlan, trial: str, params: dict[str, Any], mrrs: list[float], *, finished: bool) -> None:
    """Write what a run leaves: a second of training and half a one of evaluation per round, 1 MB up, 2 MB down."""
    from fedsim.config import dump_config

    folder = plan.run_folder(trial)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(plan.config(params, trial)))
    rows = [
        {
            "round": number,
            "client": None,
            "bytes_up": 1_000_000,
            "bytes_down": 2_000_000,
            "phase_seconds": {"train": 1.0, "evaluate": 0.5},
            "valid": {"mrr": mrr},
        }
        for number, mrr in enumerate(mrrs, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        seconds = {"train": 1.0 * len(mrrs), "evaluate": 0.5 * len(mrrs), "final_evaluation": 0.5}
        (folder / "result.json").write_text(json.dumps({"valid_mrr": max(mrrs), "seconds": seconds}))


@pytest.fixture
def records(tmp_path: Path) -> Records:
    plan = _plan(tmp_path / "sweep")
    plan.write()
    params = [{"data.num_clients": n, "training.learning_rate": r} for n, r in ((3, 0.1), (5, 0.2), (3, 0.3))]
    _run(plan, "trial-00000", params[0], [0.1, 0.3, 0.2], finished=True)
    _run(plan, "trial-00001", params[1], [0.1, 0.4], finished=False)
    made = [Trial(name_trial(number), item) for number, item in enumerate(params)]
    made[0].status, made[1].status = FINISHED, STOPPED
    made[2].status, made[2].error = FAILED, "it broke"
    return Records(plan, made)


def test_progress_is_read_from_the_run(records: Records) -> None:
    finished, stopped = (records.progress(trial) for trial in list(records.trials.values())[:2])
    assert (finished.valid_mrr, finished.rounds, finished.seconds) == (0.3, 3, 5.0)
    assert (stopped.valid_mrr, stopped.rounds, stopped.seconds) == (0.4, 2, 3.0)
    assert (stopped.bytes_up, stopped.bytes_down) == (2_000_000, 4_000_000)
    assert read_progress(records.plan.run_folder("trial-00002")) == Progress()


def test_the_best_trial_is_one_that_finished(records: Records) -> None:
    """The stopped one has a higher MRR, but a run of its config would go on and end with another."""
    assert records.best is not None
    assert records.best.id == "trial-00000"


def test_results_are_written(records: Records) -> None:
    records.write_results()
    folder = records.plan.folder
    sweep = json.loads((folder / "sweep.json").read_text())
    assert (sweep["version"], sweep["metric"], sweep["best"]) == (1, "valid_mrr", "trial-00000")
    assert sweep["space"] == SPEC
    assert sweep["trials"][1] == {
        "id": "trial-00001",
        "params": {"data.num_clients": 5, "training.learning_rate": 0.2},
        "status": "stopped",
        "valid_mrr": 0.4,
        "rounds": 2,
        "seconds": 3.0,
        "seconds_by_phase": {"train": 2.0, "evaluate": 1.0},
        "bytes_up": 2_000_000,
        "bytes_down": 4_000_000,
        "folder": "trials/trial-00001",
        "error": None,
        "schedule": [{"round": 1, "params": {"data.num_clients": 5, "training.learning_rate": 0.2}}],
    }
    with (folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["error"] for row in rows] == ["", "", "it broke"]
    assert float(rows[0]["valid MRR"]) == 0.3
    best = load_config(folder / "best.yaml")
    assert (best.data.num_clients, best.training.learning_rate, best.output) == (3, 0.1, None)
    assert "| trial-00001 | stopped | 2 | 0.4000 |" in (folder / "trials.md").read_text()


def test_costs_are_means_per_round(records: Records) -> None:
    """Three clients: one trial, 5 s of 3 rounds are 1.67 s. Five: 3 s of 2 rounds are 1.5 s; 1 MB up, 2 MB down."""
    costs = [row for row in records.costs() if row[0] == "data.num_clients"]
    assert costs == [
        ["data.num_clients", "3", "1", "0.3000", "0.3000", "1.67", "1.00", "2.00"],
        ["data.num_clients", "5", "1", "0.4000", "0.4000", "1.50", "1.00", "2.00"],
    ]


def test_a_killed_sweep_is_read_again(records: Records) -> None:
    first, second, third = records.trials.values()
    first.status = RUNNING  # its run finished, and the sweep was killed before it heard
    second.status = RUNNING
    records.write()
    again = Records.read(records.plan, [])
    assert [trial.status for trial in again.trials.values()] == [FINISHED, PENDING, FAILED]
    assert again.trials[third.id].error == "it broke"
    assert again.trials[second.id].params == second.params


def test_optuna_gets_what_is_known_and_goes_on(records: Records) -> None:
    """Of three trials two have ended; with five planned, the one that waits comes first, then two new ones."""
    plan = _plan(records.plan.folder, search="optuna")
    third = list(records.trials.values())[2]
    third.status = PENDING
    search = make_search(plan, records, [third])
    assert len(search.search._ot_study.trials) == 2  # type: ignore[attr-defined]
    assert search.suggest("a")["trial"] == {"id": "trial-00002", "params": third.params}
    assert search.suggest("b") == "FINISHED"
    search.on_trial_complete("a", {"valid_mrr": 0.2, "best_mrr": 0.25})
    values = [trial.value for trial in search.search._ot_study.trials]  # type: ignore[attr-defined]
    assert sorted(values) == [0.25, 0.3, 0.4]


def test_optuna_proposes_and_learns(tmp_path: Path) -> None:
    plan = _plan(tmp_path, search="optuna")
    search = make_search(plan, Records(plan, []), [])
    proposed = [search.suggest(name)["trial"] for name in ("a", "b", "c")]
    assert [trial["id"] for trial in proposed] == ["trial-00000", "trial-00001", "trial-00002"]
    assert {trial["params"]["data.num_clients"] for trial in proposed} <= {3, 5}
    assert all(0.1 <= trial["params"]["training.learning_rate"] <= 1 for trial in proposed)
    assert search.suggest("d") == "FINISHED"
    search.on_trial_result("a", {"valid_mrr": 0.1, "training_iteration": 1})
    search.on_trial_complete("a", {"valid_mrr": 0.1, "best_mrr": 0.2})
    search.on_trial_complete("b", None, error=True)
    states = [(trial.state.name, trial.value) for trial in search.search._ot_study.trials]  # type: ignore[attr-defined]
    assert states[:2] == [("COMPLETE", 0.2), ("FAIL", None)]


def test_values_of_a_range_are_grouped() -> None:
    """Eight values make four groups of two."""
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    assert _labels(values, choices=False)[::2] == ["0.1 to 0.2", "0.3 to 0.4", "0.5 to 0.6", "0.7 to 0.8"]
    assert _labels(values, choices=True)[0] == "0.1"
