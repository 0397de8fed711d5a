"""What a finished benchmark measured besides ranking: imputed features against the true ones, and semantic consistency.

    fedsim benchmark --data cn_visual --seeds 5 --output runs/grid
    python benchmarks/instruments.py runs/grid/cn_visual/0.6 --output runs/instruments.md

Means over the seeds, from each run's `result.json`. Imputation: mean cosine of a hidden feature's true token and the
imputed one, and retrieval Hits@10 of the true entity among all of the client's that have the modality, by the
method's own imputer; mean, ridge and MLP regression are fitted on the same client's visible tokens, in the run's token
space, so compare along a row. Methods that leave zeros impute nothing.
Consistency: mean cosine between clients over the entities that they share, all tokens side by side and each alone.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import click
from tables import Sheet

Results = Mapping[str, Sequence[Mapping[str, Any]]]
REFERENCES = ("mean", "ridge", "mlp")
VIEWS = {"global": "global copies", "local": "private models"}


def read_results(folder: Path, names: Sequence[str]) -> Results:
    """Read the results of all seeds that are finished, method -> results; methods without any are left out."""
    paths = {name: sorted(folder.glob(f"{name}/seed*/result.json")) for name in names}
    return {
        name: [json.loads(path.read_text(encoding="utf-8")) for path in found] for name, found in paths.items() if found
    }


def imputation_rows(found: Results) -> list[list[str]]:
    """Write one row per method and modality: the method's own imputer, then the references."""
    rows = []
    for method, results in found.items():
        measured = results[0]["imputation"] or {}
        for modality in dict.fromkeys(name.partition("/")[0] for name in measured):
            names = [name.partition("/")[2] for name in measured if name.startswith(f"{modality}/")]
            own = own_imputer(names)
            if own != "zero":
                # Where the method's own imputer has a reference's name, the reference is called <name>_fitted.
                references = [name if f"{name}_fitted" not in names else f"{name}_fitted" for name in REFERENCES]
                values = [_pair(results, f"{modality}/{column}") for column in (own, *references)]
                rows.append([method, modality, own, *values])
    return rows


def own_imputer(names: Sequence[str]) -> str:
    """Find the method's own imputer among the names of what was measured of one modality."""
    for name in REFERENCES:
        if f"{name}_fitted" in names:
            return name
    others = [name for name in names if name not in REFERENCES]
    return others[0] if others else "mean"  # the mean is its own reference


def consistency_rows(found: Results) -> list[list[str]]:
    """Write one row per method and view: total, then each token."""
    tokens = dict.fromkeys(
        name.partition("/")[2] for results in found.values() for name in results[0]["consistency"] or {}
    )
    order = ["total", *(token for token in tokens if token != "total")]
    rows = []
    for method, results in found.items():
        measured = results[0]["consistency"] or {}
        for view, title in VIEWS.items():
            if f"{view}/total" in measured:
                names = [f"{view}/{token}" for token in order]
                values = [
                    f"{fmean(r['consistency'][name] for r in results):.3f}" if name in measured else ""
                    for name in names
                ]
                rows.append([method, title, *values])
    return [["method", "of", *order], *rows]


def _pair(results: Sequence[Mapping[str, Any]], column: str) -> str:
    found = [result["imputation"][column] for result in results if column in result["imputation"]]
    if not found:
        return ""
    return " / ".join(f"{fmean(item[name] for item in found):.3f}" for name in ("cosine", "hits_at_10"))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--method", "methods", multiple=True, help="these alone; repeatable")
@click.option("--output", type=click.Path(path_type=Path), help="markdown file")
def main(folder: Path, methods: tuple[str, ...], output: Path | None) -> None:
    """Show the runs of FOLDER, a missing rate of a benchmark's data: FOLDER/METHOD/seedN."""
    names = methods or tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    found = read_results(folder, names)
    missing = [name for name in names if name not in found]
    if not found:
        raise click.ClickException(f"{folder} has no finished runs of {', '.join(names) or 'any method'}")
    sheet = Sheet(f"Imputation and consistency, {folder.parent.name}, missing {folder.name}", output)
    sheet.say(f"Seeds: {', '.join(f'{name} {len(results)}' for name, results in found.items())}.")
    if missing:
        sheet.say(f"Not finished: {', '.join(missing)}.")
    header = ("method", "modality", "imputer", "its own", *REFERENCES)
    sheet.table("Hidden features, cosine / retrieval Hits@10", header, imputation_rows(found))
    columns, *rows = consistency_rows(found)
    sheet.table("Semantic consistency", columns, rows)
    sheet.close()


if __name__ == "__main__":
    main()
