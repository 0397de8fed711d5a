"""Trimmed mean: number by number, the k largest and the k smallest values are left out.

Source: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018.
k = min(f, (n - 1) div 2), f the attackers among n senders by `robustness.attacker_share`, rounded up. Needs 3 senders;
two or one are combined by norm clipping.
"""

from torch import Tensor

from fedsim.federated.robust.base import Aggregator
from fedsim.federated.robust.norm_clipping import NormClipping


class TrimmedMean(Aggregator):
    """Mean without the extremes."""

    fallback = NormClipping

    def num_needed(self, num_attackers: int) -> int:
        """Return 3."""
        return 3

    def combine(self, values: Tensor, reference: Tensor, weights: Tensor, num_attackers: int) -> Tensor:
        """Leave out k values at both ends and average the rest."""
        num = values.shape[1]
        cut = min(num_attackers, (num - 1) // 2)
        return values.sort(1).values[:, cut : num - cut].mean(1)
