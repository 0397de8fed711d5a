"""Search spaces: config paths and the values to try, from YAML or Python, checked before anything starts.

    title: what it asks
    settings: {federation.num_rounds: 10}
    space:
      diffusion.steps: [10, 25, 50]
      distillation.logit_to_client, distillation.logit_to_global: {loguniform: [0.1, 10]}

A list, or `choice`, is tried as it stands; `uniform` and `loguniform` are ranges of numbers, `randint` and `lograndint`
of whole numbers, both ends included. Several paths with a comma between them get the same value. A Python file holds
the same as `space = {...}`, and may use what Ray Tune draws from, such as `ray.tune.loguniform(0.1, 10)`.
"""

import difflib
import itertools
import json
import math
import runpy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedsim.config import config_fields
from fedsim.errors import ConfigError
from fedsim.parsing import parse_yaml
from fedsim.randomness import numpy_generator

SHIPPED = Path(__file__).parent / "spaces"
RANGES = ("uniform", "loguniform", "randint", "lograndint")
KINDS = ("choice", *RANGES)
# A sweep says itself where its trials run and what they keep.
DECIDED = ("output", "storage", "runtime", "watching", "checkpoint")
MAX_GRID = 100_000  # trials that are listed before the first starts
MAX_REDRAWS = 100  # of a random trial that is there already


@dataclass(frozen=True)
class Parameter:
    """What is tried of one value.

    Attributes:
        paths: the config fields that get it.
        kind: ``choice`` or a range.
        values: the choices, or both ends of the range.
    """

    paths: tuple[str, ...]
    kind: str
    values: tuple[Any, ...]

    @property
    def name(self) -> str:
        """Name it, as in the file."""
        return ", ".join(self.paths)

    def as_plain(self) -> Any:
        """Write it as the file would."""
        return list(self.values) if self.kind == "choice" else {self.kind: list(self.values)}

    def draw(self, generator: np.random.Generator) -> Any:
        """Draw a value; numbers of a range have six digits, so that they can be read."""
        if self.kind == "choice":
            return self.values[int(generator.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "randint":
            return int(generator.integers(low, high, endpoint=True))
        if self.kind == "lograndint":
            return min(max(int(math.exp(generator.uniform(math.log(low), math.log(high + 1)))), low), high)
        if self.kind == "uniform":
            drawn = float(generator.uniform(low, high))
        else:
            drawn = math.exp(generator.uniform(math.log(low), math.log(high)))
        return min(max(float(f"{drawn:.6g}"), low), high)


@dataclass(frozen=True)
class SearchSpace:
    """A search space; `source` is the file, or the name of a shipped one, `settings` hold for all trials."""

    source: str
    title: str
    settings: dict[str, Any]
    parameters: tuple[Parameter, ...]

    def overrides(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return dotted config path -> value for values by parameter."""
        return {path: params[item.name] for item in self.parameters if item.name in params for path in item.paths}

    def as_plain(self) -> dict[str, Any]:
        """Write it as JSON; `parse_space` reads it."""
        space = {item.name: item.as_plain() for item in self.parameters}
        return {"title": self.title, "settings": self.settings, "space": space}

    def grid(self) -> list[dict[str, Any]]:
        """Return every combination of the choices.

        Raises:
            ConfigError: if a parameter is a range.
        """
        for item in self.parameters:
            if item.kind != "choice":
                raise ConfigError(
                    f"search space {self.source}: {item.name} is a range, which a grid cannot walk through; give a "
                    f"list of values, or search with random or optuna"
                )
        num_trials = math.prod(len(item.values) for item in self.parameters)
        if num_trials > MAX_GRID:
            raise ConfigError(
                f"search space {self.source}: its grid has {num_trials} trials, more than {MAX_GRID}; leave values "
                f"out, or search with random or optuna"
            )
        names = [item.name for item in self.parameters]
        return [
            dict(zip(names, values, strict=True))
            for values in itertools.product(*(item.values for item in self.parameters))
        ]

    def draws(self, num_trials: int, seed: int) -> list[dict[str, Any]]:
        """Draw trials at random, none twice; fewer if the space has no more."""
        generator = numpy_generator(seed, "sweep")
        found: dict[str, dict[str, Any]] = {}
        for _ in range(num_trials):
            for _ in range(MAX_REDRAWS):
                params = {item.name: item.draw(generator) for item in self.parameters}
                key = json.dumps(params)
                if key not in found:
                    found[key] = params
                    break
        return list(found.values())

    def corners(self) -> Iterator[tuple[Parameter, Any]]:
        """Yield each value that can be checked alone: the choices, and both ends of the ranges."""
        for item in self.parameters:
            for value in item.values:
                yield item, value


def shipped_spaces() -> dict[str, SearchSpace]:
    """Return the spaces that come with fedsim, by name."""
    return {path.stem: load_space(path.stem) for path in sorted(SHIPPED.glob("*.yaml"))}


def load_space(name_or_path: str) -> SearchSpace:
    """Read a search space: a shipped one by name, or a YAML or Python file.

    Raises:
        ConfigError: if it cannot be read, or says something that is not understood.
    """
    path = Path(name_or_path)
    if path.name == name_or_path and (SHIPPED / f"{name_or_path}.yaml").is_file():
        path = SHIPPED / f"{name_or_path}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(item.stem for item in SHIPPED.glob("*.yaml")))
        raise ConfigError(f"search space {name_or_path} is not there; give a YAML or Python file, or one of {names}")
    if path.suffix == ".py":
        return parse_space(_run_python(path), name_or_path)
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"search space {name_or_path} cannot be read: {err}") from err
    except yaml.YAMLError as err:
        raise ConfigError(f"search space {name_or_path} is not YAML: {' '.join(str(err).split())}") from err
    return parse_space(tree, name_or_path)


def parse_space(tree: Any, source: str) -> SearchSpace:
    """Make a search space of what a file holds.

    Raises:
        ConfigError: naming what is not understood, and the nearest that is.
    """
    if not isinstance(tree, Mapping) or not isinstance(tree.get("space"), Mapping) or not tree["space"]:
        raise ConfigError(f"search space {source} must hold `space`: config paths, each with the values to try")
    unknown = sorted(set(map(str, tree)) - {"title", "settings", "space"})
    if unknown:
        raise ConfigError(f"search space {source}: unknown key '{unknown[0]}'; it holds title, settings and space")
    settings = tree.get("settings") or {}
    if not isinstance(settings, Mapping):
        raise ConfigError(f"search space {source}: settings must hold config paths with values, not {settings!r}")
    for path, value in settings.items():
        _check_path(str(path), source)
        _check_plain(value, f"search space {source}: settings: {path}")
    parameters = tuple(_parse_parameter(str(name), spec, source) for name, spec in tree["space"].items())
    paths = [path for item in parameters for path in item.paths]
    for path in paths:
        if paths.count(path) > 1 or path in settings:
            raise ConfigError(f"search space {source}: '{path}' is set twice; keep one")
    return SearchSpace(source, str(tree.get("title") or ""), dict(settings), parameters)


def _parse_parameter(name: str, spec: Any, source: str) -> Parameter:
    paths = tuple(path.strip() for path in name.split(","))
    for path in paths:
        _check_path(path, source)
        if path.split(".")[0] in DECIDED:
            raise ConfigError(f"search space {source}: '{path}' is what the sweep decides; leave it out")
    where = f"search space {source}: {name}"
    kind, values = _read_spec(spec, where)
    if kind not in KINDS:
        (near,) = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)
        raise ConfigError(f"{where}: unknown kind '{kind}', the nearest is '{near}'; there are {', '.join(KINDS)}")
    if kind == "choice":
        if not values:
            raise ConfigError(f"{where}: no values to try; give at least one")
        for value in values:
            _check_plain(value, where)
        return Parameter(paths, kind, values)
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(values) != 2 or len(numbers) != 2 or not values[0] < values[1]:
        raise ConfigError(f"{where}: {kind} needs two numbers [low, high], low below high, not {list(values)}")
    if kind.endswith("int") and not all(isinstance(value, int) for value in values):
        raise ConfigError(f"{where}: {kind} needs whole numbers, not {list(values)}")
    if kind.startswith("log") and values[0] <= 0:
        raise ConfigError(f"{where}: {kind} needs numbers above 0, not {list(values)}")
    return Parameter(paths, kind, values)


def _read_spec(spec: Any, where: str) -> tuple[str, tuple[Any, ...]]:
    """Read the values of a parameter in any of their forms."""
    if isinstance(spec, list | tuple):
        return "choice", tuple(spec)
    if isinstance(spec, Mapping) and len(spec) == 1:
        ((kind, values),) = spec.items()
        if isinstance(values, list | tuple):
            return "choice" if kind == "grid_search" else str(kind), tuple(values)
    found = _read_domain(spec)
    if found is None:
        raise ConfigError(
            f"{where}: {spec!r} is not understood; give a list of values, or for example {{uniform: [0, 1]}}"
        )
    return found


def _read_domain(spec: Any) -> tuple[str, tuple[Any, ...]] | None:
    """Read what Ray Tune draws from; None if it is nothing of the kind, or of a kind that is not taken."""
    if not type(spec).__module__.startswith("ray."):
        return None
    from ray.tune.search.sample import Categorical, Float, Integer, LogUniform, Uniform

    if isinstance(spec, Categorical):
        return "choice", tuple(spec.categories)
    sampler: Any = spec.get_sampler() if isinstance(spec, Float | Integer) else None  # type: ignore[no-untyped-call]
    if not isinstance(sampler, Uniform | LogUniform):
        return None
    log = "log" if isinstance(sampler, LogUniform) else ""
    if isinstance(spec, Integer):  # Ray leaves the upper end out
        return f"{log}randint", (int(spec.lower), int(spec.upper) - 1)
    return f"{log}uniform", (float(spec.lower), float(spec.upper))


def _check_plain(value: Any, where: str) -> None:
    """Refuse what a config cannot hold and JSON cannot keep, such as the date that YAML makes of 2001-01-01."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as err:
        raise ConfigError(f"{where}: {value!r} is no number, text, list or null; put text in quotes") from err


def _check_path(path: str, source: str) -> None:
    known = [name for name, _ in config_fields()]
    if path not in known:
        (near,) = difflib.get_close_matches(path, known, n=1, cutoff=0.0)
        raise ConfigError(f"search space {source}: unknown config path '{path}'; the nearest is '{near}'")


def _run_python(path: Path) -> dict[str, Any]:
    try:
        names = runpy.run_path(str(path))
    except Exception as err:
        raise ConfigError(f"search space {path} does not run: {type(err).__name__}: {err}") from err
    if "space" not in names:
        raise ConfigError(f"search space {path} must define `space = {{...}}`: config paths, each with values to try")
    return {name: names[name] for name in ("title", "settings", "space") if name in names}
