"""What a person sees of a run: its start, its progress and its results.

On a terminal a progress bar shows the rounds with loss and validation MRR; elsewhere each round is one line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:  # keeps torch out of `fedsim --help`
    from fedsim.evaluation.ranking import RankingMetrics
    from fedsim.prediction import Candidate
    from fedsim.simulation import RoundSummary, RunInfo, RunResult

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
        self._say(f"run folder  {info.folder}")
        self._say(
            f"method      {config.federation.strategy}, imputer {config.model.imputer}, fusion {config.model.fusion}, "
            f"scorer {config.model.scorer}, seed {config.seed}"
        )
        for number, line in enumerate(info.placement):
            self._say(f"{'placement   ' if number == 0 else ' ' * 12}{line}")
        self.console.print(_client_table(info.clients))
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
        scores = f"loss {summary.loss:.4f}  valid MRR {_number(summary.valid_mrr)}  best {_number(summary.best_mrr)}"
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
    console.print(_metrics_table(result))
    if result.imputation:
        console.print(_imputation_table(result.imputation))
    if result.consistency:
        console.print(_pairs_table("Semantic consistency between clients (cosine)", "modality", result.consistency))
    if result.seconds:
        rows = {**result.seconds, "together": sum(result.seconds.values())}
        console.print(_pairs_table("Seconds per phase", "phase", rows, "{:.1f}"))
    console.print(f"bytes up {format_bytes(result.bytes_up)}, down {format_bytes(result.bytes_down)}")
    best = f"; models are those of round {result.best_round}, chosen on validation"
    console.print(escape(f"run folder {result.folder}{best}"), soft_wrap=True)


def show_candidates(question: str, candidates: Sequence[Candidate], console: Console) -> None:
    """Print the top candidates of one question with their scores and whether they are known."""
    table = Table(title=escape(question), title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("entity")
    table.add_column("key")
    table.add_column("score", justify="right")
    table.add_column("known")
    for place, candidate in enumerate(candidates, start=1):
        known = "yes" if candidate.known else ""
        table.add_row(str(place), escape(candidate.label), escape(candidate.key), f"{candidate.score:.3f}", known)
    console.print(table)


def show_rows(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """Print a table of texts, numbers to the right."""
    table = Table(title=escape(title), title_justify="left")
    for column, name in enumerate(header):
        numeric = all(_looks_numeric(row[column]) for row in rows)
        table.add_column(escape(name), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)


def format_bytes(num_bytes: float) -> str:
    """Write a size with a unit, for example 1536 as "1.5 kB" (units of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _client_table(clients: Sequence[tuple[int, int, int, int, int, int]]) -> Table:
    table = Table(title="Clients", title_justify="left", caption=_left_out(len(clients)), caption_justify="left")
    for name in ("client", "entities", "relations", "train", "valid", "test"):
        table.add_column(name, justify="right")
    for row in clients[:MAX_CLIENT_ROWS]:
        table.add_row(str(row[0]), *(f"{count:,}" for count in row[1:]))
    return table


def _metrics_table(result: RunResult) -> Table:
    rows = result.clients[:MAX_CLIENT_ROWS]
    table = Table(
        title="Test, filtered, realistic ranks",
        title_justify="left",
        caption=_left_out(len(result.clients)),
        caption_justify="left",
    )
    combined = any(row.combination is not None for row in rows)
    names = ["queries", "MRR", *(f"Hits@{k}" for k in sorted(result.test.hits)), "valid MRR"]
    for name in ["client", *names, *(["combination"] if combined else [])]:
        table.add_column(name, justify="right")
    for number, row in enumerate(rows):
        extra = [_number(row.combination, 2)] if combined else []
        cells = [str(row.client), *_metric_cells(row.test), _number(row.valid_mrr), *extra]
        table.add_row(*cells, end_section=number == len(rows) - 1)
    table.add_row("weighted", *_metric_cells(result.test), "", *([""] if combined else []), style="bold")
    return table


def _metric_cells(metrics: RankingMetrics) -> list[str]:
    return [f"{metrics.num_queries:,}", _number(metrics.mrr), *(_number(metrics.hits[k]) for k in sorted(metrics.hits))]


def _imputation_table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(title="Imputation of features kept aside", title_justify="left")
    table.add_column("")
    names = list(dict.fromkeys(name for values in rows.values() for name in values))
    for name in names:
        table.add_column(name, justify="right")
    for row, values in rows.items():
        table.add_row(row, *(_number(values.get(name)) for name in names))
    return table


def _pairs_table(title: str, header: str, pairs: Mapping[str, float], form: str = "{:.4f}") -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(header)
    table.add_column("", justify="right")
    for name, value in pairs.items():
        table.add_row(name, form.format(value))
    return table


def _left_out(num_clients: int) -> str | None:
    return f"and {num_clients - MAX_CLIENT_ROWS} more clients" if num_clients > MAX_CLIENT_ROWS else None


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _looks_numeric(text: str) -> bool:
    return text == "" or text == "-" or text.replace(",", "").rstrip("%").strip().replace(".", "", 1).isdigit()
