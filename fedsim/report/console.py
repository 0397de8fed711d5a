"""What a person sees of a run: its start, its progress and its results.

On a terminal a progress bar shows the rounds with loss and validation MRR; elsewhere each round is one line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:  # keeps torch out of `fedsim --help`
    from fedsim.evaluation.ranking import RankingMetrics
    from fedsim.prediction import Candidate
    from fedsim.results import RoundSummary, RunInfo, RunResult

MAX_CLIENT_ROWS = 20  # of hundreds of clients the tables show the first ones; the metrics file holds all


class ConsoleObserver:
    """Shows a run while it goes on."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or make_console()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._num_rounds = 0

    def close(self) -> None:
        """Take the progress bar off the screen, however the run ended."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def run_started(self, info: RunInfo) -> None:
        """Say what runs where, and show the clients."""
        config = info.config
        self._num_rounds = info.num_rounds
        self._say(f"run folder  {shown_path(info.folder)}")
        self._say(
            f"method      {config.federation.strategy}, imputer {config.model.imputer}, fusion {config.model.fusion}, "
            f"scorer {config.model.scorer}, seed {config.seed}"
        )
        for number, line in enumerate(info.placement):
            self._say(f"{'placement   ' if number == 0 else ' ' * 12}{line}")
        _show_clients(info.clients, self.console)
        if info.start_round > 1:
            self._say(f"continuing with round {info.start_round} of {info.num_rounds}")
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._progress.add_task("first round", total=info.num_rounds, completed=info.start_round - 1)
            self._progress.start()

    def round_started(self, round_num: int) -> None:
        """Show nothing: the bar already counts the rounds that are done."""

    def round_finished(self, summary: RoundSummary) -> None:
        """Move the bar, or write the round's line."""
        scores = (
            f"loss {_number(summary.loss)}  valid MRR {_number(summary.valid_mrr)}  best {_number(summary.best_mrr)}"
        )
        if summary.privacy is not None:
            scores += f"  epsilon {summary.privacy['epsilon']:.4g}"
        if self._progress is not None:
            self._progress.update(self._task, completed=summary.round_num, description=scores)
            return
        seconds = sum(summary.seconds.values())
        width = len(str(self._num_rounds))
        self._say(
            f"round {summary.round_num:>{width}}/{self._num_rounds}  {scores}  {seconds:.1f} s  "
            f"up {format_bytes(summary.bytes_up)}  down {format_bytes(summary.bytes_down)}"
        )

    def message(self, text: str) -> None:
        """Write one line above the bar."""
        self._say(text)

    def _say(self, text: str) -> None:
        self.console.print(escape(text), soft_wrap=True, highlight=False)


def make_console() -> Console:
    """Make the console of a command's output; without a terminal its tables may be as wide as they need."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def show_result(result: RunResult, console: Console) -> None:
    """Print test metrics per client and weighted, imputation, consistency, seconds per phase and bytes."""
    _show_metrics(result, console)
    if result.imputation:
        names = list(dict.fromkeys(name for values in result.imputation.values() for name in values))
        rows = [[row, *(_number(values.get(name)) for name in names)] for row, values in result.imputation.items()]
        show_rows("Imputation of the features kept aside", ["", *names], rows, console)
    if result.consistency:
        rows = [[name, _number(value)] for name, value in result.consistency.items()]
        show_rows("Semantic consistency between clients", ["", "cosine"], rows, console)
    seconds = {**result.seconds, "together": sum(result.seconds.values())}
    show_rows("Time", ["phase", "seconds"], [[name, f"{value:.1f}"] for name, value in seconds.items()], console)
    clock = result.participation
    if clock is not None:
        console.print(
            f"Virtual clock: {clock.virtual_seconds:,.1f} s; {clock.num_late} late, {clock.num_dropped} dropped, "
            f"{clock.num_skipped} round(s) skipped",
            highlight=False,
        )
    if result.privacy is not None:
        console.print(f"Privacy: {result.privacy.describe()}", soft_wrap=True, highlight=False)
    console.print(
        f"Bytes: {format_bytes(result.bytes_up)} up, {format_bytes(result.bytes_down)} down\n"
        f"Validation MRR: 95 % of the best one after {result.num_rounds_to_95} round(s)\n"
        f"Models: those of round {result.best_round}, chosen on validation, in {escape(shown_path(result.folder))}",
        soft_wrap=True,
        highlight=False,
    )


def show_candidates(question: str, candidates: Sequence[Candidate], console: Console) -> None:
    """Print the top candidates of one question with their scores and whether they are known."""
    rows = [
        [str(place), item.label, item.key, f"{item.score:.3f}", "yes" if item.known else ""]
        for place, item in enumerate(candidates, start=1)
    ]
    show_rows(question, ["#", "entity", "key", "score", "known"], rows, console)


def show_rows(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """Print a title and a table of texts, numbers to the right, the row `weighted` bold."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, name in enumerate(header):
        numeric = all(_looks_numeric(row[column]) for row in rows)
        table.add_column(escape(name), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row), style="bold" if row[0] == "weighted" else None)
    console.print(f"\n[bold]{escape(title)}[/bold]", highlight=False)
    console.print(table)


def shown_path(path: Path) -> str:
    """Write a path the way a user would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def format_bytes(num_bytes: float) -> str:
    """Write a size with a unit, for example 1500 as "1.5 kB" (units of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _show_clients(clients: Sequence[tuple[int, int, int, int, int, int]], console: Console) -> None:
    header = ["client", "entities", "relations", "train", "valid", "test"]
    rows = [[str(row[0]), *(f"{count:,}" for count in row[1:])] for row in clients[:MAX_CLIENT_ROWS]]
    show_rows(f"{len(clients)} clients{_left_out(len(clients))}", header, rows, console)


def _show_metrics(result: RunResult, console: Console) -> None:
    shown = result.clients[:MAX_CLIENT_ROWS]
    combined = any(row.combination is not None for row in shown)
    header = ["client", "queries", "MRR", *(f"Hits@{k}" for k in sorted(result.test.hits)), "valid MRR"]
    rows = [[str(row.client), *_metric_cells(row.test), _number(row.valid_mrr)] for row in shown]
    rows.append(["weighted", *_metric_cells(result.test), _number(result.valid_mrr)])
    if combined:
        header.append("combination")
        for cells, combination in zip(rows, [*(row.combination for row in shown), None], strict=True):
            cells.append("" if combination is None else f"{combination:.2f}")
    show_rows(f"Test, filtered, realistic ranks{_left_out(len(result.clients))}", header, rows, console)


def _metric_cells(metrics: RankingMetrics) -> list[str]:
    return [f"{metrics.num_queries:,}", _number(metrics.mrr), *(_number(metrics.hits[k]) for k in sorted(metrics.hits))]


def _left_out(num_clients: int) -> str:
    return f" (the first {MAX_CLIENT_ROWS} of {num_clients})" if num_clients > MAX_CLIENT_ROWS else ""


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def _looks_numeric(text: str) -> bool:
    return text in ("", "-", "weighted") or text.replace(",", "").removeprefix("-").replace(".", "", 1).isdigit()
