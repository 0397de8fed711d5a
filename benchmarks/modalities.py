"""What each modality carries: link prediction from structure alone, with pictures, with texts, and with both.

    python benchmarks/modalities.py --output runs/modalities                   # wn_noto
    python benchmarks/modalities.py --output runs/modalities --data FB15k-237  # found by FEDSIM_DATA

All data is in one place (strategy central) and nothing is hidden but what the data set lacks, so the rows differ in the
modalities alone. The settings were chosen by a small search on the validation triples and are the same for all rows. A
run that is finished in the output folder is not done again. Prints filtered test MRR (realistic ranks, both sides,
epoch chosen on validation).
"""

import os
from pathlib import Path
from typing import Any

import click
import numpy as np
from machine import describe_machine
from quality import folder_name, run_all
from rich.console import Console
from rich.table import Table

INPUTS: dict[str, list[str] | None] = {
    "structure": [],
    "structure + image": ["image"],
    "structure + text": ["text"],
    "structure + image + text": ["image", "text"],
}
FIXED: dict[str, Any] = {
    "runtime.kind": "in_process",
    "federation.strategy": "central",
    "data.num_clients": 1,
    "data.missing_rate": 0.0,
    "model.imputer": "zero",
    "model.fusion": "gate",
    "checkpoint.keep": 1,
}
SETTINGS: dict[str, Any] = {
    "training.learning_rate": 0.01,
    "training.local_epochs": 3,
    "model.dropout": 0.6,
    "model.init_scale": 0.1,
}


def show(data: str, found: dict[str, list[dict[str, Any]]], console: Console) -> None:
    """Print mean and spread over the seeds, and the gain over structure alone."""
    seeds = len(next(iter(found.values())))
    table = Table(title=f"{data}: filtered test ranking, all data in one place, {seeds} seeds")
    for column in ("input", "MRR", "sd", "over structure", "Hits@1", "Hits@10", "valid MRR", "best round", "s/run"):
        table.add_column(column, justify="left" if column == "input" else "right")
    base: float | None = None
    for name, results in found.items():
        mrr = np.array([result["test"]["mrr"] for result in results])
        hits = [np.mean([result["test"][f"hits_at_{k}"] for result in results]) for k in (1, 10)]
        valid = np.mean([result["valid_mrr"] for result in results])
        rounds = ", ".join(str(result["best_round"]) for result in results)
        seconds = np.mean([sum(result["seconds"].values()) for result in results])
        base = float(mrr.mean()) if base is None else base
        spread = f"{mrr.std(ddof=1):.4f}" if seeds > 1 else "-"
        gain = f"{mrr.mean() / base - 1:+.1%}"
        cells = [f"{mrr.mean():.4f}", spread, gain, *(f"{value:.4f}" for value in hits), f"{valid:.4f}", rounds]
        table.add_row(name, *cells, f"{seconds:.0f}")
    console.print(table)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="where runs are kept")
@click.option("--data", default="wn_noto", show_default=True, help="a data set with image and text features")
@click.option("--seeds", default=3, show_default=True, help="seeds 0 .. n-1")
@click.option("--rounds", default=15, show_default=True, help="rounds of local_epochs epochs")
@click.option("--jobs", default=os.cpu_count() or 1, show_default=True, help="processes side by side")
def main(output: Path, data: str, seeds: int, rounds: int, jobs: int) -> None:
    """Compare what the modalities of one data set carry."""
    os.environ["OMP_NUM_THREADS"] = "1"
    console = Console(width=150)
    settings = FIXED | SETTINGS | {"data.path": data, "federation.num_rounds": rounds}
    console.print(f"{describe_machine()}\n{settings}", highlight=False)
    tasks = [
        (
            output / Path(data).name / folder_name(name) / f"seed{seed}",
            settings | {"data.modalities": used, "seed": seed},
        )
        for name, used in INPUTS.items()
        for seed in range(seeds)
    ]
    results = run_all(tasks, jobs, console)
    show(data, {name: results[i * seeds : (i + 1) * seeds] for i, name in enumerate(INPUTS)}, console)


if __name__ == "__main__":
    main()
