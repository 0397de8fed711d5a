"""Recipes: which data, divided how, for how many rounds, and what tuning may cost.

A recipe file holds the settings of one data set, under `parts` those of methods with a certain strategy, imputer or
fusion, and, under `recipes`, what each of its federated splits adds; the names there are those of the command line.
Paths to files of one's own are taken as well.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedsim.benchmark.methods import Method, check_name
from fedsim.config import DataConfig, config_fields
from fedsim.data.dataset import resolve_dataset
from fedsim.errors import ConfigError, DataError
from fedsim.federated import STRATEGIES
from fedsim.models.fusion import FUSIONS
from fedsim.models.imputers import IMPUTERS
from fedsim.parsing import parse_yaml

FOLDER = Path(__file__).parent / "recipes"
RATES = ("0", "0.3", "0.6", "0.9", "client")
PARTS: Mapping[str, Mapping[str, object]] = {
    "federation.strategy": STRATEGIES,
    "model.imputer": IMPUTERS,
    "model.fusion": FUSIONS,
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TuningBudget(_Part):
    """What choosing a method's settings may cost: each trial one run, on validation, the same for every method."""

    missing: str = Field("0.5", description="missing rate of the trials")
    num_rounds: Annotated[int, Field(ge=1)] = Field(6, description="rounds of a trial")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [100], min_length=1, description="seeds of each trial, whose mean counts; none of the benchmark's own"
    )
    trials: list[dict[str, Any]] = Field(
        [
            {"training.learning_rate": 0.01, "model.dropout": 0.6},
            {"training.learning_rate": 0.02, "model.dropout": 0.6},
            {"training.learning_rate": 0.04, "model.dropout": 0.6},
            {"training.learning_rate": 0.02, "model.dropout": 0.7},
            {"training.learning_rate": 0.04, "model.dropout": 0.7},
        ],
        min_length=1,
        description="the settings that are tried",
    )
    own_trials: bool = Field(True, description="whether a method's own two are tried with the best of them")

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{seeds} has a seed twice")
        return seeds


class _RecipeFile(_Part):
    title: str
    obtain: str = ""
    settings: dict[str, Any]
    parts: dict[str, dict[str, Any]] = {}
    rates: list[str | float] = list(RATES)
    tuning: TuningBudget = TuningBudget()
    recipes: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]


@dataclass(frozen=True)
class Recipe:
    """Data of the benchmark and how it is run.

    Attributes:
        name: of folders and the command line.
        family: of the file; tuned values may stand under either name.
        title: what the data is.
        obtain: how to get the data, if it is not bundled.
        settings: dotted config path -> value.
        rates: the missing rates it is run with unless others are asked for.
        tuning: the tuning budget.
        parts: name of a strategy, imputer or fusion -> settings of the methods that have it, without those that the
            split itself says.
    """

    name: str
    family: str
    title: str
    obtain: str
    settings: Mapping[str, Any]
    rates: tuple[str, ...]
    tuning: TuningBudget
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def own_trials(self, method: Method) -> tuple[Mapping[str, Any], ...]:
        """Return what tuning tries of a method alone on this data."""
        return method.trials if self.tuning.own_trials else ()

    def settings_of(self, method: Method) -> dict[str, Any]:
        """Return the settings of a method on this data: all methods' and those of its parts."""
        found = dict(self.settings)
        for field_of_part in PARTS:
            found |= self.parts.get(method.settings.get(field_of_part, ""), {})
        return found


@cache
def bundled_recipes() -> dict[str, Recipe]:
    """Read the recipes that come with fedsim, by name."""
    found: dict[str, Recipe] = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        found |= read_recipes(path)
    return found


def select_recipes(names: list[str]) -> list[Recipe]:
    """Find recipes by name, or by the path of a recipe file (all that it holds).

    Raises:
        ConfigError: if there is none of that name, or a file is not a recipe file.
    """
    selected: dict[str, Recipe] = {}
    for name in names:
        if name.endswith((".yaml", ".yml")):
            selected |= read_recipes(Path(name))
        else:
            check_name("recipe", name, bundled_recipes())
            selected[name] = bundled_recipes()[name]
    return list(selected.values())


def read_recipes(path: Path) -> dict[str, Recipe]:
    """Read a recipe file.

    Raises:
        ConfigError: if it cannot be read or is not one.
    """
    try:
        file = _RecipeFile.model_validate(parse_yaml(path.read_text(encoding="utf-8")))
    except OSError as err:
        raise ConfigError(f"recipe file {path} cannot be read: {err.strerror}; give its path") from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ConfigError(f"recipe file {path} is not YAML: {' '.join(str(err).split())}") from err
    except ValidationError as err:
        first = err.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"recipe file {path}: {place}: {first['msg']}") from err
    for name in file.parts:
        if not any(name in registry for registry in PARTS.values()):
            known = "; ".join(f"{place}: {', '.join(registry)}" for place, registry in PARTS.items())
            raise ConfigError(f"recipe file {path}: parts: '{name}' is no value of any of these: {known}")
    for place, settings in _all_settings(file):
        for setting in settings:
            try:
                check_field(setting)
            except ConfigError as err:
                raise ConfigError(f"recipe file {path}: {place}: {err}") from err
    rates = tuple(rate if isinstance(rate, str) else f"{rate:g}" for rate in file.rates)
    return {
        name: Recipe(
            name,
            path.stem,
            file.title,
            file.obtain,
            file.settings | settings,
            rates,
            file.tuning,
            {part: {k: v for k, v in values.items() if k not in settings} for part, values in file.parts.items()},
        )
        for name, settings in file.recipes.items()
    }


def _all_settings(file: _RecipeFile) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "settings", file.settings
    yield from ((f"recipes.{name}", settings) for name, settings in file.recipes.items())
    yield from ((f"parts.{name}", settings) for name, settings in file.parts.items())
    yield from (("tuning.trials", trial) for trial in file.tuning.trials)


@cache
def _fields() -> frozenset[str]:
    return frozenset(path for path, _ in config_fields())


def check_field(field: object) -> None:
    """Refuse what is no dotted path of a config field."""
    if field not in _fields():
        raise ConfigError(f"'{field}' is no config field, such as model.dropout; see `fedsim config`")


def find_data(recipe: Recipe, settings: Mapping[str, Any]) -> Path:
    """Find the data of a recipe, and its split if it names one.

    Args:
        recipe: for its name and the advice it holds.
        settings: what is run.

    Raises:
        DataError: if it is not there; says what to import.
    """
    try:
        folder = resolve_dataset(str(settings.get("data.path", DataConfig().path)))
    except DataError as err:
        advice = f"; get it with: {recipe.obtain}" if recipe.obtain else ""
        raise DataError(f"recipe {recipe.name}: {err}, or --data.path to the folder itself{advice}") from err
    split = settings.get("data.split_file")
    if (
        split is not None
        and not (folder / "splits" / f"{split}.safetensors").is_file()
        and not Path(str(split)).is_file()
    ):
        advice = f"; import it again with its splits: {recipe.obtain}" if recipe.obtain else ""
        raise DataError(f"recipe {recipe.name}: {folder} has no split '{split}'{advice}")
    return folder
