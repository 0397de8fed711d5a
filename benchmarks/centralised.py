"""Centralised references: ComplEx on structure alone, one client that holds the whole graph.

    python benchmarks/centralised.py --data WN9-IMG --output runs/wn9
    python benchmarks/centralised.py --data FB15k-237 --output runs/fb15k237

The data sets are not bundled: import them with `fedsim data import` into a folder that FEDSIM_DATA names. The settings
are those of Lacroix et al. (ICML 2018): cross-entropy over all entities, reciprocal relations, Adagrad and N3. Prints
filtered test metrics (realistic ranks, both sides, all entities compete, epoch chosen on validation) and the time.
"""

import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import click
from machine import describe_machine
from rich.console import Console
from rich.table import Table

import fedsim
from fedsim.data.clients import load_federated_split
from fedsim.data.dataset import load_dataset, resolve_dataset
from fedsim.report.console import ConsoleObserver

FIXED: dict[str, Any] = {
    "runtime.kind": "in_process",
    "federation.strategy": "local",
    "data.num_clients": 1,
    "data.split": "relation",
    "model.fusion": "none",
    "model.scorer": "complex",
    "model.dim": 128,
    "model.dropout": 0.0,
    "model.init_scale": 0.001,
    "training.loss": "one_vs_all",
    "training.reciprocal": True,
    "training.optimizer": "adagrad",
    "training.learning_rate": 0.1,
    "training.n3_weight": 0.05,
    "training.local_epochs": 1,
    "checkpoint.every": 1000,
    "checkpoint.keep": 1,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "WN9-IMG": {"training.batch_size": 500, "federation.num_rounds": 30, "evaluation.every": 10},
    "FB15k-237": {"training.batch_size": 1000, "federation.num_rounds": 12, "evaluation.every": 2},
}


def show(data: str, result: fedsim.RunResult, seconds: float, console: Console) -> None:
    """Print the test metrics."""
    table = Table(title=f"{data}: ComplEx, structure alone, all data in one place")
    for column in ("valid MRR", "test MRR", "Hits@1", "Hits@3", "Hits@10", "test queries", "best epoch", "minutes"):
        table.add_column(column, justify="right")
    test = result.test
    metrics = [result.valid_mrr, test.mrr, test.hits_at_1, test.hits_at_3, test.hits_at_10]
    cells = [f"{value:.4f}" for value in metrics]
    table.add_row(*cells, f"{test.num_queries:,}", str(result.best_round), f"{seconds / 60:.1f}")
    console.print(table)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="the run's folder; must not exist")
@click.option("--data", type=click.Choice(list(SETTINGS)), default="WN9-IMG", show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(output: Path, data: str, seed: int) -> None:
    """Train and rank one reference."""
    os.environ["OMP_NUM_THREADS"] = "1"
    console = Console(width=150)
    settings = FIXED | SETTINGS[data] | {"data.path": data, "seed": seed}
    console.print(f"{describe_machine()}\n{settings}", highlight=False)
    try:
        config = fedsim.load_config(overrides=settings | {"output": str(output)})
        graph = load_dataset(resolve_dataset(data))
        moved = load_federated_split(graph, config).num_moved
        console.print(
            f"{moved} of {len(graph.valid) + len(graph.test)} valid and test triples moved to train, those whose head, "
            "tail or relation is in no train triple"
        )
        started = time.perf_counter()
        with closing(ConsoleObserver(console)) as observer:
            result = fedsim.run(config, observer=observer)
    except fedsim.FedSimError as err:
        raise click.ClickException(str(err)) from err
    show(data, result, time.perf_counter() - started, console)


if __name__ == "__main__":
    main()
