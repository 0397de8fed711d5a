"""The plan of a sweep: what is searched and how, kept in the sweep's folder so that it can go on after a kill."""

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import fedsim
from fedsim.benchmark.plan import check_parts
from fedsim.checkpoint import replace_text
from fedsim.config import Config, make_config
from fedsim.data.dataset import resolve_dataset
from fedsim.errors import ConfigError, RunError
from fedsim.parsing import parse_json
from fedsim.run_records import PLAN, check_record
from tune.search_space import SearchSpace, parse_space

FORMAT_VERSION = 1
PLAN_FILE = "plan.json"
SCHEDULERS = ("asha", "none", "pbt")
SEARCHES = ("grid", "random", "optuna")
# What population based training may change: round by round the loss alone depends on these.
WEIGHTS = ("logit_to_client", "logit_to_global", "feature_to_client", "feature_to_global")
NUM_TRIALS, NUM_MEMBERS = 16, 4  # where the command line says nothing

Params = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How a sweep searches.

    Attributes:
        scheduler: asha stops trials early, pbt changes the weights of a population as it trains, none does neither.
        search: where trials come from.
        num_trials: how many there are; null for all of a grid, else 16, and a population of 4.
        concurrent: trials at a time, each with its share of the cluster; null for as many as have room.
        max_failures: how often a trial that died is tried again.
        grace_rounds: asha: rounds that every trial gets.
        reduction_factor: asha: one of so many trials goes on at each rung.
        interval: pbt: rounds between two changes.
    """

    scheduler: str = "asha"
    search: str = "random"
    num_trials: int | None = None
    concurrent: int | None = None
    max_failures: int = 2
    grace_rounds: int = 2
    reduction_factor: float = 3.0
    interval: int = 3


@dataclass(frozen=True)
class SweepPlan:
    """A sweep.

    Attributes:
        folder: of the sweep, absolute.
        space: what is searched.
        base: nested config tree of all trials.
        settings: how it is searched.
        listed: the values of every trial, if they do not depend on results; else None.
    """

    folder: Path
    space: SearchSpace
    base: dict[str, Any]
    settings: Settings
    listed: tuple[Params, ...] | None

    @property
    def num_trials(self) -> int:
        """How many trials there will be."""
        return len(self.listed) if self.listed is not None else self.settings.num_trials or NUM_TRIALS

    @property
    def seed(self) -> int:
        """Seed of the search; that of the runs unless they vary it."""
        return int(self.base.get("seed", 0))

    @property
    def max_rounds(self) -> int:
        """Most rounds of a trial."""
        for item in self.space.parameters:
            if "federation.num_rounds" in item.paths:
                return int(max(item.values))
        return make_config(self.base).federation.num_rounds

    def run_folder(self, trial: str) -> Path:
        """Return where a trial's run stands."""
        return self.folder / "trials" / trial

    def config(self, params: Mapping[str, Any], trial: str | None = None) -> Config:
        """Resolve the config of a trial; without its name, for a run elsewhere.

        Raises:
            ConfigError: if it is refused; it names the values.
        """
        output = None if trial is None else str(self.run_folder(trial))
        try:
            config = make_config(self.base, self.space.overrides(params) | {"output": output})
            check_parts(config)
        except ConfigError as err:
            raise ConfigError(f"search space {self.space.source}: {name_params(params)} is refused: {err}") from err
        return config

    def write(self) -> None:
        """Write the plan into the sweep's folder, which is made."""
        plain = {
            "format_version": FORMAT_VERSION,
            "fedsim": importlib.metadata.version("fedsim"),
            "source": self.space.source,
            **self.space.as_plain(),
            "base": self.base,
            "sweep": asdict(self.settings),
            "trials": self.listed,
        }
        try:
            (self.folder / "trials").mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise RunError(f"{self.folder} cannot be made: {err.strerror}; give another --output") from err
        replace_text(self.folder / PLAN_FILE, json.dumps(plain, indent=1) + "\n")


def name_trial(number: int) -> str:
    """Name a trial, and its run folder."""
    return f"trial-{number:05d}"


def name_params(params: Mapping[str, Any]) -> str:
    """Write a trial's values in a line."""
    return ", ".join(f"{name}={show_value(value)}" for name, value in params.items())


def show_value(value: Any) -> str:
    """Write a value for a table: six digits tell a trial from another."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def make_plan(
    space: SearchSpace, folder: Path, config_tree: Mapping[str, Any], changes: Mapping[str, Any], settings: Settings
) -> SweepPlan:
    """Plan a sweep; all that is wrong with it is said here.

    Args:
        space: what is searched.
        folder: of the sweep.
        config_tree: what the trials' configs begin with, nested.
        changes: dotted config path -> value, for all trials.
        settings: how it is searched.

    Raises:
        FedSimError: if a path, a value or a combination of options is refused.
    """
    for path in changes:
        if any(path in item.paths for item in space.parameters):
            raise ConfigError(f"--{path} is what search space {space.source} varies; leave it out")
    varied = {path for item in space.parameters for path in item.paths}
    base = make_config(config_tree, {k: v for k, v in space.settings.items() if k not in changes} | dict(changes))
    for field in ("output", "storage"):
        if getattr(base, field, None) is not None:
            raise ConfigError(f"config field '{field}' is what the sweep decides for each trial; leave it out")
    tree = base.model_dump(mode="json")
    _make_absolute(tree, base, varied)
    plan = SweepPlan(folder.absolute(), space, tree, settings, None)
    if settings.scheduler == "pbt":
        _check_population(plan)
    listed = _list_trials(plan)
    plan = replace(plan, listed=listed)
    for item, value in space.corners():
        if listed is None or item.kind != "choice":  # listed choices are checked together, below
            plan.config({item.name: value})
    for params in listed or ():
        plan.config(params)
    for path in {plan.config(params).data.path for params in listed or ()} or {base.data.path}:
        resolve_dataset(path)
    return plan


def read_plan(folder: Path) -> SweepPlan:
    """Read the plan of a sweep that was begun.

    Raises:
        RunError: if there is none, or one of another version.
    """
    path = folder / PLAN_FILE
    if not path.is_file():
        raise RunError(f"{folder} is not a sweep (it has no {PLAN_FILE}); give the folder of a `fedsim tune`")
    try:
        plain = parse_json(path.read_text(encoding="utf-8"))
        found = (plain["format_version"], plain["fedsim"])
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise RunError(f"{path} is damaged ({err}); start the sweep anew in another --output") from err
    ours = (FORMAT_VERSION, importlib.metadata.version("fedsim"))
    if found != ours:
        raise RunError(
            f"{folder} is a sweep of fedsim {found[1]} (format {found[0]}), and this is fedsim {ours[1]} (format "
            f"{ours[0]}), whose trials might not compare: go on with that version, or start anew in another --output"
        )
    check_record(plain, PLAN, path)
    try:
        settings = TypeAdapter(Settings).validate_python(plain["sweep"])
    except ValidationError as err:
        raise RunError(f"{path} is damaged (sweep: {err.errors()[0]['msg']}); start the sweep anew") from err
    space = parse_space({name: plain[name] for name in ("title", "settings", "space")}, plain["source"])
    listed = None if plain["trials"] is None else tuple(plain["trials"])
    return SweepPlan(folder.absolute(), space, plain["base"], settings, listed)


def _list_trials(plan: SweepPlan) -> tuple[Params, ...] | None:
    """Make the trials whose values depend on no result."""
    settings, space = plan.settings, plan.space
    if settings.search == "optuna":
        return None
    if settings.search == "random":
        fewest = NUM_MEMBERS if settings.scheduler == "pbt" else NUM_TRIALS
        return tuple(space.draws(settings.num_trials or fewest, plan.seed))
    grid = space.grid()
    if settings.num_trials is not None and settings.num_trials < len(grid):
        raise ConfigError(
            f"search space {space.source}: its grid has {len(grid)} trials, but --trials is {settings.num_trials}; "
            f"leave --trials out, or search with random"
        )
    return tuple(grid)


def _check_population(plan: SweepPlan) -> None:
    """Refuse what a population cannot change while it trains."""
    settings, space = plan.settings, plan.space
    allowed = [f"distillation.{name}" for name in WEIGHTS]
    if settings.search != "random":
        raise ConfigError("--scheduler pbt draws its population at random; leave --search out")
    for item in space.parameters:
        for path in item.paths:
            if path not in allowed:
                raise ConfigError(
                    f"search space {space.source}: '{path}' cannot change in a running federation; --scheduler pbt "
                    f"takes {', '.join(allowed)}"
                )
    config = make_config(plan.base)
    if config.distillation.schedule:
        raise ConfigError("distillation.schedule is what --scheduler pbt finds; leave it out")
    if config.federation.strategy not in ("mmfed3", "fedlu"):
        raise ConfigError(
            f"federation.strategy {config.federation.strategy} has no distillation weights; --scheduler pbt takes "
            f"mmfed3 and fedlu"
        )
    for field, every in (("evaluation.every", config.evaluation.every), ("checkpoint.every", config.checkpoint.every)):
        if settings.interval % every:
            raise ConfigError(f"--pbt-interval {settings.interval} must be a multiple of {field} {every}")
    if settings.interval >= config.federation.num_rounds:
        raise ConfigError(
            f"--pbt-interval {settings.interval} leaves no change within federation.num_rounds "
            f"{config.federation.num_rounds}; lower it"
        )
    # Without any coupling the relation table is trained otherwise, which must not change on the way.
    lowest = {path: min(item.values) for item in space.parameters for path in item.paths}
    if not any(lowest.get(path, getattr(config.distillation, path.split(".")[1])) > 0 for path in allowed):
        raise ConfigError("--scheduler pbt needs one of the four distillation weights above 0 at all times")
    num_members = settings.num_trials or NUM_MEMBERS
    if num_members < 2:
        raise ConfigError(f"--scheduler pbt needs a population of 2 or more trials, not {num_members}")


def _make_absolute(tree: dict[str, Any], config: Config, varied: set[str]) -> None:
    """Let files be found from any working folder; those of the space are taken as they stand."""
    if "data.path" not in varied:
        found = resolve_dataset(config.data.path).absolute()
        if not found.is_relative_to(Path(fedsim.__file__).parent):  # a bundled one has its name on every node
            tree["data"]["path"] = str(found)
    for section, name in (("data", "split_file"), ("participation", "trace_file"), ("runtime", "scratch")):
        value = tree[section][name]
        if value is not None and (name == "scratch" or Path(value).is_file()):
            tree[section][name] = str(Path(value).absolute())
