"""Tuned values: recipe -> method -> settings, chosen on validation with the same budget for every method.

`tuned.yaml` beside this file is what was chosen; `fedsim benchmark --tune` makes such a file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedsim.benchmark.methods import METHODS, Method, check_name
from fedsim.benchmark.recipes import Recipe, check_field
from fedsim.checkpoint import replace_text
from fedsim.errors import ConfigError
from fedsim.parsing import parse_yaml

BUNDLED = Path(__file__).parent / "tuned.yaml"
HEADER = """\
# Settings chosen on validation: recipe -> method -> settings. Every method had the trials that its recipe states and
# two of its own, each run once with the recipe's tuning seed. Made by `fedsim benchmark --tune`.
"""


@dataclass(frozen=True)
class Tuned:
    """What was chosen; `values` as in the file."""

    values: Mapping[str, Mapping[str, Mapping[str, Any]]]

    def settings(self, recipe: Recipe, method: str) -> Mapping[str, Any] | None:
        """Return a method's settings for a recipe, or for its family; None if it was not tuned."""
        for name in (recipe.name, recipe.family):
            if method in self.values.get(name, {}):
                return self.values[name][method]
        return None


def read_tuned(path: Path) -> Tuned:
    """Read a file of tuned values.

    Raises:
        ConfigError: if it cannot be read, or names a method or a config field that does not exist.
    """
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8")) or {}
    except OSError as err:
        raise ConfigError(f"tuned values {path} cannot be read: {err.strerror}; make them with --tune") from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ConfigError(f"tuned values {path} are not YAML: {' '.join(str(err).split())}") from err
    if not isinstance(tree, dict):
        raise ConfigError(f"tuned values {path}: the file must hold recipes, not a {type(tree).__name__}")
    for recipe, methods in tree.items():
        if not isinstance(methods, dict):
            raise ConfigError(f"tuned values {path}: {recipe} must hold methods, not {methods!r}")
        for method, settings in methods.items():
            if not isinstance(settings, dict):
                raise ConfigError(f"tuned values {path}: {recipe}: {method} must hold settings, not {settings!r}")
            try:
                check_name("method", method, METHODS)
                for field in settings:
                    check_field(field)
            except ConfigError as err:
                raise ConfigError(f"tuned values {path}: {recipe}: {err}") from err
    return Tuned(tree)


def check_writable(path: Path) -> None:
    """Refuse a file to write tuned values to that is something else, or whose folder is not there; ConfigError."""
    if path.exists():
        read_tuned(path)
    elif not path.absolute().parent.is_dir():
        raise ConfigError(f"tuned values {path}: there is no folder {path.absolute().parent}; make it first")


def trials_of(recipe: Recipe, method: Method) -> list[Mapping[str, Any]]:
    """Return what tuning tries: the recipe's trials, then the method's own."""
    return [*recipe.tuning.trials, *method.trials]


def choose(
    recipes: Sequence[Recipe], methods: Sequence[Method], valid_mrr: Mapping[tuple[str, str, int], float]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Take each method's trial with the best validation MRR, the first of equals.

    Args:
        recipes: the data.
        methods: those that were tuned.
        valid_mrr: (recipe, method, number of the trial) -> validation MRR; a method of which a trial is missing has
            not had its budget, so nothing is chosen for it.
    """
    chosen: dict[str, dict[str, dict[str, Any]]] = {}
    for recipe in recipes:
        for method in methods:
            trials = trials_of(recipe, method)
            keys = [(recipe.name, method.name, number) for number in range(len(trials))]
            if all(key in valid_mrr for key in keys):
                best = max(range(len(trials)), key=lambda number: valid_mrr[keys[number]])
                chosen.setdefault(recipe.name, {})[method.name] = dict(trials[best])
    return chosen


def write_tuned(chosen: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Write tuned values, beside those that the file already holds of other recipes and methods."""
    known = {name: dict(methods) for name, methods in read_tuned(path).values.items()} if path.is_file() else {}
    for recipe, methods in chosen.items():
        known[recipe] = known.get(recipe, {}) | {name: dict(settings) for name, settings in methods.items()}
    replace_text(path, HEADER + yaml.safe_dump(known, sort_keys=False))
