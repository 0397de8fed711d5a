"""FedLU's partitions of FB15k-237: a client's private model alone, FedE, and FedLU.

    FEDSIM_DATA=data python benchmarks/partitions.py --output runs/partitions

TransE on structure alone, dim 128, gamma 10, Adam 1e-3, batch 512, 256 negatives that a batch shares, 3 local epochs;
both sides are ranked, filtered, among a client's own entities; test MRR is of the round that was best on validation.
All strategies have the same settings. A client answers with its own model after its local epochs: with FedE its copy of
the global one, with FedLU the private one. FedLU's authors report that the latter is better; the last table says if it
is here, and if it is better than a model that is trained alone. A run that is finished in the output folder is not done
again.
"""

import json
from pathlib import Path
from typing import Any

import click
from kept_runs import FEDE_MODEL, GAMMA, HIDDEN, run_or_go_on
from tables import Sheet

SETTINGS: dict[str, Any] = FEDE_MODEL | {
    "model.scorer": "transe",
    "model.dim": HIDDEN,
    "training.negatives": "shared",
    "training.margin": GAMMA,
    "training.compile": True,
}
STRATEGIES = ("local", "fede", "fedlu")
SPLITS = {"R3": "fedlu_R3FL", "C3": "fedlu_C3FL"}


def run_one(strategy: str, split: str, seed: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Run (or go on with) one strategy; returns its result."""
    own = {"federation.strategy": strategy, "data.split_file": split, "seed": seed}
    run_or_go_on(SETTINGS | own | {"federation.num_rounds": rounds}, folder)
    return dict(json.loads((folder / "result.json").read_text(encoding="utf-8")))


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="where runs and the table are kept")
@click.option("--partition", "names", multiple=True, type=click.Choice(list(SPLITS)), help="these alone [default: all]")
@click.option("--rounds", default=30, show_default=True)
@click.option("--seeds", default=1, show_default=True, help="seeds 0 .. n-1")
def main(output: Path, names: tuple[str, ...], rounds: int, seeds: int) -> None:
    """Print test MRR by partition and strategy."""
    sheet = Sheet("FedLU's partitions of FB15k-237", output / "partitions.md")
    rows, verdicts = [], []
    for name in names or tuple(SPLITS):
        means = {}
        for strategy in STRATEGIES:
            found = []
            for seed in range(seeds):
                folder = output / f"{name}-{strategy}-{rounds}-seed{seed}"
                found.append(run_one(strategy, SPLITS[name], seed, rounds, folder))
                sheet.progress(f"{folder.name}: test MRR {found[-1]['test']['mrr']:.4f}")
            means[strategy] = sum(result["test"]["mrr"] for result in found) / seeds
            hits = [sum(result["test"][f"hits_at_{k}"] for result in found) / seeds for k in (1, 10)]
            best = ", ".join(str(result["best_round"]) for result in found)
            rows.append([name, strategy, f"{means[strategy]:.4f}", *(f"{hit:.4f}" for hit in hits), best])
        for other, title in (("fede", "FedE's local models"), ("local", "local training")):
            gain = means["fedlu"] - means[other]
            verdicts.append((f"{name}: FedLU above {title}, test MRR", "> 0", f"{gain:+.4f}", gain > 0))
    columns = ("partition", "strategy", "test MRR", "Hits@1", "Hits@10", "best rounds")
    sheet.table(f"TransE, {rounds} rounds, {seeds} seeds", columns, rows)
    sheet.verdicts(verdicts)
    sheet.close()


if __name__ == "__main__":
    main()
