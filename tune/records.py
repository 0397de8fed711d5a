"""What a sweep knows of its trials: read from their run folders, kept in sweep.json, written as tables."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsim.checkpoint import replace_text
from fedsim.config import Config, dump_config, load_config
from fedsim.errors import RunError
from fedsim.parsing import parse_json
from fedsim.run_folder import RunFolder
from fedsim.run_records import COSTS, PLANNED_TRIALS, WHOLE_ROW, check_record
from tune.plan import Params, SweepPlan, name_params, show_value
from tune.population import LAST, weights_at

RECORD_FILE = "sweep.json"
BEST_FILE = "best.yaml"
METRIC = "valid_mrr"
VERSION = 1
PENDING, RUNNING, FINISHED, STOPPED, FAILED = "pending", "running", "finished", "stopped", "failed"
ENDED = (FINISHED, STOPPED, FAILED)
NUM_GROUPS = 4  # of the values of a range, in the table of costs


@dataclass
class Trial:
    """One trial; `error` says why it failed, `num_restarts` counts how often it died and was tried again."""

    id: str
    params: Params
    status: str = PENDING
    error: str = ""
    num_restarts: int = 0


@dataclass(frozen=True)
class Progress:
    """What a trial's run has come to, from its run folder.

    Attributes:
        valid_mrr: best validation MRR so far.
        rounds: that are done.
        seconds_by_phase: of these rounds, and of the end of a finished run.
        bytes_up: that all clients sent.
        bytes_down: that all clients were sent.
    """

    valid_mrr: float | None = None
    rounds: int = 0
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def seconds(self) -> float:
        """Of all phases."""
        return sum(self.seconds_by_phase.values())


def read_progress(folder: Path) -> Progress:
    """Read what a run has come to; nothing if it has not begun."""
    run = RunFolder(folder)
    if not run.metrics_file.is_file():
        return Progress()
    rows = [row for row in run.read_metrics() if row["client"] is None]
    for row in rows:
        check_record(row, WHOLE_ROW, run.metrics_file)
    seconds: dict[str, float] = {}
    for row in rows:
        for phase, value in row["phase_seconds"].items():
            seconds[phase] = seconds.get(phase, 0.0) + value
    best = max((row["valid"]["mrr"] for row in rows if "valid" in row), default=None)
    up, down = (sum(int(row[name]) for row in rows) for name in ("bytes_up", "bytes_down"))
    if run.result_file.is_file():
        try:
            result = parse_json(run.result_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:
            raise RunError(f"{run.result_file} cannot be read ({err}); the run's folder is damaged") from err
        check_record(result, COSTS, run.result_file)
        best, seconds = result["valid_mrr"], result["seconds"]
    return Progress(best, rows[-1]["round"] if rows else 0, seconds, up, down)


class Records:
    """The trials of a sweep, in order; `write` keeps them in sweep.json, from which `read` takes them.

    Args:
        plan: the sweep.
        trials: what is known of them.
    """

    def __init__(self, plan: SweepPlan, trials: Sequence[Trial]) -> None:
        self.plan = plan
        self.trials = {trial.id: trial for trial in trials}
        self.ended: dict[str, Progress] = {}  # of trials whose runs are read no more

    @classmethod
    def read(cls, plan: SweepPlan, trials: Sequence[Trial]) -> "Records":
        """Take up what a sweep that was cut off has written; `trials` are those of its plan."""
        records = cls(plan, trials)
        path = plan.folder / RECORD_FILE
        if path.is_file():
            try:
                content = parse_json(path.read_text(encoding="utf-8"))
                check_record(content, PLANNED_TRIALS, path)
                rows = content["trials"]
                found = [Trial(row["id"], row["params"], row["status"], row["error"] or "") for row in rows]
            except (OSError, ValueError, KeyError, TypeError) as err:
                raise RunError(f"{path} is damaged ({err}); start the sweep anew in another --output") from err
            records.trials |= {trial.id: trial for trial in found}
        for trial in records.trials.values():
            if RunFolder(plan.run_folder(trial.id)).result_file.is_file():
                trial.status, trial.error = FINISHED, ""
            elif trial.status not in ENDED:
                trial.status = PENDING
        return records

    @property
    def best(self) -> Trial | None:
        """The finished trial with the best validation MRR; of several the first."""
        found = [trial for trial in self.trials.values() if trial.status == FINISHED]
        return max(found, key=lambda trial: self.progress(trial).valid_mrr or 0.0, default=None)

    def progress(self, trial: Trial) -> Progress:
        """Return what a trial's run has come to."""
        if trial.id in self.ended and trial.status in ENDED:
            return self.ended[trial.id]
        found = read_progress(self.plan.run_folder(trial.id))
        if trial.status in ENDED:
            self.ended[trial.id] = found
        return found

    def history(self, trial: Trial) -> list[tuple[int, float]]:
        """Return the rounds of a trial that were validated, with their validation MRR."""
        run = RunFolder(self.plan.run_folder(trial.id))
        rows = run.read_metrics() if run.metrics_file.is_file() else []
        return [(row["round"], row["valid"]["mrr"]) for row in rows if row["client"] is None and "valid" in row]

    def write(self) -> None:
        """Write sweep.json."""
        best = self.best
        plain = {
            "version": VERSION,
            "title": self.plan.space.title,
            "space": {item.name: item.as_plain() for item in self.plan.space.parameters},
            "metric": METRIC,
            "scheduler": self.plan.settings.scheduler,
            "search": self.plan.settings.search,
            "trials": [self._row(trial) for trial in self.trials.values()],
            "best": best.id if best is not None else None,
        }
        replace_text(self.plan.folder / RECORD_FILE, json.dumps(plain, indent=1) + "\n")

    def write_results(self) -> None:
        """Write sweep.json, the tables and the best config."""
        self.write()
        rows, costs = self.table(), self.costs()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([[*rows[0], "bytes_up", "bytes_down", "folder", "error"], *self._csv_rows()])
        replace_text(self.plan.folder / "trials.csv", text.getvalue())
        title = self.plan.space.title or self.plan.space.source
        markdown = [f"# {title}", "", "Validation MRR is the best of a trial's rounds.", "", *_markdown(rows), ""]
        markdown += ["## What settings cost", "", "Means over trials, per round.", "", *_markdown(costs)]
        replace_text(self.plan.folder / "trials.md", "\n".join(markdown) + "\n")
        best = self.best
        if best is not None:
            replace_text(self.plan.folder / BEST_FILE, self.best_config(best))

    def best_config(self, trial: Trial) -> str:
        """Write the config of a trial as YAML that `fedsim run` takes, with another output."""
        config = load_config(self.plan.run_folder(trial.id) / "config.yaml").model_copy(update={"output": None})
        mrr = self.progress(trial).valid_mrr
        head = f"# Made by fedsim tune: {trial.id}, validation MRR {mrr!r} ({name_params(self.params(trial))})\n"
        return head + dump_config(config, comments=True)

    def params(self, trial: Trial) -> Params:
        """Return a trial's values; a population's change, and the last ones count."""
        config = self._run_config(trial)
        return trial.params if config is None else weights_at(config, LAST, self.plan.space)

    def schedule(self, trial: Trial) -> list[dict[str, Any]]:
        """Return from which round on a trial had which values."""
        config = self._run_config(trial)
        if config is None:
            return [{"round": 1, "params": trial.params}]
        rounds = [1, *(change.from_round for change in config.distillation.schedule)]
        return [{"round": number, "params": weights_at(config, number, self.plan.space)} for number in rounds]

    def table(self) -> list[list[str]]:
        """Return the table of trials as texts, the best first, its header first of all."""
        names = [item.name for item in self.plan.space.parameters]
        header = ["trial", "status", "rounds", "valid MRR", "seconds", "s/round", *names]
        found = [(trial, self.progress(trial)) for trial in self.trials.values()]
        found.sort(key=lambda pair: -(pair[1].valid_mrr or -1.0))
        return [header, *(self._cells(trial, done, names) for trial, done in found)]

    def costs(self) -> list[list[str]]:
        """Return what each value of each parameter gave and cost, as texts, the header first."""
        header = ["parameter", "value", "trials", "best MRR", "mean MRR", "s/round", "MB up/round", "MB down/round"]
        found = [(self.params(trial), self.progress(trial)) for trial in self.trials.values()]
        found = [(params, done) for params, done in found if done.rounds and done.valid_mrr is not None]
        rows = []
        for item in self.plan.space.parameters:
            groups: dict[str, list[Progress]] = {}
            if item.kind != "choice":
                found.sort(key=lambda pair: float(pair[0][item.name]))
            labels = _labels([params[item.name] for params, _ in found], item.kind == "choice")
            for label, (_, done) in zip(labels, found, strict=True):
                groups.setdefault(label, []).append(done)
            order = [show_value(value) for value in item.values] if item.kind == "choice" else list(groups)
            rows += [[item.name, label, *_cost_cells(groups[label])] for label in order if label in groups]
        return [header, *rows]

    def _run_config(self, trial: Trial) -> Config | None:
        """Read the config of a member of a population, which changes; None for other trials."""
        path = self.plan.run_folder(trial.id) / "config.yaml"
        return load_config(path) if self.plan.settings.scheduler == "pbt" and path.is_file() else None

    def _row(self, trial: Trial) -> dict[str, Any]:
        done = self.progress(trial)
        return {
            "id": trial.id,
            "params": self.params(trial),
            "status": trial.status,
            "valid_mrr": done.valid_mrr,
            "rounds": done.rounds,
            "seconds": done.seconds,
            "seconds_by_phase": done.seconds_by_phase,
            "bytes_up": done.bytes_up,
            "bytes_down": done.bytes_down,
            "folder": self.plan.run_folder(trial.id).relative_to(self.plan.folder).as_posix(),
            "error": trial.error or None,
            "schedule": self.schedule(trial),
        }

    def _cells(self, trial: Trial, done: Progress, names: Sequence[str]) -> list[str]:
        mrr = "-" if done.valid_mrr is None else f"{done.valid_mrr:.4f}"
        each = f"{done.seconds / done.rounds:.2f}" if done.rounds else "-"
        values = [show_value(self.params(trial)[name]) for name in names]
        return [trial.id, trial.status, str(done.rounds), mrr, f"{done.seconds:.1f}", each, *values]

    def _csv_rows(self) -> list[list[Any]]:
        names = [item.name for item in self.plan.space.parameters]
        rows = []
        for trial in self.trials.values():
            done, params = self.progress(trial), self.params(trial)
            each = done.seconds / done.rounds if done.rounds else ""
            cells: list[Any] = [trial.id, trial.status, done.rounds, done.valid_mrr, done.seconds, each]
            folder = self.plan.run_folder(trial.id).relative_to(self.plan.folder).as_posix()
            rows.append(
                [*cells, *(params[name] for name in names), done.bytes_up, done.bytes_down, folder, trial.error]
            )
        return rows


def _cost_cells(group: Sequence[Progress]) -> list[str]:
    """Summarise trials: their number, best and mean MRR, and means per round."""
    mrrs = [done.valid_mrr for done in group if done.valid_mrr is not None]
    each = [(done.seconds, done.bytes_up / 1e6, done.bytes_down / 1e6) for done in group]
    means = [
        sum(values[column] / done.rounds for values, done in zip(each, group, strict=True)) / len(group)
        for column in range(3)
    ]
    texts = [f"{means[0]:.2f}", f"{means[1]:.2f}", f"{means[2]:.2f}"]
    return [str(len(group)), f"{max(mrrs):.4f}", f"{sum(mrrs) / len(mrrs):.4f}", *texts]


def _labels(values: Sequence[Any], choices: bool) -> list[str]:
    """Name the group of each value: the value, or which part of those tried it lies in."""
    if choices or len(set(values)) <= NUM_GROUPS:
        return [show_value(value) for value in values]
    ordered = sorted(values)
    size = -(-len(ordered) // NUM_GROUPS)
    groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    texts = [f"{group[0]:.4g} to {group[-1]:.4g}" for group in groups]
    return [next(text for text, group in zip(texts, groups, strict=True) if value <= group[-1]) for value in values]


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *body]
    return [f"| {' | '.join(line)} |" for line in lines]
