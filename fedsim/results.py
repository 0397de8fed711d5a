"""What a run tells and ends with: progress for an observer, rows of metrics, and the result."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedsim.config import Config
from fedsim.evaluation.ranking import RankingMetrics, weighted_mean
from fedsim.federated.participation import RoundPlan
from fedsim.federated.reports import ClientEvaluation
from fedsim.federated.runtime import Measurements, RoundResult
from fedsim.privacy.accounting import PrivacySpent

NEAR_BEST = 0.95  # share of the best validation MRR at which a run counts as converged


@dataclass(frozen=True)
class RunInfo:
    """What is known when a run starts; `clients` has (client, entities, relations, train, valid, test) each."""

    folder: Path
    config: Config
    placement: list[str]
    num_rounds: int
    start_round: int
    clients: list[tuple[int, int, int, int, int, int]]


@dataclass(frozen=True)
class RoundSummary:
    """One finished round, for the progress display; `seconds` is by phase, `loss` None if the round was skipped.

    `privacy` is what `PrivacySpent.as_json` makes; None without differential privacy.
    """

    round_num: int
    loss: float | None
    valid_mrr: float | None
    best_mrr: float | None
    seconds: dict[str, float]
    bytes_up: int
    bytes_down: int
    privacy: Mapping[str, Any] | None = None


class Observer(Protocol):
    """Is told of progress; see `fedsim.report.console`."""

    def run_started(self, info: RunInfo) -> None:
        """Learn what is about to run and where."""
        ...

    def round_started(self, round_num: int) -> None:
        """Learn that a round begins."""
        ...

    def round_finished(self, summary: RoundSummary) -> None:
        """Learn how a round went."""
        ...

    def message(self, text: str) -> None:
        """Learn something worth a line."""
        ...


class SilentObserver:
    """Shows nothing."""

    def run_started(self, info: RunInfo) -> None:
        """Show nothing."""

    def round_started(self, round_num: int) -> None:
        """Show nothing."""

    def round_finished(self, summary: RoundSummary) -> None:
        """Show nothing."""

    def message(self, text: str) -> None:
        """Show nothing."""


@dataclass(frozen=True)
class ClientResult:
    """A client's test metrics under the best round's models."""

    client: int
    test: RankingMetrics
    valid_mrr: float
    combination: float | None


@dataclass(frozen=True)
class ParticipationTotals:
    """What a simulated participation added up to; see `RoundPlan`.

    Attributes:
        virtual_seconds: of all rounds.
        num_late: times that a selected client missed the deadline.
        num_dropped: times that a client in time was not needed.
        num_skipped: rounds with too few clients.
    """

    virtual_seconds: float
    num_late: int
    num_dropped: int
    num_skipped: int


@dataclass(frozen=True)
class RunResult:
    """What a run ends with: test metrics of the round with the best validation MRR, costs and instruments.

    `num_rounds_to_95` counts the rounds until the validation MRR was 95 % of the best one; `participation` is None
    unless it was simulated, `privacy` without differential privacy.
    """

    folder: Path
    best_round: int
    num_rounds_to_95: int
    valid_mrr: float
    test: RankingMetrics
    clients: list[ClientResult]
    seconds: dict[str, float]
    bytes_up: int
    bytes_down: int
    imputation: dict[str, dict[str, float]]
    consistency: dict[str, float]
    participation: ParticipationTotals | None = None
    privacy: PrivacySpent | None = None


def metric_rows(
    round_num: int,
    result: RoundResult,
    evaluations: Sequence[ClientEvaluation],
    seconds: Mapping[str, float],
    plan: RoundPlan | None = None,
    measured: Measurements | None = None,
    privacy: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Make the rows of metrics.jsonl: one per client, and one for the round (client null)."""
    evaluated = {item.client: item for item in evaluations}
    reports = {report.client: report for report in result.reports}
    rows: list[dict[str, Any]] = []
    for client in sorted(evaluated.keys() | reports.keys()):
        row: dict[str, Any] = {"round": round_num, "client": client}
        if client in reports:
            report = reports[client]
            row |= {"losses": report.losses, "bytes_up": report.bytes_up, "bytes_down": report.bytes_down}
            row["seconds"] = report.seconds
        if client in evaluated:
            row |= {"valid": metrics_as_json(evaluated[client].metrics), "combination": evaluated[client].combination}
        rows.append(row)
    up, down = round_bytes(result)
    total: dict[str, Any] = {"round": round_num, "client": None, "bytes_up": up, "bytes_down": down}
    total |= {"phase_seconds": dict(seconds), "server_losses": result.server.losses if result.server else {}}
    losses = [report.losses["total"] for report in result.reports]
    total |= {"loss": float(np.mean(losses)) if losses else None, "num_trained": len(losses)}
    if result.server is not None:
        total["num_aggregated"] = result.server.num_updates
        total["rejected"] = [asdict(rejection) for rejection in result.server.rejected]
    total["failed"] = [asdict(failure) for failure in result.failures]
    total["unix_seconds"] = time.time()
    if evaluations:
        total["valid"] = metrics_as_json(weighted_mean([item.metrics for item in evaluations]))
    if measured is not None:
        total |= {"imputation": imputation_table(measured), "consistency": measured.consistency}
    if privacy is not None:
        total["privacy"] = dict(privacy)
    if plan is not None:
        total["participation"] = {
            "virtual_seconds": plan.virtual_seconds,
            "virtual_seconds_total": plan.total_seconds,
            "available": plan.num_available,
            "selected": plan.num_selected,
            "trained": len(plan.cohort),
            "late": plan.late,
            "dropped": plan.dropped,
        }
    return [*rows, total]


def imputation_table(measured: Measurements) -> dict[str, dict[str, float]]:
    """Average over clients: ``<modality>/<imputer>`` -> metric -> value."""
    values: dict[str, dict[str, list[float]]] = {}
    for metrics in measured.imputation.values():
        for name, value in metrics.items():
            row, metric = name.rsplit("/", 1)
            values.setdefault(row, {}).setdefault(metric, []).append(value)
    return {row: {name: float(np.mean(v)) for name, v in metrics.items()} for row, metrics in values.items()}


def participation_totals(plans: Sequence[RoundPlan]) -> ParticipationTotals:
    """Add up the rounds of a run, from the first."""
    return ParticipationTotals(
        virtual_seconds=plans[-1].total_seconds,
        num_late=sum(len(plan.late) for plan in plans),
        num_dropped=sum(len(plan.dropped) for plan in plans),
        num_skipped=sum(not plan.cohort for plan in plans),
    )


def rounds_to_95(rows: Sequence[Mapping[str, Any]], best_round: int, best_mrr: float) -> int:
    """Return the first round whose validation MRR is 95 % of the best one; rows as `metric_rows` makes them."""
    validated = [row for row in rows if row["client"] is None and "valid" in row]
    near = [int(row["round"]) for row in validated if row["valid"]["mrr"] >= NEAR_BEST * best_mrr]
    return min(near, default=best_round)


def metrics_as_json(metrics: RankingMetrics) -> dict[str, Any]:
    """Write ranking metrics (filtered, realistic) as JSON."""
    hits = {f"hits_at_{k}": value for k, value in metrics.hits.items()}
    return {"mrr": metrics.mrr, **hits, "num_queries": metrics.num_queries}


def result_as_json(result: RunResult) -> dict[str, Any]:
    """Write a result as JSON."""
    return {
        "best_round": result.best_round,
        "num_rounds_to_95": result.num_rounds_to_95,
        "valid_mrr": result.valid_mrr,
        "test": metrics_as_json(result.test),
        "clients": [
            {
                "client": item.client,
                "test": metrics_as_json(item.test),
                "valid_mrr": item.valid_mrr,
                "combination": item.combination,
            }
            for item in result.clients
        ],
        "seconds": result.seconds,
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "imputation": result.imputation,
        "consistency": result.consistency,
        "participation": asdict(result.participation) if result.participation is not None else None,
        "privacy": result.privacy.as_json() if result.privacy is not None else None,
    }


def round_bytes(result: RoundResult) -> tuple[int, int]:
    """Return the bytes that all clients of a round sent and were sent."""
    return sum(report.bytes_up for report in result.reports), sum(report.bytes_down for report in result.reports)
