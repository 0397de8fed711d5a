"""Follows the trials of a sweep as Tune runs them: their status, a line of progress each, and sweep.json."""

import time
from collections.abc import Sequence
from typing import Any

import click
from ray import tune as ray_tune
from ray.tune.experiment import Trial as TuneTrial

from fedsim.run_folder import RunFolder
from tune.plan import name_params
from tune.records import FAILED, FINISHED, RUNNING, STOPPED, Records, Trial
from tune.trial import error_file

MAX_CHARACTERS = 300  # of a cause; the file has the rest
WRITE_SECONDS = 5.0  # between two writes of sweep.json on account of rounds


class Watch(ray_tune.Callback):
    """Keeps the records of a sweep.

    Args:
        records: brought up to date, and written.
    """

    def __init__(self, records: Records) -> None:
        self.records = records
        self.started = self.written = time.monotonic()

    def on_trial_start(self, iteration: int, trials: Sequence[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Note that a trial runs; one of a population starts again after each change."""
        known = self._record(trial)
        if known.status != RUNNING:
            known.status = RUNNING
            self.records.write()

    def on_trial_result(
        self, iteration: int, trials: Sequence[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        """Bring sweep.json up to date now and then."""
        if time.monotonic() - self.written > WRITE_SECONDS:
            self.records.write()
            self.written = time.monotonic()

    def on_trial_recover(self, iteration: int, trials: Sequence[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Say that a trial died and is tried again."""
        known = self._record(trial)
        known.num_restarts += 1
        self._say(f"{known.id} died and goes on from its last round: {self._cause(trial)}")

    def on_trial_complete(self, iteration: int, trials: Sequence[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Note how a trial ended: at its end, or stopped early."""
        known = self._record(trial)
        folder = self.records.plan.run_folder(known.id)
        known.status, known.error = (FINISHED if RunFolder(folder).result_file.is_file() else STOPPED), ""
        self._ended(known)

    def on_trial_error(self, iteration: int, trials: Sequence[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """Note why a trial failed for good."""
        known = self._record(trial)
        known.status, known.error = FAILED, self._cause(trial)
        self._ended(known)

    def _record(self, trial: TuneTrial) -> Trial:
        """Return the record of Tune's trial, which a search may have made just now."""
        given = trial.config["trial"]
        return self.records.trials.setdefault(given["id"], Trial(given["id"], given["params"]))

    def _ended(self, known: Trial) -> None:
        self.records.write()
        self.written = time.monotonic()
        done = self.records.progress(known)
        mrr = "-" if done.valid_mrr is None else f"{done.valid_mrr:.4f}"
        ended = sum(trial.status in (FINISHED, STOPPED, FAILED) for trial in self.records.trials.values())
        text = f"{known.status} after {done.rounds} rounds, valid {mrr}  ({name_params(self.records.params(known))})"
        error = f": {known.error}" if known.error else ""
        self._say(f"{ended}/{self.records.plan.num_trials}  {known.id} {text}{error}")

    def _say(self, text: str) -> None:
        click.echo(f"{(time.monotonic() - self.started) / 60:6.1f} min  {text}")

    def _cause(self, trial: TuneTrial) -> str:
        """Return what a trial said of its end; a process that was killed says nothing."""
        path = error_file(self.records.plan.run_folder(trial.config["trial"]["id"]))
        if path.is_file():
            line = path.read_text(encoding="utf-8").splitlines()[0]
            return f"{line[:MAX_CHARACTERS]}{'...' if len(line) > MAX_CHARACTERS else ''} (see {path})"
        return "its process ended without a word: killed, out of memory, or it could not start"
