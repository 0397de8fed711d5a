"""The plan: which cells a benchmark has, with the resolved config and the run folder of each."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.benchmark.methods import Method
from fedsim.benchmark.recipes import Recipe, find_data
from fedsim.benchmark.tuned import Chosen, Tuned, trials_of
from fedsim.config import Config, make_config
from fedsim.errors import ConfigError
from fedsim.federated import STRATEGIES
from fedsim.models.client_model import ClientModel, pick

CLIENT_RATE = 0.5  # share of the clients that lack a modality, where `client` says no other
ANY = "any"  # folder of runs that serve all missing rates
# What methods, rates and seeds decide: no option may change it for all cells at once.
DECIDED = frozenset(
    {
        "seed",
        "output",
        "storage",
        "data.missing_rate",
        "data.missing_pattern",
        "federation.strategy",
        "model.fusion",
        "model.imputer",
        "runtime.kind",
        "runtime.gpus_per_client",
    }
)

# Sections that tuned values depend on, and fields of them that leave the task as it was.
TUNED_FOR = frozenset(
    {
        *("data", "model", "diffusion", "imputer", "training", "federation", "distillation"),
        *("participation", "communication", "privacy", "robustness", "adversary"),
    }
)
SAME_TASK = frozenset({"data.path", "training.compile", "federation.num_rounds"})


@dataclass(frozen=True)
class Missing:
    """What is hidden: a share of the features (`random`), or whole modalities at a share of the clients (`client`)."""

    label: str
    pattern: str
    rate: float

    @property
    def settings(self) -> dict[str, Any]:
        """Return it as config settings."""
        return {"data.missing_pattern": self.pattern, "data.missing_rate": self.rate}


def parse_missing(text: str) -> Missing:
    """Read a missing rate: ``0.3``, ``client`` or ``client:0.3``.

    Raises:
        ConfigError: if it is none of these, or not in 0..1.
    """
    name, colon, number = text.strip().partition(":")
    pattern = "client" if name == "client" else "random"
    number = number if colon else str(CLIENT_RATE) if pattern == "client" else name
    try:
        rate = float(number)
    except ValueError:
        rate = math.nan
    if not 0 <= rate <= 1 or (colon and pattern != "client"):
        raise ConfigError(f"missing rate '{text}': give a share from 0 to 1, client, or client:SHARE")
    return Missing(f"client-{rate:g}" if pattern == "client" else f"{rate:g}", pattern, rate)


@dataclass(frozen=True)
class Cell:
    """One run of the benchmark; `config` is resolved, its `output` is `folder`, which is absolute."""

    recipe: str
    missing: str
    method: str
    seed: int
    folder: Path
    config: Config

    @property
    def name(self) -> str:
        """Name it in a line of progress."""
        return f"{self.recipe} {self.missing} {self.method} {self.folder.name}"


@dataclass(frozen=True)
class Plan:
    """A benchmark.

    Attributes:
        output: its folder, absolute.
        recipes: the data.
        methods: the rows of the table.
        rates: recipe name -> its missing rates.
        num_seeds: seeds 0 .. n-1.
        tuned: what was chosen for each method.
        changes: dotted config path -> value, for all cells.
        on_gpu: whether runs use a GPU.
    """

    output: Path
    recipes: list[Recipe]
    methods: list[Method]
    rates: dict[str, list[Missing]]
    num_seeds: int
    tuned: Tuned
    changes: Mapping[str, Any]
    on_gpu: bool = False

    def cells(self) -> list[Cell]:
        """Make the cells seed by seed, so that a benchmark that stops has whole seeds.

        Raises:
            FedSimError: if data is absent, or a setting is not accepted.
        """
        found: dict[Path, Cell] = {}
        for seed in range(self.num_seeds):
            for recipe in self.recipes:
                for missing in self.rates[recipe.name]:
                    for method in self.methods:
                        folder = self.folder(recipe, missing, method, seed)
                        if folder not in found:
                            settings = self.tuned.settings(recipe, method.variant_of or method.name) or {}
                            found[folder] = self._cell(recipe, missing, method, folder, settings, {"seed": seed})
        return list(found.values())

    def is_tuned(self, recipe: Recipe, method: Method) -> bool:
        """Tell whether a method runs with the values that were chosen for it: tuned, and no option changes the task."""
        chosen = self.tuned.settings(recipe, method.variant_of or method.name)
        return chosen is not None and not changes_task(self.changes)

    def trials(self, best: Chosen | None = None) -> list[Cell]:
        """Make the cells of a tuning: each method with the trials of its recipe's budget.

        Args:
            best: what these chose; then the cells are those of the methods' own trials, with it.
        """
        found = []
        for recipe in self.recipes:
            budget = recipe.tuning
            missing = parse_missing(budget.missing)
            for method, seed in itertools.product(self.methods, budget.seeds):
                fixed = {"seed": seed, "federation.num_rounds": budget.num_rounds}
                for number, trial in trials_of(recipe, method, best):
                    folder = self.folder(recipe, missing, method, 0).with_name(f"trial{number}-seed{seed}")
                    found.append(self._cell(recipe, missing, method, folder, trial, fixed))
        return found

    def folder(self, recipe: Recipe, missing: Missing, method: Method, seed: int) -> Path:
        """Return the run folder of a cell; one for all rates if the method says itself what is hidden."""
        return self.output / recipe.name / (ANY if method.fixed_rate else missing.label) / method.name / f"seed{seed}"

    def _cell(
        self,
        recipe: Recipe,
        missing: Missing,
        method: Method,
        folder: Path,
        tuned: Mapping[str, Any],
        fixed: Mapping[str, Any],
    ) -> Cell:
        """Resolve a cell's config; what comes later wins."""
        settings: dict[str, Any] = {"checkpoint.keep": 1}
        settings |= {
            **recipe.settings_of(method),
            **tuned,
            **fixed,
            **self.changes,
            **missing.settings,
            **method.settings,
        }
        settings |= {"output": str(folder), "runtime.kind": "in_process"}
        settings |= {"seed": fixed["seed"], "runtime.gpus_per_client": 1.0 if self.on_gpu else 0.0}
        if settings.get("training.loss") == "self_adversarial":
            settings |= method.sampled
        settings["data.path"] = str(find_data(recipe, settings).resolve())
        try:
            config = make_config(overrides=settings)
            check_parts(config)
        except ConfigError as err:
            raise ConfigError(f"recipe {recipe.name}, method {method.name}: {err}") from err
        label = ANY if method.fixed_rate else missing.label
        return Cell(recipe.name, label, method.name, config.seed, folder, config)


def changes_task(changes: Iterable[str]) -> bool:
    """Tell whether fields are among those that tuned values depend on."""
    return any(path.partition(".")[0] in TUNED_FOR and path not in SAME_TASK for path in changes)


def check_changes(changes: Mapping[str, Any]) -> None:
    """Refuse options that would make all methods, rates or seeds the same."""
    for path in changes:
        if path in DECIDED:
            raise ConfigError(f"--{path} is what the benchmark varies or decides; leave it out")


def check_trials(recipes: Iterable[Recipe], methods: Sequence[Method], changes: Mapping[str, Any]) -> None:
    """Refuse options that would make the trials of a tuning the same."""
    for recipe in recipes:
        for method in methods:
            for path in changes:
                if any(path in trial for trial in (*recipe.tuning.trials, *recipe.own_trials(method))):
                    raise ConfigError(
                        f"--{path} is what the trials of {method.name} on {recipe.name} vary; leave it out"
                    )


def check_parts(config: Config) -> None:
    """Refuse a config that names a part that does not exist, before anything runs."""
    pick(STRATEGIES, "federation.strategy", config.federation.strategy)
    ClientModel(config, {})
