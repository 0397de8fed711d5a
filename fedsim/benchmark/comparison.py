"""What the table says: mean and spread over seeds, the best method, and paired tests against it.

The best method has the highest mean test MRR. The paired t-test (Student 1908) compares two methods over the seeds they
share: a seed fixes what is hidden and, with a drawn split, who holds what, so the pairs take that spread out. p-values
are not corrected for the number of methods.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from scipy import stats

from fedsim.benchmark.execution import Outcome
from fedsim.benchmark.methods import Method
from fedsim.benchmark.plan import Missing, Plan
from fedsim.benchmark.recipes import Recipe

METRICS = {"mrr": "MRR", "hits_at_1": "Hits@1", "hits_at_10": "Hits@10"}


@dataclass(frozen=True)
class Entry:
    """One method at one missing rate: the outcomes of all seeds, in order; `tuned` tells whether it was."""

    recipe: Recipe
    missing: Missing
    method: Method
    outcomes: tuple[Outcome, ...]
    tuned: bool

    def values(self, metric: str) -> list[float]:
        """Return a test metric for the seeds that are there."""
        return [outcome.result["test"][metric] for outcome in self.outcomes if outcome.result is not None]

    def mean(self, metric: str) -> float | None:
        """Return the mean over the seeds that are there; None without any."""
        values = self.values(metric)
        return fmean(values) if values else None

    def spread(self, metric: str) -> float | None:
        """Return the standard deviation over seeds (n - 1); None with fewer than two."""
        values = self.values(metric)
        return stdev(values) if len(values) > 1 else None

    @property
    def seconds(self) -> list[float]:
        """Return the seconds of each run that is there."""
        return [sum(outcome.result["seconds"].values()) for outcome in self.outcomes if outcome.result is not None]

    @property
    def complete(self) -> bool:
        """Return whether all seeds are there."""
        return all(outcome.result is not None for outcome in self.outcomes)


@dataclass(frozen=True)
class Column:
    """All methods of a recipe at one missing rate.

    Attributes:
        entries: in the order of the methods.
        best: name of the method with the best mean MRR; None if none is complete.
        p_values: method -> p against the best; that of the best is against the second. None where it has no meaning.
    """

    missing: Missing
    entries: tuple[Entry, ...]
    best: str | None
    p_values: dict[str, float | None]

    def is_best(self, entry: Entry, metric: str) -> bool:
        """Return whether a method has the best mean of a metric among those that are ranked."""
        mean = entry.mean(metric)
        ranked = [other.mean(metric) for other in self.entries if _is_ranked(other)]
        return _is_ranked(entry) and mean is not None and mean == max(value for value in ranked if value is not None)


@dataclass(frozen=True)
class RecipeTable:
    """The table of one recipe."""

    recipe: Recipe
    columns: tuple[Column, ...]

    @property
    def entries(self) -> list[Entry]:
        """Return the entries of all columns."""
        return [entry for column in self.columns for entry in column.entries]


def compare(plan: Plan, outcome_of: Callable[[Path], Outcome]) -> list[RecipeTable]:
    """Put the outcomes of a benchmark into tables.

    Args:
        plan: the benchmark.
        outcome_of: run folder -> outcome.
    """
    tables = []
    for recipe in plan.recipes:
        columns = []
        for missing in plan.rates[recipe.name]:
            entries = []
            for method in plan.methods:
                folders = [plan.folder(recipe, missing, method, seed) for seed in range(plan.num_seeds)]
                tuned = plan.is_tuned(recipe, method)
                outcomes = tuple(outcome_of(folder) for folder in folders)
                entries.append(Entry(recipe, missing, method, outcomes, tuned))
            columns.append(make_column(missing, entries))
        tables.append(RecipeTable(recipe, tuple(columns)))
    return tables


def make_column(missing: Missing, entries: Sequence[Entry]) -> Column:
    """Find the best method of a column and test the others against it."""
    ranked = sorted((entry for entry in entries if _is_ranked(entry)), key=_mrr, reverse=True)
    if not ranked:
        return Column(missing, tuple(entries), None, {})
    best = ranked[0]
    p_values = {
        entry.method.name: paired_p(best.values("mrr"), entry.values("mrr"))
        for entry in entries
        if entry.complete and entry is not best
    }
    if len(ranked) > 1:
        p_values[best.method.name] = p_values[ranked[1].method.name]
    return Column(missing, tuple(entries), best.method.name, p_values)


def paired_p(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the two-sided p-value of a paired t-test; None with fewer than two pairs, or if all differences are 0."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if len(differences) < 2 or not any(differences):
        return None
    spread = stdev(differences)
    if spread == 0:
        return 0.0  # all the same and not 0: the limit of the test
    statistic = fmean(differences) / (spread / math.sqrt(len(differences)))
    return float(2 * stats.t.sf(abs(statistic), len(differences) - 1))


def _is_ranked(entry: Entry) -> bool:
    return entry.method.ranked and entry.complete


def _mrr(entry: Entry) -> float:
    mean = entry.mean("mrr")
    assert mean is not None, "a ranked entry is complete"
    return mean
