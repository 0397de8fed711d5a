"""What `fedsim tune` calls."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.config import load_config
from fedsim.parsing import parse_yaml
from tune.plan import Settings, make_plan
from tune.search_space import load_space, shipped_spaces


def start_sweep(
    space: str, folder: Path, config: Path | None, changes: Mapping[str, Any], settings: Mapping[str, Any]
) -> bool:
    """Plan and start a sweep; returns whether all its trials ended well.

    Args:
        space: file or name of the search space.
        folder: of the sweep.
        config: file that the trials' configs begin with; None for the defaults.
        changes: dotted config path -> value, for all trials.
        settings: how it searches, see `tune.plan.Settings`.

    Raises:
        FedSimError: if it is refused.
    """
    tree: dict[str, Any] = {}
    if config is not None:
        load_config(config)  # says what is wrong with it, by its name
        tree = parse_yaml(config.read_text(encoding="utf-8")) or {}
    plan = make_plan(load_space(space), folder, tree, changes, Settings(**settings))
    from tune.sweep import start  # takes time to import: what is wrong with the plan is said before

    return start(plan)


def resume_sweep(folder: Path, retry_failed: bool) -> bool:
    """Continue a sweep; returns whether all its trials ended well."""
    from tune.plan import read_plan

    read_plan(folder)
    from tune.sweep import go_on

    return go_on(folder, retry_failed=retry_failed)


def list_spaces() -> list[list[str]]:
    """Return the shipped search spaces as rows: name, title, what is varied."""
    return [
        [name, space.title, "; ".join(item.name for item in space.parameters)]
        for name, space in shipped_spaces().items()
    ]
