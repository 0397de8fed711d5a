"""Population based training of the distillation weights: copies of a federation that continue with other weights.

Source: Jaderberg et al., "Population Based Training of Neural Networks", 2017, as Ray Tune has it. Every so many rounds
the worst members of the population take over the state of the best ones and change their weights.

What a member has become is its config: each change of weights is an entry of `distillation.schedule` from the round
after the copied checkpoint on. All members have one seed, so a run of that config from its start goes through the same
rounds, to the bit, as the member and those that it was copied from.
"""

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import PopulationBasedTraining

from fedsim.checkpoint import read_manifest, replace_text
from fedsim.config import Config, dump_config, load_config, make_config
from fedsim.errors import RunError
from fedsim.run_folder import RunFolder
from tune.plan import WEIGHTS
from tune.search_space import SearchSpace

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

LAST = 1 << 30  # a round after all others


class Population(PopulationBasedTraining):
    """Synchronous population based training that does not wait for members that have ended."""

    def on_trial_error(self, tune_controller: Any, trial: "Trial") -> None:
        """Let the others go on without it."""
        super().on_trial_error(tune_controller, trial)
        self._go_on(tune_controller, trial)

    def on_trial_complete(self, tune_controller: Any, trial: "Trial", result: dict[str, Any]) -> None:
        """Let the others go on without it."""
        super().on_trial_complete(tune_controller, trial, result)
        self._go_on(tune_controller, trial)

    def _get_new_config(self, trial: "Trial", trial_to_clone: "Trial") -> tuple[dict[str, Any], dict[str, Any]]:
        """Change the weights of the member that is copied; the name, and so the run folder, stays the member's own."""
        config, operations = super()._get_new_config(trial, trial_to_clone)
        config["trial"]["id"] = trial.config["trial"]["id"]
        return config, operations

    def _go_on(self, tune_controller: Any, ended: "Trial") -> None:
        """Leave one change out if all others had waited for the one that ended: no result will release them."""
        others = [trial for trial in tune_controller.get_live_trials() if trial is not ended]
        rounds = [self._trial_state[trial].last_train_time for trial in others]
        if rounds and min(rounds) >= self._next_perturbation_sync:
            self._next_perturbation_sync = max(rounds) + 1


def make_population(space: SearchSpace, interval: int) -> Population:
    """Make the scheduler: what it changes are the `params` of a trial (see `tune.trial.run_trial`)."""
    from ray import tune as ray_tune

    mutations: dict[str, Any] = {}
    for item in space.parameters:
        draw = {"uniform": ray_tune.uniform, "loguniform": ray_tune.loguniform}.get(item.kind)
        mutations[item.name] = list(item.values) if draw is None else draw(*item.values)

    def within_range(config: dict[str, Any]) -> dict[str, Any]:
        params = config["trial"]["params"]
        for item in space.parameters:
            if item.kind != "choice":
                low, high = item.values
                params[item.name] = min(max(float(f"{params[item.name]:.6g}"), low), high)
        return config

    return Population(
        time_attr="round",
        metric="valid_mrr",
        mode="max",
        perturbation_interval=interval,
        hyperparam_mutations={"trial": {"params": mutations}},
        custom_explore_fn=within_range,
        require_attrs=False,  # a member that went on after its last change ends without a report
        synch=True,
    )


def snapshot(run: RunFolder, round_num: int, target: Path) -> None:
    """Keep a run as it is after a round: its config, metrics, checkpoint of that round and of the best one.

    Files of checkpoints never change, so they are linked, not copied, where the file system can.

    Args:
        run: the run, which has a checkpoint of that round.
        round_num: the round.
        target: folder to make.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    best_round = read_manifest(run.checkpoint(round_num))["progress"]["best_round"]
    kept = RunFolder(temporary)
    for number in sorted({round_num, best_round or round_num}):
        shutil.copytree(run.checkpoint(number), kept.checkpoint(number), copy_function=link_or_copy)
    for name in ("config.yaml", "versions.json", "metrics.jsonl"):
        shutil.copy2(run.path / name, temporary / name)
    kept.rewind_metrics(round_num)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def weights_at(config: Config, round_num: int, space: SearchSpace) -> dict[str, Any]:
    """Return the values by parameter that hold in a round."""
    weights = config.distillation.at(round_num)
    return {item.name: getattr(weights, item.paths[0].split(".")[1]) for item in space.parameters}


def forked_config(config: Config, space: SearchSpace, params: Mapping[str, Any], after_round: int) -> Config:
    """Return the config of a run that continues another one after a round, with other weights from there on."""
    if weights_at(config, LAST, space) == dict(params):
        return config
    changed = {path.split(".")[1]: value for path, value in space.overrides(params).items()}
    assert set(changed) <= set(WEIGHTS), "the plan lets a population change nothing else"
    tree = config.model_dump(mode="json")
    earlier = [item for item in tree["distillation"]["schedule"] if item["from_round"] <= after_round]
    tree["distillation"]["schedule"] = [*earlier, {"from_round": after_round + 1, **changed}]
    return make_config(tree)


def fork(source: Path, target: Path, config: Config) -> None:
    """Make a run folder that continues a snapshot with a config that differs in later weights alone.

    A folder that is there is replaced at one blow: whatever interrupts this leaves the old or the new one.

    Args:
        source: the snapshot.
        target: the run folder.
        config: of the new run, from `forked_config`.

    Raises:
        RunError: if the config would make other rounds of those that are done.
    """
    kept = load_config(source / "config.yaml")
    done = read_manifest(max(RunFolder(source).checkpoints.glob("round-*")))["round"]
    if _until(kept, done) != _until(config, done):
        raise RunError(f"{source} was run with another config up to round {done}; it cannot be continued with this one")
    temporary, old = (target.with_name(f".{target.name}.{kind}") for kind in ("new", "old"))
    for folder in (temporary, old):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, temporary, copy_function=link_or_copy)
    (temporary / "metrics.jsonl").unlink()
    shutil.copy2(source / "metrics.jsonl", temporary / "metrics.jsonl")  # it grows: no link
    replace_text(temporary / "config.yaml", dump_config(config))
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def finish_fork(target: Path) -> None:
    """Put back what an interrupted `fork` had moved away."""
    old = target.with_name(f".{target.name}.old")
    if not target.exists() and old.exists():
        old.rename(target)


def link_or_copy(source: str, target: str) -> None:
    """Link a file; copy it where links cannot be made."""
    try:
        os.link(source, target)
    except OSError as err:
        if err.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        shutil.copy2(source, target)


def _until(config: Config, round_num: int) -> Config:
    """Return a config as it decides the rounds up to this one; where it is written does not count."""
    schedule = tuple(item for item in config.distillation.schedule if item.from_round <= round_num)
    distillation = config.distillation.model_copy(update={"schedule": schedule})
    return config.model_copy(update={"distillation": distillation, "output": None})
