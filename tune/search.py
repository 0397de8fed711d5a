"""Optuna behind Tune's searcher: gives each trial its name, and goes on where a killed sweep was cut off."""

from collections import deque
from collections.abc import Sequence
from typing import Any

from ray.tune.search import Searcher

from fedsim.errors import ConfigError
from tune.plan import SweepPlan, name_trial
from tune.records import ENDED, METRIC, Records, Trial


def make_search(plan: SweepPlan, records: Records, waiting: Sequence[Trial]) -> "NumberedSearch":
    """Make the search of a plan, which knows of the trials that have ended.

    Args:
        plan: the sweep, whose trials are not listed.
        records: all trials so far.
        waiting: those that are to be continued.

    Raises:
        ConfigError: if Optuna is not installed, or cannot take the space.
    """
    search = _optuna(plan)
    for trial in records.trials.values():
        mrr = records.progress(trial).valid_mrr
        if trial.status in ENDED and mrr is not None:
            search.add_evaluated_point(trial.params, mrr)
    return NumberedSearch(plan, search, waiting, len(records.trials))


class NumberedSearch(Searcher):
    """Gives out the trials that wait, then new ones by another search, up to the number planned.

    Args:
        plan: the sweep.
        search: proposes values.
        waiting: trials to give out first; the search learns of them when they end.
        num_known: trials that have names already.
    """

    def __init__(self, plan: SweepPlan, search: Searcher, waiting: Sequence[Trial], num_known: int) -> None:
        super().__init__(metric=METRIC, mode="max")
        self.plan, self.search = plan, search
        self.waiting, self.num_known = deque(waiting), num_known
        self.given: dict[str, dict[str, Any]] = {}  # Tune's trial id -> values that the search did not propose

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's config for Tune."""
        if self.waiting:
            trial = self.waiting.popleft()
            self.given[trial_id] = trial.params
            return self._config(trial.id, trial.params)
        if self.num_known >= self.plan.num_trials:
            return Searcher.FINISHED
        params = self.search.suggest(trial_id)
        if not isinstance(params, dict):
            return params
        self.num_known += 1
        return self._config(name_trial(self.num_known - 1), params)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Tell the search of a round."""
        if trial_id not in self.given and METRIC in result:
            self.search.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the search how a trial ended: by its best round, which is what is asked for."""
        found = dict(result or {})
        if "best_mrr" in found:
            found[METRIC] = found["best_mrr"]
        if trial_id not in self.given:
            self.search.on_trial_complete(trial_id, found, error)
        elif METRIC in found:
            self.search.add_evaluated_point(self.given.pop(trial_id), found[METRIC])

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: the sweep's own record is what it goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing, as `save` keeps nothing."""

    def _config(self, trial: str, params: dict[str, Any]) -> dict[str, Any]:
        return {"sweep": str(self.plan.folder), "trial": {"id": trial, "params": params}}


def _optuna(plan: SweepPlan) -> Searcher:
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError as err:
        raise ConfigError("--search optuna needs Optuna: pip install 'fedsim[optuna]', or search with random") from err
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space: dict[str, Any] = {}
    for item in plan.space.parameters:
        if item.kind == "choice":
            if not all(value is None or isinstance(value, bool | int | float | str) for value in item.values):
                raise ConfigError(
                    f"search space {plan.space.source}: {item.name} has lists among its values, which Optuna does not "
                    f"take; search with random or grid"
                )
            space[item.name] = optuna.distributions.CategoricalDistribution(item.values)
            continue
        low, high = item.values
        of_numbers = (
            optuna.distributions.IntDistribution if "int" in item.kind else optuna.distributions.FloatDistribution
        )
        space[item.name] = of_numbers(low, high, log=item.kind.startswith("log"))
    search: Searcher = OptunaSearch(space, metric=METRIC, mode="max", seed=plan.seed)
    return search
