"""The table for programs and for doing it again: every run with its folder, its numbers and its command."""

import csv
import io
import json
import os
import platform
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedsim.benchmark.comparison import Entry, RecipeTable
from fedsim.benchmark.execution import Outcome
from fedsim.report.console import shown_path

TEST_METRICS = ("mrr", "hits_at_1", "hits_at_3", "hits_at_5", "hits_at_10")
FIELDS = (
    *("data", "missing", "method", "groups", "seed", "status"),
    *(f"test_{name}" for name in TEST_METRICS),
    *("valid_mrr", "best_round", "seconds", "bytes_up", "bytes_down", "tuned", "message", "run", "command"),
)


def as_csv(tables: Sequence[RecipeTable]) -> str:
    """Write one line per missing rate, method and seed."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for entry, seed, outcome in _runs(tables):
        writer.writerow(_row(entry, seed, outcome))
    return text.getvalue()


def commits(folders: Iterable[Path]) -> list[str]:
    """Return the commits of fedsim that made runs, as far as they were in a git checkout; one, if all is well."""
    found = set()
    for folder in folders:
        file = folder / "versions.json"
        if file.is_file():
            commit, _, changed = (json.loads(file.read_text(encoding="utf-8"))["git_commit"] or "").partition("-")
            found.add(f"{commit[:12]}{' with changes' if changed else ''}")
    return sorted(found - {""})


def as_run_list(tables: Sequence[RecipeTable], output: Path) -> str:
    """Write a Markdown page with the folder and the command of every run."""
    lines = [
        "# Runs of the benchmark",
        "",
        "A command runs the cell again, to the same numbers on the same machine, in a folder of its own.",
        "",
        "| data | missing | method | seed | test MRR | run | command |",
        "|---|---|---|---|---:|---|---|",
    ]
    for entry, seed, outcome in _runs(tables):
        folder = outcome.folder.relative_to(output).as_posix()
        mrr = "failed" if outcome.result is None else f"{outcome.result['test']['mrr']:.4f}"
        cells = [entry.recipe.name, entry.missing.label, entry.method.name, str(seed), mrr]
        lines.append(f"| {' | '.join(cells)} | [{folder}]({folder}) | `{reproduce(outcome.folder)}` |")
    return "\n".join(lines) + "\n"


def reproduce(folder: Path) -> str:
    """Return the command that runs a cell again; its config is resolved, down to the data's folder."""
    shown = shown_path(folder)
    return shlex.join(["fedsim", "run", f"{shown}/config.yaml", "--output", f"{shown}-again"])


def hardware() -> str:
    """Name this machine's processor and the number of CPUs that this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{models[0] if models else platform.machine()}, {num_cpus} CPUs"


def _runs(tables: Sequence[RecipeTable]) -> Iterator[tuple[Entry, int, Outcome]]:
    for table in tables:
        for entry in table.entries:
            for seed, outcome in enumerate(entry.outcomes):
                yield entry, seed, outcome


def _row(entry: Entry, seed: int, outcome: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {
        "data": entry.recipe.name,
        "missing": entry.missing.label,
        "method": entry.method.name,
        "groups": " ".join(entry.method.groups),
        "seed": seed,
        "status": "failed" if outcome.result is None else "done",
        "tuned": "yes" if entry.tuned else "no",
        "message": outcome.error,
        "run": shown_path(outcome.folder),
        "command": reproduce(outcome.folder),
    }
    if outcome.result is not None:
        found = outcome.result
        row |= {f"test_{name}": found["test"].get(name, "") for name in TEST_METRICS}
        row |= {name: found[name] for name in ("valid_mrr", "best_round", "bytes_up", "bytes_down")}
        row["seconds"] = round(sum(found["seconds"].values()), 2)
    return row
