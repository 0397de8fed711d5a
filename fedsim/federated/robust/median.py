"""Coordinate median.

Source: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018. Of an even
number it is the mean of the two middle values. Needs 3 senders; two or one are combined by norm clipping (the median
of two would be their mean). With less than half of a row's senders attacking, each number of the result lies between
two honest ones.
"""

from torch import Tensor

from fedsim.federated.robust.base import Aggregator
from fedsim.federated.robust.norm_clipping import NormClipping


class Median(Aggregator):
    """The middle of the senders, number by number."""

    fallback = NormClipping

    def num_needed(self, num_attackers: int) -> int:
        """Return 3."""
        return 3

    def combine(self, values: Tensor, reference: Tensor, weights: Tensor, num_attackers: int) -> Tensor:
        """Take the middle value, or the mean of the two middle ones."""
        ordered = values.sort(1).values
        num = values.shape[1]
        return (ordered[:, (num - 1) // 2] + ordered[:, num // 2]) / 2
