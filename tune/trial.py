"""A trial: one whole federation, whose rounds are reported to Ray Tune and whose run folder is its checkpoint.

Tune may stop a trial at any report, start it again after its process died, or, in a population, let it continue from
another member's state. Whatever happened before, a trial looks at its run folder and goes on from what is there.
"""

import json
import os
import shutil
import tempfile
import traceback
from pathlib import Path
from typing import Any

from ray import tune as ray_tune

from fedsim import simulation
from fedsim.benchmark.folder import locked
from fedsim.checkpoint import newest_checkpoint
from fedsim.config import Config, load_config
from fedsim.errors import FedSimError, RunError
from fedsim.federated.runtime import InProcessRuntime, RuntimeFactory
from fedsim.results import RoundSummary, RunInfo, SilentObserver
from fedsim.run_folder import RunFolder
from tune.plan import SweepPlan, read_plan
from tune.population import LAST, finish_fork, fork, forked_config, snapshot, weights_at

LOCK_SECONDS = 60.0  # the process of the same trial before may take a while to end
CHECKPOINT_FILE = "member.json"


def run_trial(config: dict[str, Any]) -> None:
    """Run or continue a trial, in a process that Tune started.

    Args:
        config: `sweep` is the sweep's folder, `trial` has the trial's `id`, which names its run folder, and `params`.
    """
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(
        round(LOCK_SECONDS)
    )  # for the actors to end, before the next trial
    plan = read_plan(Path(config["sweep"]))
    folder = plan.run_folder(config["trial"]["id"])
    failure = error_file(folder)
    busy = f"{folder} is being run by another process; wait for it, or end it"
    with locked(folder.with_name(f".{folder.name}.lock"), busy, LOCK_SECONDS):
        failure.unlink(missing_ok=True)
        try:
            _run_or_resume(plan, config)
        except Exception as err:
            text = " ".join(str(err).split()) or "no message"
            message = text if isinstance(err, FedSimError) else f"{type(err).__name__}: {text}"
            failure.write_text(f"{message}\n\n{traceback.format_exc()}", encoding="utf-8")
            raise


def error_file(run_folder: Path) -> Path:
    """Return where a trial says why it stopped: a line, and the traceback."""
    return run_folder.with_name(f"{run_folder.name}.failed.txt")


def _run_or_resume(plan: SweepPlan, config: dict[str, Any]) -> None:
    run = RunFolder(plan.run_folder(config["trial"]["id"]))
    is_member = plan.settings.scheduler == "pbt"
    if is_member:
        finish_fork(run.path)
        _take_over(plan, run, config)
    if run.result_file.is_file():
        return
    if run.path.exists() and not run.metrics_file.is_file():
        shutil.rmtree(run.path)  # killed while the folder was made: there is nothing to go on from
    observer = _Member(plan, config["trial"]["id"]) if is_member else _Reporter()
    if not run.path.exists():
        resolved = plan.config(config["trial"]["params"], config["trial"]["id"])
        simulation.run(resolved, _factory(resolved), observer)
    else:
        stored = load_config(run.path / "config.yaml")
        observer.replay(run)
        simulation.resume(run.path, _factory(stored), observer)
    observer.report_last()


def _take_over(plan: SweepPlan, run: RunFolder, config: dict[str, Any]) -> None:
    """Continue from the member that Tune names, with the weights that it names, unless that is what is there."""
    given = ray_tune.get_checkpoint()
    if given is None:
        return
    with given.as_directory() as folder:
        member = json.loads((Path(folder) / CHECKPOINT_FILE).read_text(encoding="utf-8"))
    source = plan.folder / member["snapshot"]
    kept = load_config(source / "config.yaml")
    wanted = forked_config(kept, plan.space, config["trial"]["params"], member["round"])
    wanted = wanted.model_copy(update={"output": str(run.path)})
    if run.path.exists() and load_config(run.path / "config.yaml") == wanted:
        return
    fork(source, run.path, wanted)


def _factory(config: Config) -> RuntimeFactory:
    if config.runtime.kind == "in_process":
        return InProcessRuntime
    from actors.runtime import ray_runtime

    return ray_runtime


class _Reporter(SilentObserver):
    """Reports each round that was validated; the last one when its run is finished, for a report may end it."""

    def __init__(self) -> None:
        self.bytes_up = self.bytes_down = 0
        self.seconds: dict[str, float] = {}
        self.num_rounds = 0
        self.last: tuple[int, float, float | None] | None = None

    def run_started(self, info: RunInfo) -> None:
        """Learn which round is the last."""
        self.num_rounds = info.num_rounds

    def round_finished(self, summary: RoundSummary) -> None:
        """Report a round; Tune may end this process here."""
        self._add(summary.seconds, summary.bytes_up, summary.bytes_down)
        if summary.valid_mrr is None:
            return
        if summary.round_num >= self.num_rounds:
            self.last = summary.round_num, summary.valid_mrr, summary.best_mrr
        else:
            self._report(summary.round_num, summary.valid_mrr, summary.best_mrr)

    def report_last(self) -> None:
        """Report the round that was left out."""
        if self.last is not None:
            self._report(*self.last)

    def replay(self, run: RunFolder) -> None:
        """Report the rounds before the checkpoint that a run goes on from: a new scheduler knows nothing of them."""
        best = None
        for row in _rows_to_keep(run):
            self._add(row["phase_seconds"], row["bytes_up"], row["bytes_down"])
            if "valid" in row:
                best = max(best or 0.0, row["valid"]["mrr"])
                self._report(row["round"], row["valid"]["mrr"], best)

    def _add(self, seconds: dict[str, float], bytes_up: int, bytes_down: int) -> None:
        self.bytes_up, self.bytes_down = self.bytes_up + bytes_up, self.bytes_down + bytes_down
        for phase, value in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value

    def _report(self, round_num: int, valid_mrr: float, best_mrr: float | None) -> None:
        ray_tune.report(self._metrics(round_num, valid_mrr, best_mrr))

    def _metrics(self, round_num: int, valid_mrr: float, best_mrr: float | None) -> dict[str, Any]:
        found = {"round": round_num, "valid_mrr": valid_mrr, "best_mrr": best_mrr}
        seconds = {f"seconds_{phase}": value for phase, value in self.seconds.items()}
        return found | seconds | {"bytes_up": self.bytes_up, "bytes_down": self.bytes_down}


class _Member(_Reporter):
    """Reports the rounds in which the population may change, all but the last, with a snapshot to continue from."""

    def __init__(self, plan: SweepPlan, trial: str) -> None:
        super().__init__()
        self.plan, self.trial = plan, trial
        self.run = RunFolder(plan.run_folder(trial))

    def replay(self, run: RunFolder) -> None:
        """Report where the run stands if the population may change there; a copy has been changed already."""
        rows = _rows_to_keep(run)
        for row in rows:
            self._add(row["phase_seconds"], row["bytes_up"], row["bytes_down"])
        config = load_config(run.path / "config.yaml")
        starts = [change.from_round for change in config.distillation.schedule]
        if rows and "valid" in rows[-1] and rows[-1]["round"] + 1 not in starts and ray_tune.get_checkpoint() is None:
            self._report(rows[-1]["round"], rows[-1]["valid"]["mrr"], None)

    def _report(self, round_num: int, valid_mrr: float, best_mrr: float | None) -> None:
        if round_num % self.plan.settings.interval or round_num >= self.plan.max_rounds:
            return
        kept = Path("snapshots") / self.trial / f"round-{round_num:05d}"
        snapshot(self.run, round_num, self.plan.folder / kept)
        member = {"snapshot": kept.as_posix(), "round": round_num}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / CHECKPOINT_FILE).write_text(json.dumps(member), encoding="utf-8")
            checkpoint = ray_tune.Checkpoint.from_directory(folder)
            ray_tune.report(self._metrics(round_num, valid_mrr, best_mrr), checkpoint=checkpoint)


def _rows_to_keep(run: RunFolder) -> list[dict[str, Any]]:
    """Return the rows of the rounds up to the newest checkpoint."""
    try:
        _, manifest = newest_checkpoint(run.checkpoints)
    except RunError:
        return []
    return [row for row in run.read_metrics() if row["client"] is None and row["round"] <= manifest["round"]]


def current_params(plan: SweepPlan, trial: str) -> dict[str, Any] | None:
    """Return the weights that a member of a population trains with now; None if it has not begun."""
    path = plan.run_folder(trial) / "config.yaml"
    return weights_at(load_config(path), LAST, plan.space) if path.is_file() else None
