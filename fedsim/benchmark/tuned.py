"""Tuned values: recipe -> method -> settings, chosen on validation with the same budget for every method.

`tuned.yaml` beside this file is what was chosen; `fedsim benchmark --tune` makes such a file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from fedsim.benchmark.methods import METHODS, Method, check_name
from fedsim.benchmark.recipes import Recipe, check_field
from fedsim.checkpoint import replace_text
from fedsim.errors import ConfigError
from fedsim.parsing import parse_yaml

BUNDLED = Path(__file__).parent / "tuned.yaml"
Chosen = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Recipe -> method -> settings."""
TrialKey = tuple[str, str, int]
"""Recipe, method and number of a trial."""
HEADER = """\
# Settings chosen on validation: recipe -> method -> settings. Every method had the trials that its recipe states, then,
# unless the recipe says otherwise, two of its own with the best of them, each with the recipe's tuning seeds. Made by
# `fedsim benchmark --tune`.
"""


@dataclass(frozen=True)
class Tuned:
    """What was chosen; `values` as in the file."""

    values: Chosen

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


def check_tuned(tuned: Tuned, recipes: Sequence[Recipe], methods: Sequence[Method], path: Path) -> None:
    """Refuse tuned values, read from a file that the user named, that hold nothing for a recipe; ConfigError."""
    for recipe in recipes:
        if all(tuned.settings(recipe, method.variant_of or method.name) is None for method in methods):
            raise ConfigError(
                f"tuned values {path}: nothing in it is for these methods on {recipe.name}, only what is tuned for "
                f"{', '.join(tuned.values) or 'no recipe'}; tune them with --tune"
            )


def check_writable(path: Path) -> None:
    """Refuse a file to write tuned values to that is something else, or whose folder is not there; ConfigError."""
    if path.exists():
        read_tuned(path)
    elif not path.absolute().parent.is_dir():
        raise ConfigError(f"tuned values {path}: there is no folder {path.absolute().parent}; make it first")


def trials_of(recipe: Recipe, method: Method, best: Chosen | None = None) -> list[tuple[int, Mapping[str, Any]]]:
    """Return what tuning tries, with its number: the recipe's trials, then the method's own.

    Args:
        recipe: the data, with its budget.
        method: what is tuned.
        best: what the recipe's trials chose; then the method's own trials with it, none if nothing was chosen.
    """
    shared = recipe.tuning.trials
    if best is None:
        return list(enumerate(shared))
    chosen = best.get(recipe.name, {}).get(method.name)
    if chosen is None:
        return []
    own = [{**chosen, **trial} for trial in recipe.own_trials(method)]
    return list(enumerate(own, len(shared)))


def trial_number(folder: str) -> int:
    """Read the number of a trial off the name of its folder, trialNUMBER-seedSEED; ValueError if it is another."""
    return int(folder.removeprefix("trial").partition("-")[0])


def choose(
    recipes: Sequence[Recipe],
    methods: Sequence[Method],
    valid_mrr: Mapping[TrialKey, Sequence[float]],
    best: Chosen | None = None,
) -> Chosen:
    """Take each method's trial with the best mean validation MRR, the first of equals.

    Args:
        recipes: the data.
        methods: those that were tuned.
        valid_mrr: validation MRR of each trial's seeds; a method of which a run is missing has not had its budget, so
            nothing is chosen for it.
        best: what the recipes' trials alone chose, if the methods' own are to be counted too.
    """
    chosen: dict[str, dict[str, Mapping[str, Any]]] = {}
    for recipe in recipes:
        for method in methods:
            trials = dict(trials_of(recipe, method))
            if best is not None:
                trials |= dict(trials_of(recipe, method, best))
            found = {number: valid_mrr.get((recipe.name, method.name, number), ()) for number in trials}
            if all(len(values) == len(recipe.tuning.seeds) for values in found.values()):
                number = max(found, key=lambda each: fmean(found[each]))
                chosen.setdefault(recipe.name, {})[method.name] = dict(trials[number])
    return chosen


def write_tuned(chosen: Chosen, path: Path) -> None:
    """Write tuned values, beside those that the file already holds of other recipes and methods."""
    known = {name: dict(methods) for name, methods in read_tuned(path).values.items()} if path.is_file() else {}
    for recipe, methods in chosen.items():
        known[recipe] = known.get(recipe, {}) | {name: dict(settings) for name, settings in methods.items()}
    replace_text(path, HEADER + yaml.safe_dump(known, sort_keys=False))
