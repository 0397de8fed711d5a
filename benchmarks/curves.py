"""Draws how methods of a finished benchmark converge: validation MRR against rounds, bytes and seconds.

    fedsim benchmark --group c --data cn_visual --seeds 5 --output runs/strategies
    python benchmarks/curves.py runs/strategies/cn_visual/0.6 --output docs/convergence.png

The curve of a method is the mean over its seeds; the band is from the lowest to the highest seed. Bytes are those that
all clients sent and were sent so far; seconds are those of the rounds' phases so far, where two runs share the machine.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("agg")
from matplotlib import pyplot

AXES = {"rounds": "round", "megabytes": "MB sent, up and down", "seconds": "seconds"}
LINES = ("-", "--", ":", "-.")  # told apart without colours too


@dataclass(frozen=True)
class Curve:
    """One run: validation MRR after each validated round, and what the rounds had cost by then."""

    mrr: npt.NDArray[np.float64]
    costs: Mapping[str, npt.NDArray[np.float64]]


def read_curve(run: Path) -> Curve:
    """Read the rounds of a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rounds = [row for row in rows if row["client"] is None]
    num_bytes = np.cumsum([row["bytes_up"] + row["bytes_down"] for row in rounds])
    seconds = np.cumsum([sum(row["phase_seconds"].values()) for row in rounds])
    numbers = np.array([row["round"] for row in rounds])
    validated = np.array(["valid" in row for row in rounds])
    mrr = np.array([row["valid"]["mrr"] for row in rounds if "valid" in row])
    costs = {"rounds": numbers, "megabytes": num_bytes / 1e6, "seconds": seconds}
    return Curve(mrr, {name: values[validated].astype(float) for name, values in costs.items()})


def draw(curves: Mapping[str, Sequence[Curve]], title: str, output: Path) -> None:
    """Draw one panel per cost."""
    figure, panels = pyplot.subplots(1, len(AXES), figsize=(12, 3.8), sharey=True, layout="constrained")
    for panel, (name, label) in zip(panels, AXES.items(), strict=True):
        for number, (method, runs) in enumerate(curves.items()):
            length = min(len(run.mrr) for run in runs)
            mrr = np.array([run.mrr[:length] for run in runs])
            cost = np.mean([run.costs[name][:length] for run in runs], 0)
            style = LINES[number // 10 % len(LINES)] if number >= 10 else LINES[number % len(LINES)]
            (line,) = panel.plot(cost, mrr.mean(0), style, label=method, linewidth=1.6)
            panel.fill_between(cost, mrr.min(0), mrr.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
        panel.set_xlim(left=0)
    panels[0].set_ylabel("validation MRR (filtered)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(output, dpi=90)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--method", "methods", multiple=True, help="draw these alone; repeatable")
@click.option("--title", default="", help="above the picture")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="PNG or SVG")
def main(folder: Path, methods: tuple[str, ...], title: str, output: Path) -> None:
    """Draw the runs of FOLDER, a missing rate of a benchmark's data: FOLDER/METHOD/seedN."""
    names = methods or tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    curves = {name: [read_curve(run) for run in sorted(folder.glob(f"{name}/seed*")) if run.is_dir()] for name in names}
    missing = [name for name, runs in curves.items() if not runs]
    if missing or not curves:
        raise click.ClickException(f"{folder} has no runs of {', '.join(missing) or 'any method'}")
    draw(curves, title or f"{folder.parent.name}, missing rate {folder.name}", output)


if __name__ == "__main__":
    main()
