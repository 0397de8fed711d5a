"""What smaller messages save and cost: bytes and MRR on wn_noto for half precision, Top-K rows, and both.

    python benchmarks/communication.py --output runs/communication

Each setting runs with the same seeds, in this process, one after the other, seed by seed. A run that is finished in
the output folder is not done again. Bytes are those of all messages of a run, as `fedsim run` counts them; "MB to 95 %"
are those until the validation MRR is 95 % of the best one of float32 with the same seed.
"""

import json
import os
from pathlib import Path
from typing import Any

import click
import numpy as np
from tables import Sheet

import fedsim
from fedsim.results import NEAR_BEST, result_as_json
from fedsim.run_folder import RunFolder

METHODS: dict[str, dict[str, Any]] = {
    "mmfede": {"federation.strategy": "fede", "model.imputer": "zero"},
    "mmfed3-hide": {"federation.strategy": "mmfed3", "model.imputer": "diffusion"},
}
TOP_K = {"communication.top_k": 0.4, "communication.full_every": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"communication.dtype": "float16"},
    "top-K 0.4": TOP_K,
    "top-K 0.4, float16": TOP_K | {"communication.dtype": "float16"},
}


def run_one(folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Run one config, or read or finish what stands in its folder.

    Returns:
        The result as JSON, and ``curve``: (validation MRR, bytes so far) of each round.
    """
    config = fedsim.load_config(overrides=overrides | {"output": str(folder), "runtime.kind": "in_process"})
    if folder.exists() and fedsim.load_config(folder / "config.yaml") != config:
        raise click.ClickException(f"{folder} was run with another config; give a new --output")
    if not folder.exists():
        found = result_as_json(fedsim.run(config))
    elif not (folder / "result.json").is_file():
        found = result_as_json(fedsim.resume(folder))
    else:
        found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    rounds = [row for row in RunFolder(folder).read_metrics() if row["client"] is None]
    num_bytes = np.cumsum([row["bytes_up"] + row["bytes_down"] for row in rounds])
    return found | {
        "curve": [(row["valid"]["mrr"], int(so_far)) for row, so_far in zip(rounds, num_bytes, strict=True)]
    }


def bytes_to_95(result: dict[str, Any], best_mrr: float) -> int | None:
    """Return the bytes until a run's validation MRR was 95 % of `best_mrr`; None if it never was."""
    return next((num_bytes for mrr, num_bytes in result["curve"] if mrr >= NEAR_BEST * best_mrr), None)


def table_rows(results: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Make a method's rows: means over seeds, and what they are beside float32's."""
    base = results["float32"]
    rows = []
    for setting, found in results.items():
        mrr = np.array([item["test"]["mrr"] for item in found])
        change = mrr - np.array([item["test"]["mrr"] for item in base])
        up, down = (np.mean([item[name] for item in found]) for name in ("bytes_up", "bytes_down"))
        share = (up + down) / np.mean([item["bytes_up"] + item["bytes_down"] for item in base])
        spread = f"{mrr.std(ddof=1):.4f}" if len(mrr) > 1 else ""
        cells = [f"{mrr.mean():.4f}", spread, "" if setting == "float32" else f"{change.mean():+.4f}"]
        cells.append(f"{np.mean([item['test']['hits_at_10'] for item in found]):.4f}")
        reached = [bytes_to_95(item, other["valid_mrr"]) for item, other in zip(found, base, strict=True)]
        until = "not in all seeds" if None in reached else f"{np.mean([n for n in reached if n is not None]) / 1e6:.1f}"
        rows.append([setting, *cells, f"{up / 1e6:.1f}", f"{down / 1e6:.1f}", f"{share:.0%}", until])
    return rows


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="where runs are kept")
@click.option("--markdown", type=click.Path(path_type=Path), help="write the tables there too")
@click.option("--seeds", default=3, show_default=True, help="seeds 0 .. n-1")
@click.option("--rounds", default=10, show_default=True)
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="these methods alone")
def main(output: Path, markdown: Path | None, seeds: int, rounds: int, methods: tuple[str, ...]) -> None:
    """Run every setting with every seed and print the table."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sheet = Sheet("Communication", markdown)
    columns = ("messages", "test MRR", "sd", "against float32", "Hits@10", "MB up", "MB down", "bytes", "MB to 95 %")
    for method in methods or tuple(METHODS):
        found: dict[str, list[dict[str, Any]]] = {setting: [] for setting in SETTINGS}
        for seed in range(seeds):
            for setting, changes in SETTINGS.items():
                name = "".join(c if c.isalnum() else "_" for c in setting)
                fixed = {"federation.num_rounds": rounds, "seed": seed, "checkpoint.keep": 1}
                result = run_one(output / method / name / f"seed{seed}", fixed | METHODS[method] | changes)
                sheet.progress(f"{method}, {setting}, seed {seed}: test MRR {result['test']['mrr']:.4f}")
                found[setting].append(result)
        sheet.table(f"{method}, wn_noto, {rounds} rounds, {seeds} seed(s)", columns, table_rows(found))
    sheet.close()


if __name__ == "__main__":
    main()
