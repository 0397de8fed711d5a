"""Link prediction with half of the texts and pictures hidden: every method, tuned alike, five seeds.

    python benchmarks/quality.py --output runs/quality                    # wn_noto
    python benchmarks/quality.py --output runs/quality --data cn_visual   # found by FEDSIM_DATA

Each method is tuned with the same budget (`TUNING`, on validation, with a seed of its own), then run with five seeds.
A run that is finished in the output folder is not done again, so a stopped benchmark goes on where it was. Prints
filtered test MRR (realistic ranks, both sides, weighted by test triples, epoch chosen on validation), the paired
tests, and the imputation and consistency instruments.
"""

import json
import multiprocessing
import os
import platform
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

METHODS: dict[str, dict[str, Any]] = {
    "local (structure)": {"federation.strategy": "local", "model.fusion": "none"},
    "fede (structure)": {"federation.strategy": "fede", "model.fusion": "none"},
    "mmfede zero": {"federation.strategy": "fede", "model.imputer": "zero"},
    "mmfede mean": {"federation.strategy": "fede", "model.imputer": "mean"},
    "mmfede random": {"federation.strategy": "fede", "model.imputer": "random"},
    "mmfede + HidE": {"federation.strategy": "fede", "model.imputer": "diffusion"},
    "mmfed3 zero": {"federation.strategy": "mmfed3", "model.imputer": "zero"},
    "mmfed3-hide": {"federation.strategy": "mmfed3", "model.imputer": "diffusion"},
    "central, all visible": {"federation.strategy": "central", "model.imputer": "zero", "data.missing_rate": 0.0},
}
TUNING: list[dict[str, Any]] = [
    {"training.learning_rate": 0.01, "model.dropout": 0.4},
    {"training.learning_rate": 0.01, "model.dropout": 0.6},
]
DATA: dict[str, dict[str, Any]] = {
    "wn_noto": {"data.path": "wn_noto"},
    "cn_visual": {"data.path": "cn_visual", "data.split": "given", "data.split_file": "fed3_relation"},
}
TUNING_SEED = 100
BASELINE, OURS = "mmfede zero", "mmfed3-hide"


def run_one(task: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    """Run one config in this process, unless its result stands already; returns the result."""
    import fedsim

    folder, overrides = task
    result_file = folder / "result.json"
    config = fedsim.load_config(overrides=overrides | {"output": str(folder)})
    if folder.exists() and fedsim.load_config(folder / "config.yaml") != config:
        raise click.ClickException(f"{folder} was run with another config; give a new --output")
    if not folder.exists():
        fedsim.run(config)
    elif not result_file.is_file():
        fedsim.resume(folder)
    result: dict[str, Any] = json.loads(result_file.read_text())
    return result


def run_all(tasks: Iterable[tuple[Path, dict[str, Any]]], jobs: int, console: Console) -> list[dict[str, Any]]:
    """Run tasks in parallel processes; results in the order of the tasks."""
    tasks = list(tasks)
    started = time.perf_counter()
    results = []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for (folder, _), result in zip(tasks, pool.map(run_one, tasks), strict=True):
            minutes = (time.perf_counter() - started) / 60
            valid, test = result["valid_mrr"], result["test"]["mrr"]
            console.print(f"{minutes:6.1f} min  {folder.parent.name}/{folder.name}: valid {valid:.4f} test {test:.4f}")
            results.append(result)
    return results


def folder_name(method: str) -> str:
    """Make a folder name of a method's name."""
    return "".join(c if c.isalnum() else "_" for c in method)


def tune(data: str, methods: list[str], output: Path, rounds: int, jobs: int, console: Console) -> dict[str, Any]:
    """Choose each method's settings on validation, all with the same number of trials."""
    tasks = [
        (
            output / data / folder_name(method) / f"tune{number}",
            _base(data, rounds, TUNING_SEED) | METHODS[method] | settings,
        )
        for method in methods
        for number, settings in enumerate(TUNING)
    ]
    results = run_all(tasks, jobs, console)
    chosen = {}
    for index, method in enumerate(methods):
        trials = results[index * len(TUNING) : (index + 1) * len(TUNING)]
        chosen[method] = TUNING[int(np.argmax([trial["valid_mrr"] for trial in trials]))]
    return chosen


def _base(data: str, rounds: int, seed: int) -> dict[str, Any]:
    fixed = {"runtime.kind": "in_process", "federation.num_rounds": rounds, "seed": seed, "checkpoint.keep": 1}
    return DATA[data] | fixed


def report(data: str, found: dict[str, list[dict[str, Any]]], chosen: dict[str, Any], console: Console) -> None:
    """Print the tables of one data set."""
    ranking = Table(title=f"{data}: filtered test MRR, {len(next(iter(found.values())))} seeds")
    for column in ("method", "MRR", "sd", "Hits@1", "Hits@10", "p against the one above", "lr", "dropout", "s/run"):
        ranking.add_column(column, justify="left" if column == "method" else "right")
    above: np.ndarray | None = None
    for method, results in found.items():
        mrr = np.array([result["test"]["mrr"] for result in results])
        hits = [np.mean([result["test"][f"hits_at_{k}"] for result in results]) for k in (1, 10)]
        p_value = "" if above is None else f"{stats.ttest_rel(mrr, above).pvalue:.4f}"
        seconds = np.mean([sum(result["seconds"].values()) for result in results])
        settings = [str(value) for value in chosen[method].values()]
        cells = [f"{mrr.mean():.4f}", f"{mrr.std(ddof=1):.4f}", *(f"{h:.4f}" for h in hits), p_value, *settings]
        ranking.add_row(method, *cells, f"{seconds:.0f}")
        above = mrr
    console.print(ranking)
    if BASELINE in found and OURS in found:
        base = np.array([result["test"]["mrr"] for result in found[BASELINE]])
        ours = np.array([result["test"]["mrr"] for result in found[OURS]])
        test = stats.ttest_rel(ours, base)
        gain = ours.mean() / base.mean() - 1
        console.print(f"{OURS} over {BASELINE}: {gain:+.1%}, paired t-test p = {test.pvalue:.5f}, n = {len(ours)}")
    _instruments(data, found, console)


def _instruments(data: str, found: dict[str, list[dict[str, Any]]], console: Console) -> None:
    """Print imputation quality on the features kept aside, and semantic consistency between clients."""
    table = Table(title=f"{data}: hidden features, imputed token against the true one")
    for column in ("method", "modality / imputer", "cosine", "retrieval Hits@10"):
        table.add_column(column, justify="right" if column in ("cosine", "retrieval Hits@10") else "left")
    for method, results in found.items():
        for row in results[0]["imputation"]:
            values = {name: np.mean([r["imputation"][row][name] for r in results]) for name in ("cosine", "hits_at_10")}
            table.add_row(method, row, f"{values['cosine']:.3f}", f"{values['hits_at_10']:.3f}")
    console.print(table)
    table = Table(title=f"{data}: semantic consistency, mean cosine between clients over shared entities")
    for column in ("method", "view / token", "cosine"):
        table.add_column(column)
    for method, results in found.items():
        for row in results[0]["consistency"]:
            table.add_row(method, row, f"{np.mean([result['consistency'][row] for result in results]):.3f}")
    console.print(table)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="where runs and tables are kept")
@click.option("--data", type=click.Choice(list(DATA)), default="wn_noto", show_default=True)
@click.option("--seeds", default=5, show_default=True, help="seeds 0 .. n-1")
@click.option("--rounds", default=10, show_default=True)
@click.option("--tuning-rounds", default=6, show_default=True)
@click.option("--jobs", default=os.cpu_count() or 1, show_default=True, help="processes side by side")
@click.option("--method", "only", multiple=True, type=click.Choice(list(METHODS)), help="these methods alone")
def main(
    output: Path, data: str, seeds: int, rounds: int, tuning_rounds: int, jobs: int, only: tuple[str, ...]
) -> None:
    """Tune, run and compare the methods on one data set."""
    os.environ["OMP_NUM_THREADS"] = "1"
    console = Console(width=150)
    methods = list(only) or list(METHODS)
    console.print(f"{platform.machine()}, {os.cpu_count()} CPUs, {jobs} processes; tuning: {TUNING}")
    chosen = tune(data, methods, output, tuning_rounds, jobs, console)
    tasks = [
        (
            output / data / folder_name(method) / f"seed{seed}",
            _base(data, rounds, seed) | METHODS[method] | chosen[method],
        )
        for seed in range(seeds)  # seed by seed, so that a stopped benchmark has whole seeds to report
        for method in methods
    ]
    results = run_all(tasks, jobs, console)
    found = {method: results[index :: len(methods)] for index, method in enumerate(methods)}
    report(data, found, chosen, console)


if __name__ == "__main__":
    main()
