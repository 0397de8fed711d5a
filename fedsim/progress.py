"""Where a run stands: what the round loop carries from round to round, and each checkpoint keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedsim.config import Config
from fedsim.evaluation.ranking import weighted_mean
from fedsim.federated.reports import ClientEvaluation
from fedsim.federated.runtime import RoundResult
from fedsim.results import round_bytes


@dataclass
class Progress:
    """Where the loop stands; saved in each checkpoint's manifest."""

    round_num: int = 0
    best_round: int | None = None
    best_mrr: float | None = None
    evaluations_since_best: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    privacy: dict[str, Any] | None = None

    def advance(
        self,
        round_num: int,
        result: RoundResult,
        evaluations: Sequence[ClientEvaluation],
        seconds: Mapping[str, float],
    ) -> bool:
        """Note a finished round; returns whether this round is the best so far."""
        self.round_num = round_num
        up, down = round_bytes(result)
        self.bytes_up += up
        self.bytes_down += down
        for phase, value in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value
        if not evaluations:
            return False
        mrr = weighted_mean([item.metrics for item in evaluations]).mrr
        if self.best_mrr is None or mrr > self.best_mrr:
            self.best_round, self.best_mrr, self.evaluations_since_best = round_num, mrr, 0
            return True
        self.evaluations_since_best += 1
        return False

    def out_of_patience(self, config: Config) -> bool:
        """Tell whether validation has not improved for as long as the config waits."""
        patience = config.evaluation.patience
        return patience is not None and self.evaluations_since_best >= patience
