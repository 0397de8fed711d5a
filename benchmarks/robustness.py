"""What attackers cost: MRR under attack x aggregator x share of attackers.

    python benchmarks/robustness.py --output runs/robustness                  # cn_visual, found by FEDSIM_DATA
    python benchmarks/robustness.py --output runs/small --data wn_noto --attack sign_flip --aggregator median

Many clients by the dirichlet split, MMFedE with zeros: rows and modules are averaged and nothing else, so that the
aggregator alone makes the difference. Clients are ranked with what the server aggregated (`evaluation.evaluate_on`)
after the last round: damage must not be undone by a last local training, nor hidden by choosing a round before the
attack works. The tables have the validation MRR of the clients that attack in no cell, the same ones everywhere,
weighted by their triples; a run that an attack brought down counts as 0. A run that is finished in the output folder
is not done again.

Robust aggregators work behind a bound on the size of whole updates (`robustness.max_norm_ratio`, twice the cohort's
median), as does `bounded_mean`, the plain mean otherwise: a row has few senders, and attackers may be most of them,
but over a whole update they show. Against attackers who stay below the bound: `--strength 1.9`.

Targets: with the largest share of attackers a robust aggregator keeps 90 % of the clean MRR of the plain mean under
every attack, and the plain mean loses more than half under at least one.
"""

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
from tables import Sheet

from fedsim.federated.attacks import ATTACKS
from fedsim.federated.robust import AGGREGATORS

BASE: dict[str, Any] = {
    "federation.strategy": "fede",
    "model.imputer": "zero",
    "data.split": "dirichlet",
    "data.dirichlet_alpha": 2.0,
    "evaluation.evaluate_on": "aggregated",
    "runtime.kind": "in_process",
    "runtime.torch_threads": 1,
    "checkpoint.keep": 1,
    "watching.tensorboard": False,
    "report.html": False,
}
CHOICES = [*AGGREGATORS, "bounded_mean"]
STRENGTH = {"alie": 1.5}  # the paper's own z is below 0.2 for 20 clients, and nobody could see it


@dataclass(frozen=True)
class Cell:
    """One run: attack (None: nobody attacks), aggregator, share of attackers, seed."""

    attack: str | None
    aggregator: str
    share: float
    seed: int

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        attack = "clean" if self.attack is None else f"{self.attack}-{self.share:g}"
        return f"{attack}-{self.aggregator}-seed{self.seed}"


def attackers(num_clients: int, share: float, seed: int) -> list[int]:
    """Choose the attackers, such that those of a smaller share attack with a larger one too."""
    order = np.random.default_rng(seed).permutation(num_clients)
    return sorted(int(client) for client in order[: round(share * num_clients)])


def run_cell(folder: Path, overrides: dict[str, Any]) -> dict[int, tuple[float, int]]:
    """Run one config, unless its rows stand already; returns client -> (MRR, queries) after the last round."""
    from kept_runs import run_or_go_on

    config = run_or_go_on(overrides, folder)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    last = [row for row in rows if row["round"] == config.federation.num_rounds and row["client"] is not None]
    return {row["client"]: (row["valid"]["mrr"], row["valid"]["num_queries"]) for row in last}


def run_all(tasks: dict[Cell, tuple[Path, dict[str, Any]]], jobs: int, sheet: Sheet) -> dict[Cell, Any]:
    """Run the cells side by side; a run that stopped is its message."""
    found: dict[Cell, Any] = {}
    started = time.perf_counter()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        pending = {pool.submit(run_cell, *task): cell for cell, task in tasks.items()}
        for done in as_completed(pending):
            cell, error = pending[done], done.exception()
            found[cell] = str(error) if error is not None else done.result()
            note = found[cell] if error is not None else "done"
            sheet.progress(f"{(time.perf_counter() - started) / 60:6.1f} min  {cell.name}: {note}")
    return found


def honest_mrr(result: Any, honest: Sequence[int]) -> float | None:
    """Average over the honest clients, weighted by their queries; None if the run stopped."""
    if isinstance(result, str):
        return None
    known = [result[client] for client in honest if client in result]
    return float(sum(mrr * number for mrr, number in known) / sum(number for _, number in known))


def report(
    found: dict[Cell, Any], shares: Sequence[float], honest: dict[int, list[int]], sheet: Sheet
) -> list[tuple[str, str, str, bool]]:
    """Print a table per share of attackers; returns the verdicts on the targets."""

    def mean(attack: str | None, aggregator: str, share: float) -> float | None:
        values = [honest_mrr(found[cell], honest[cell.seed]) for cell in found if _is(cell, attack, aggregator, share)]
        # A run that the attack brought down has no MRR left: it counts as zero.
        return float(np.mean([value or 0.0 for value in values])) if values else None

    attacks = list(dict.fromkeys(cell.attack for cell in found if cell.attack is not None))
    aggregators = list(dict.fromkeys(cell.aggregator for cell in found))
    clean = {name: mean(None, name, 0.0) or 0.0 for name in aggregators}
    base = clean.get("mean", 0.0)
    for share in shares:
        rows = [["nobody attacks", *(f"{clean[name]:.3f}" for name in aggregators)]]
        for attack in attacks:
            kept = [mean(attack, name, share) or 0.0 for name in aggregators]
            rows.append([attack, *(f"{value:.3f} ({value / base:.0%})" if base else f"{value:.3f}" for value in kept)])
        title = f"{share:.0%} of the clients attack: MRR of the honest ones (share of the plain mean's clean MRR)"
        sheet.table(title, ["attack", *aggregators], rows)
    if not base or not attacks:
        return []
    worst = {name: min(mean(attack, name, shares[-1]) or 0.0 for attack in attacks) / base for name in aggregators}
    best = max((name for name in aggregators if name != "mean"), key=lambda name: worst[name], default=None)
    verdicts = [("plain mean under its worst attack", "below 50 %", f"{worst['mean']:.0%}", worst["mean"] < 0.5)]
    if best is not None:
        verdicts.append((f"{best} under its worst attack", "at least 90 %", f"{worst[best]:.0%}", worst[best] >= 0.9))
    return verdicts


def _is(cell: Cell, attack: str | None, aggregator: str, share: float) -> bool:
    return (cell.attack, cell.aggregator, cell.share) == (attack, aggregator, share)


def check_strength(strength: float, attacks: Sequence[str]) -> None:
    """Refuse a strength that one of the attacks cannot have: its runs would look like runs that it brought down."""
    for name in attacks:
        limit = ATTACKS[name].max_strength
        if limit is not None and strength > limit:
            raise click.BadParameter(f"{name} takes at most {limit:g}; give other --attack", param_hint="--strength")


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="where the runs are kept")
@click.option("--data", default="cn_visual", show_default=True)
@click.option("--clients", default=20, show_default=True)
@click.option("--rounds", default=30, show_default=True)
@click.option("--seeds", default=1, show_default=True, help="seeds 0 .. n-1")
@click.option("--share", "shares", multiple=True, type=click.FloatRange(0.01, 0.49), default=(0.1, 0.2))
@click.option("--attack", "attacks", multiple=True, type=click.Choice(list(ATTACKS)), help="these alone")
@click.option("--aggregator", "names", multiple=True, type=click.Choice(CHOICES), help="these alone")
@click.option(
    "--strength",
    type=click.FloatRange(0, min_open=True),
    help="of the attacks, which must all take it [default: each one's own]",
)
@click.option("--bound", default=2.0, show_default=True, help="on the size of updates, but for the plain mean")
@click.option("--set", "changes", nargs=2, multiple=True, metavar="FIELD VALUE", help="change the config of all runs")
@click.option("--jobs", default=os.cpu_count() or 1, show_default=True, help="processes side by side")
@click.option("--sheet", "sheet_file", type=click.Path(path_type=Path), help="markdown file for the tables")
def main(
    output: Path,
    data: str,
    clients: int,
    rounds: int,
    seeds: int,
    shares: tuple[float, ...],
    attacks: tuple[str, ...],
    names: tuple[str, ...],
    strength: float | None,
    bound: float,
    changes: tuple[tuple[str, str], ...],
    jobs: int,
    sheet_file: Path | None,
) -> None:
    """Run and compare aggregators under attack."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if strength is not None:
        check_strength(strength, attacks or tuple(ATTACKS))
    sheet = Sheet("Robust aggregation under attack", sheet_file)
    shares = tuple(sorted(shares))
    aggregators = list(names) or CHOICES
    base = BASE | {"data.path": data, "data.num_clients": clients, "federation.num_rounds": rounds}
    base |= {"federation.max_failed_clients": clients, "evaluation.every": rounds, **dict(changes)}
    tasks: dict[Cell, tuple[Path, dict[str, Any]]] = {}
    for seed in range(seeds):
        for aggregator in aggregators:
            cells = [Cell(None, aggregator, 0.0, seed)]
            cells += [Cell(attack, aggregator, share, seed) for attack in (attacks or ATTACKS) for share in shares]
            for cell in cells:
                own = base | {"seed": seed, "federation.aggregator": aggregator.removeprefix("bounded_")}
                if aggregator != "mean":
                    own["robustness.max_norm_ratio"] = bound
                if cell.attack is not None:
                    own["adversary.attack"] = cell.attack
                    own["adversary.clients"] = attackers(clients, cell.share, seed)
                    own["robustness.attacker_share"] = max(shares)
                    own["adversary.strength"] = strength or STRENGTH.get(cell.attack)
                tasks[cell] = (output / data / cell.name, own)
    found = run_all(tasks, jobs, sheet)
    everybody = {seed: set(range(clients)) for seed in range(seeds)}
    honest = {seed: sorted(everybody[seed] - set(attackers(clients, shares[-1], seed))) for seed in everybody}
    sheet.verdicts(report(found, shares, honest, sheet))
    sheet.close()


if __name__ == "__main__":
    main()
