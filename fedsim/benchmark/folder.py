"""The benchmark's folder: its manifest, and the locks that keep two processes from the same runs."""

import fcntl
import importlib.metadata
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsim.benchmark.plan import Plan
from fedsim.benchmark.recipes import TuningBudget
from fedsim.checkpoint import replace_text
from fedsim.errors import RunError
from fedsim.parsing import parse_json
from fedsim.run_records import BENCHMARK, check_record

FORMAT_VERSION = 1
MANIFEST = "benchmark.json"
LOCK = ".lock"
POLL_SECONDS = 0.2


def manifest_of(plan: Plan, kind: str) -> dict[str, Any]:
    """Describe a benchmark: what its cells depend on, and which there are.

    Args:
        plan: the benchmark.
        kind: ``benchmark`` or ``tuning``.
    """
    is_table = kind == "benchmark"
    recipes = {
        recipe.name: {"settings": dict(recipe.settings)}
        | ({"parts": dict(recipe.parts)} if recipe.parts else {})
        | ({} if is_table else {"tuning": _told(recipe.tuning)})
        for recipe in plan.recipes
    }
    methods = {method.name: {**method.settings, **method.sampled} for method in plan.methods}
    tuned = {
        f"{recipe.name} {method.name}": plan.tuned.settings(recipe, method.variant_of or method.name)
        for recipe in plan.recipes
        for method in plan.methods
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "fedsim": importlib.metadata.version("fedsim"),
        "changes": dict(plan.changes),
        "on_gpu": plan.on_gpu,
        "recipes": recipes,
        "methods": methods,
        "own_trials": {} if is_table else {method.name: list(method.trials) for method in plan.methods},
        "tuned": tuned if is_table else {},
        "rates": [f"{name} {missing.label}" for name, rates in plan.rates.items() for missing in rates if is_table],
        "seeds": [str(seed) for seed in range(plan.num_seeds) if is_table],
    }
    plain: dict[str, Any] = json.loads(json.dumps(manifest))  # as it will be read again
    return plain


def _told(budget: TuningBudget) -> dict[str, Any]:
    """Describe a budget; `own_trials` only where it is false, so that folders older than that field go on."""
    return budget.model_dump(exclude={"own_trials"} if budget.own_trials else None)


def open_folder(plan: Plan, kind: str) -> None:
    """Make the benchmark's folder, or take up one that holds the same benchmark; it may grow, never shrink.

    Raises:
        RunError: if the folder holds something else.
    """
    manifest, path = manifest_of(plan, kind), plan.output / MANIFEST
    if path.is_file():
        _compare(_read(path), manifest, plan.output)
    plan.output.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(manifest, indent=1) + "\n")


def check_free(output: Path) -> None:
    """Refuse a folder that holds something, but no benchmark; RunError says so."""
    if not output.is_dir() or (output / MANIFEST).is_file():
        return
    if any(item.name != LOCK for item in output.iterdir()):  # a lock alone is left by a start that was cut short
        raise RunError(f"{output} holds files but no benchmark; give another --output")


@contextmanager
def locked(path: Path, busy: str, patience_seconds: float = 0.0) -> Iterator[None]:
    """Hold a lock file; the system frees it when the process ends, however that happens.

    Args:
        path: the lock file.
        busy: the message if somebody else holds it.
        patience_seconds: how long to wait for it.

    Raises:
        RunError: if it cannot be made, or is held.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as err:
        raise RunError(f"{path.parent} cannot be written: {err.strerror}; give another --output") from err
    with file:
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as err:
                if time.monotonic() >= deadline:
                    raise RunError(busy) from err
                time.sleep(POLL_SECONDS)
        yield


def _read(path: Path) -> dict[str, Any]:
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise RunError(f"{path} cannot be read ({err}); give another --output") from err
    check_record(manifest, BENCHMARK, path)
    return dict(manifest)


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], output: Path) -> None:
    """Refuse a folder whose cells were, or would be, run otherwise, or that holds more than is asked for."""
    refusal = f"{output} holds another benchmark"
    for name in ("format_version", "kind", "fedsim", "changes", "on_gpu"):
        if old.get(name) != new[name]:
            raise RunError(
                f"{refusal}: its {name} is {json.dumps(old.get(name))}, this one's is {json.dumps(new[name])}; give "
                f"the same options, or another --output"
            )
    for name in ("recipes", "methods", "rates", "seeds"):
        lost = [key for key in old.get(name, ()) if key not in new[name]]
        if lost:
            has = f"it has the {name} {', '.join(lost)} too"
            raise RunError(f"{refusal}: {has}; ask for them as well, or give another --output")
    for name in ("recipes", "methods", "own_trials", "tuned"):
        changed = [key for key, value in old.get(name, {}).items() if new[name].get(key) != value]
        if changed:
            raise RunError(f"{refusal}: it has other {name} settings of {', '.join(changed)}; give another --output")
