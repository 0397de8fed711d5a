"""FedE's own settings on FB15k-237, three clients: validation MRR by FedE's protocol, every five rounds.

    FEDSIM_DATA=data python benchmarks/fede_protocol.py --output runs/fede

To be held against FedE's public code on the same split: dim 128, gamma 10, Adam 1e-3 anew each round, batch 512, 256
tail negatives without known answers, temperature 1, 3 local epochs, rows averaged over their owners. Ranked are tails,
filtered, among a client's entities, after the aggregation; clients are weighted by triples. As in that code, RotatE
and ComplEx have 128 complex numbers per entity (256 here), values start uniform within (gamma + 2) / 128 (here normal,
of the same deviation), phases are scaled by pi over that, and ComplEx has no gamma. Unlike there, ranks are realistic:
ties in the middle.
"""

import json
import math
from pathlib import Path
from typing import Any

import click
from kept_runs import FEDE_MODEL, GAMMA, HIDDEN, RANGE, run_or_go_on
from tables import Sheet

FEDE: dict[str, Any] = FEDE_MODEL | {
    "federation.strategy": "fede",
    "model.phase_scale": math.pi / RANGE,
    "training.negatives": "filtered",
    "training.reset_optimizer": "always",
    "training.corruption": "tail",
    "evaluation.protocol": "fede",
}
SCORERS: dict[str, dict[str, Any]] = {
    "transe": {"model.dim": HIDDEN, "training.margin": GAMMA, "training.compile": True},
    "rotate": {"model.dim": 2 * HIDDEN, "training.margin": GAMMA, "training.compile": True},
    "complex": {"model.dim": 2 * HIDDEN, "training.margin": 0.0},
}


def run_scorer(scorer: str, split: str, rounds: int, folder: Path) -> dict[int, float]:
    """Run (or go on with) one scorer; returns round -> validation MRR."""
    settings = FEDE | SCORERS[scorer] | {"model.scorer": scorer, "data.split_file": split}
    run_or_go_on(settings | {"federation.num_rounds": rounds}, folder)
    ranked: dict[int, list[dict[str, float]]] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if line.get("valid") and line["client"] is not None:
            ranked.setdefault(line["round"], []).append(line["valid"])
    return {
        step: sum(item["mrr"] * item["num_queries"] for item in own) / sum(item["num_queries"] for item in own)
        for step, own in ranked.items()
    }


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="where runs and the table are kept")
@click.option("--scorer", "scorers", multiple=True, type=click.Choice(list(SCORERS)), help="these alone [default: all]")
@click.option("--split", default="fed3_relation_fede_seed2021", show_default=True)
@click.option("--rounds", default=50, show_default=True)
def main(output: Path, scorers: tuple[str, ...], split: str, rounds: int) -> None:
    """Print validation MRR against rounds."""
    sheet = Sheet("FedE's settings on FB15k-237", output / "fede_protocol.md")
    names = scorers or tuple(SCORERS)
    found = {name: run_scorer(name, split, rounds, output / f"{split}-{name}") for name in names}
    steps = sorted({round_num for curve in found.values() for round_num in curve})
    rows = [
        (str(step), *(f"{found[name][step]:.4f}" if step in found[name] else "" for name in names)) for step in steps
    ]
    sheet.table(f"Validation MRR (tails, filtered), {split}", ("round", *names), rows)
    sheet.close()


if __name__ == "__main__":
    main()
