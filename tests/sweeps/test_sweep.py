"""Whole sweeps on Ray: trials in placement groups, one that dies, one that fails, a killed sweep, a population."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders import write_tiny_dataset
from fedsim import cli, simulation
from fedsim.config import load_config, make_config
from fedsim.errors import RunError
from fedsim.run_folder import RunFolder
from processes import descendants, end, fedsim, titles, wait_until
from runs import SMALL, num_rounds_done, outcome
from tune.plan import Settings, SweepPlan, make_plan
from tune.search_space import parse_space
from tune.sweep import start

LOGITS = "distillation.logit_to_client"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def plan(dataset: Path, tmp_path: Path) -> Callable[..., SweepPlan]:
    def made(space: dict[str, Any], num_rounds: int, changes: dict[str, Any], **settings: Any) -> SweepPlan:
        fixed = SMALL | {"data.path": str(dataset), "data.num_clients": 2, "federation.num_rounds": num_rounds}
        return make_plan(
            parse_space({"space": space}, "space"), tmp_path / "sweep", {}, fixed | changes, Settings(**settings)
        )

    return made


def _record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return found


def _kill_a_trial(folder: Path, killed: list[int]) -> None:
    """Kill the process of a trial once it has done a round; it leads actors, which end with it."""
    assert wait_until(lambda: num_rounds_done(folder) >= 1)
    leaders = [pid for pid, title in titles(descendants(os.getpid())).items() if title.startswith("ray::ImplicitFunc")]
    killed.extend(leaders)
    end(leaders)


@pytest.mark.usefixtures("ray_cluster")
def test_a_trial_that_dies_is_retried_and_one_that_fails_does_not_stop_the_sweep(
    plan: Callable[..., SweepPlan], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first trial is killed after a round; the second asks for more clients than there are, whatever is tried."""
    made = plan({"federation.cohort_size": [2, 5]}, 12, {}, search="grid", scheduler="none", max_failures=1)
    good, bad = (made.run_folder(name) for name in ("trial-00000", "trial-00001"))
    killed: list[int] = []
    killer = threading.Thread(target=_kill_a_trial, args=(good, killed))
    killer.start()
    assert not start(made)
    killer.join()
    assert killed
    record = _record(made.folder)
    assert [trial["status"] for trial in record["trials"]] == ["finished", "failed"]
    assert record["best"] == "trial-00000"
    assert "'federation.cohort_size' = 5, but there are 2 clients" in record["trials"][1]["error"]
    shown = capfd.readouterr().out
    assert "trial-00000 died and goes on from its last round" in shown
    assert "trial-00001 failed: " in shown
    assert "Traceback" not in shown
    assert not list(bad.rglob("*.tmp"))
    # Killed and retried in actors of its own, it ends with the bits of an unbroken run in one process.
    simulation.run(load_config(good / "config.yaml").model_copy(update={"output": str(tmp_path / "unbroken")}))
    assert outcome(good) == outcome(tmp_path / "unbroken")


def test_a_killed_sweep_goes_on_and_its_best_config_gives_the_same_bits(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({}, SMALL | {"data.path": str(dataset), "federation.num_rounds": 12})
    tree = config.model_dump(mode="json", exclude={"output"})
    tree["runtime"] |= {"kind": "in_process", "dashboard": False}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"space": {"data.num_clients": [2, 3], LOGITS: [0.0, 2.0]}}))
    options = ["space.yaml", "--config", "base.yaml", "--search", "grid", "--concurrent", "1", "--output", "sweep"]
    trials = [tmp_path / "sweep" / "trials" / f"trial-{number:05d}" for number in range(4)]

    def in_the_middle() -> bool:
        begun = [trial for trial in trials if 2 <= num_rounds_done(trial) < 12]
        return bool(begun and (trials[0] / "result.json").is_file())

    with fedsim("tune", *options, cwd=tmp_path) as process:
        assert wait_until(lambda: in_the_middle() or process.poll() is not None)
        left = descendants(process.pid)
        process.kill()
        output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    assert wait_until(lambda: not any("Impl" in title for title in titles(left).values())), "trials are left"
    end(left)
    finished = {path: path.read_bytes() for path in tmp_path.glob("sweep/trials/*/result.json")}
    assert 0 < len(finished) < 4

    with fedsim("tune", "--resume", "sweep", cwd=tmp_path) as process:
        output, _ = process.communicate(timeout=290)
    assert process.returncode == 0, output
    assert {path: path.read_bytes() for path in finished} == finished
    record = _record(tmp_path / "sweep")
    assert {trial["status"] for trial in record["trials"]} <= {"finished", "stopped"}
    assert not list((tmp_path / "sweep").rglob("*.tmp"))
    best = {trial["id"]: trial for trial in record["trials"]}[record["best"]]
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "sweep/best.yaml", "--output", "again"]) == 0
    assert json.loads(Path("again/result.json").read_text())["valid_mrr"] == best["valid_mrr"]
    # Nothing is left to do: the tables are written again.
    assert cli.main(["tune", "--resume", "sweep"]) == 0
    assert _record(tmp_path / "sweep") == record


@pytest.mark.usefixtures("ray_cluster")
def test_a_population_changes_weights_and_its_schedule_can_be_run_again(
    plan: Callable[..., SweepPlan], tmp_path: Path
) -> None:
    space = {LOGITS: [0.0, 1.0, 4.0], "distillation.feature_to_client": {"loguniform": [0.01, 1.0]}}
    changes = {"runtime.kind": "in_process"}
    made = plan(space, 4, changes, scheduler="pbt", num_trials=2, interval=2)
    assert start(made)
    record = _record(made.folder)
    assert [trial["status"] for trial in record["trials"]] == ["finished", "finished"]
    changed = [trial for trial in record["trials"] if len(trial["schedule"]) > 1]
    assert changed
    for trial in changed:
        rounds = [step["round"] for step in trial["schedule"]]
        assert rounds == [1, 3]
        assert all(
            one["params"] != two["params"] for one, two in zip(trial["schedule"], trial["schedule"][1:], strict=False)
        )
        assert trial["params"] == trial["schedule"][-1]["params"]
        folder = made.run_folder(trial["id"])
        again = load_config(folder / "config.yaml").model_copy(update={"output": str(tmp_path / trial["id"])})
        simulation.run(again)
        assert outcome(tmp_path / trial["id"]) == outcome(folder)
    assert RunFolder(made.run_folder("trial-00000")).result_file.is_file()
    assert not (made.folder / "snapshots").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_that_does_not_fit_starts_nothing(plan: Callable[..., SweepPlan], tmp_path: Path) -> None:
    made = plan({LOGITS: [0.0]}, 2, {"runtime.placement": "dedicated", "runtime.cpus_per_actor": 64.0})
    with pytest.raises(RunError, match=r"trial-00000 .* needs 192 CPU .* but the cluster has 4 CPU"):
        start(made)
    assert not (made.folder / "plan.json").exists()
