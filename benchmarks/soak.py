"""Does anything grow? Thousands of rounds of small clients: memory, object store and open files per round.

    python benchmarks/soak.py --output runs/soak.md

After each round it sums the proportional set sizes of all processes (without pages of files: their shares change with
what else the machine runs), reads the size of Ray's object store from Ray's own metrics, and counts open file handles.
The slope is by least squares over the rounds after a warm-up, in which allocators, Ray's buffers and its object store
grow to what they stay at: the heap of each of a process's threads keeps the pages of its highest use, and new highs
become rare only after some 2,000 rounds. The slope of each stretch of rounds, warm-up too, stands in a table of its
own. Because neighbouring rounds are alike, the standard error is that of the means of blocks of rounds. Nothing grows
if the slope is within two standard errors of zero.
"""

import os
import re
import tempfile
import time
import urllib.request
from functools import cache
from pathlib import Path
from urllib.error import URLError

import click
import numpy as np
import numpy.typing as npt
import ray
from job_data import make_data
from process_tree import PYTHON, ProcessTree
from tables import Sheet

import fedsim
from actors.runtime import ray_runtime
from fedsim.results import RoundSummary, RunInfo

NUM_BLOCKS = 20
STRETCH = 500  # rounds of which the table of stretches gives a slope each
MISSING = 0.1  # share of the rounds in which a busy machine may not have answered in time
Values = npt.NDArray[np.float64]  # [rounds]
STORE_METRIC = re.compile(r"^ray_object_store_memory\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE)


class Samples:
    """An observer of the run that samples after each round, into arrays that are there from the start.

    Args:
        tree: the processes.
        sheet: is told of the progress.
        num_rounds: that the run will have.
    """

    def __init__(self, tree: ProcessTree, sheet: Sheet, num_rounds: int) -> None:
        self.tree, self.sheet, self.num_rounds = tree, sheet, num_rounds
        self.every = max(num_rounds // 20, 1)
        # Filled, so that this process has their pages before the first round.
        self.memory, self.store, self.files, self.seconds = (np.ones(num_rounds) for _ in range(4))
        self.parts: dict[str, Values] = {}  # kind of process -> bytes
        self.started = 0.0

    def run_started(self, info: RunInfo) -> None:
        """Say where it runs."""
        self.sheet.progress("; ".join(info.placement))

    def round_started(self, round_num: int) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def round_finished(self, summary: RoundSummary) -> None:
        """Sample."""
        index = summary.round_num - 1
        self.seconds[index] = time.perf_counter() - self.started
        memory = self.tree.memory(files=False)
        self.memory[index] = memory.own_bytes
        for kind, size in memory.own_parts.items():
            if kind not in self.parts:
                self.parts[kind] = np.zeros(self.num_rounds)
            self.parts[kind][index] = size
        self.store[index] = object_store_bytes()
        self.files[index] = self.tree.num_open_files()
        if summary.round_num % self.every == 0:
            now = f"{memory.own_bytes / 1e6:.1f} MB, object store {self.store[index] / 1e6:.1f} MB"
            rest = f"{self.files[index]:.0f} files, {self.seconds[index]:.2f} s"
            self.sheet.progress(f"round {summary.round_num}: {now}, {rest}")

    def message(self, text: str) -> None:
        """Show what the run has to say."""
        self.sheet.progress(text)


@cache
def metric_pages() -> list[str]:
    """Return where the nodes show Ray's metrics."""
    return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in ray.nodes()]


def object_store_bytes() -> float:
    """Return what the object stores of all nodes hold, by Ray's metrics; NaN if they cannot be read."""
    total = 0.0
    for url in metric_pages():
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                found = STORE_METRIC.findall(answer.read().decode())
        except (URLError, OSError):
            return float("nan")
        total += sum(map(float, found)) if found else float("nan")
    return total


def slope(values: Values) -> tuple[float, float]:
    """Fit a line by least squares to the means of blocks of rounds; returns its slope per round and standard error."""
    blocks = np.array_split(values, NUM_BLOCKS)
    y = np.array([np.nanmean(block) for block in blocks])
    ends = np.cumsum([len(block) for block in blocks])
    x = ends - np.array([len(block) for block in blocks]) / 2
    x = x - x.mean()
    found = float(x @ y / (x @ x))
    residual = y - y.mean() - found * x
    return found, float(np.sqrt(residual @ residual / (len(x) - 2) / (x @ x)))


def report(samples: Samples, warm_up: int, sheet: Sheet) -> None:
    """Print the slopes and hold that of memory to zero."""
    rows, verdicts = [], []
    for name, values, unit, scale in (
        ("memory of all processes", samples.memory, "MB", 1e6),
        ("object store", samples.store, "MB", 1e6),
        ("open files", samples.files, "", 1),
        ("seconds per round", samples.seconds, "s", 1),
    ):
        kept = values[warm_up:] / scale
        if np.isnan(kept).mean() > MISSING:
            rows.append([name, unit, "could not be read", *["-"] * 4])
            continue
        change, error = slope(kept)
        first, last = np.nanmean(kept[: len(kept) // 10 or 1]), np.nanmean(kept[-(len(kept) // 10 or 1) :])
        cells = [f"{first:.2f}", f"{last:.2f}", f"{change * 100:+.4f}", f"{error * 100:.4f}", f"{np.nanmax(kept):.2f}"]
        rows.append([name, unit, *cells])
        if name in ("memory of all processes", "object store", "open files"):
            text = f"{change * 100:+.4f} ± {error * 100:.4f} {unit}"
            verdicts.append((f"{name}: growth in 100 rounds", "0 within 2 errors", text, change <= 2 * error + 1e-9))
    columns = ("", "unit", "first tenth", "last tenth", "slope per 100 rounds", "standard error", "highest")
    sheet.table(f"Rounds {warm_up + 1} to {len(samples.memory)}", columns, rows)
    kinds = []
    for kind, values in sorted(samples.parts.items(), key=lambda item: -item[1][-1]):
        change, error = slope(values[warm_up:] / 1e6)
        kinds.append([kind, f"{values[-1] / 1e6:.1f}", f"{change * 100:+.4f}", f"{error * 100:.4f}"])
    sheet.table("Memory by process", ("process", "MB at the end", "slope per 100 rounds", "standard error"), kinds)
    stretches = []
    for start in range(0, len(samples.memory) - NUM_BLOCKS + 1, STRETCH):
        values = samples.memory[start : start + STRETCH] / 1e6
        change, error = slope(values)
        cells = [f"{np.nanmean(values):.1f}", f"{change * 100:+.3f}", f"{error * 100:.3f}"]
        stretches.append([f"{start + 1} to {start + len(values)}", *cells])
    sheet.table("Memory by stretch", ("rounds", "mean MB", "slope per 100 rounds", "standard error"), stretches)
    sheet.verdicts(verdicts)


@click.command()
@click.option("--rounds", default=4000, show_default=True)
@click.option("--clients", default=100, show_default=True)
@click.option("--triples", default=60, show_default=True, help="per client")
@click.option("--warm-up", default=2000, show_default=True, help="rounds before the slope begins")
@click.option("--output", type=click.Path(path_type=Path), help="write the tables as markdown")
def main(rounds: int, clients: int, triples: int, warm_up: int, output: Path | None) -> None:
    """Run the rounds and fit the slopes."""
    if rounds - warm_up < 2 * NUM_BLOCKS:
        raise click.ClickException(
            f"{rounds} rounds, {warm_up} of them warm-up, are too few: give {2 * NUM_BLOCKS} more"
        )
    os.environ.update({"OMP_NUM_THREADS": "1", **PYTHON})
    sheet = Sheet(f"Soak: {rounds} rounds of {clients} clients", output)
    with tempfile.TemporaryDirectory(prefix="fedsim-soak-") as name:
        data = make_data(Path(name) / "job", clients, triples)
        changes = {"federation.num_rounds": rounds, "output": str(Path(name) / "run")}
        samples = Samples(ProcessTree(os.getpid()), sheet, rounds)
        try:
            fedsim.run(fedsim.load_config(overrides={**data.settings(), **changes}), ray_runtime, samples)
        except fedsim.FedSimError as err:
            raise click.ClickException(str(err)) from err
    report(samples, warm_up, sheet)
    sheet.close()


if __name__ == "__main__":
    main()
