"""The contract of a robust aggregator, and what happens where too few clients sent a row.

To add one: write a file with a class that extends `Aggregator`, and add a line to `AGGREGATORS` in
`fedsim/federated/robust/__init__.py`.
"""

import math
from typing import ClassVar

from torch import Tensor

from fedsim.robustness_config import RobustnessConfig


class Aggregator:
    """Makes one row of the rows that several clients sent.

    Clients own different entities, so each row has its own senders. An aggregator says how many it needs; a row with
    fewer is made by its `fallback`, and so on down to norm clipping, which needs one.

    Args:
        config: share of the attackers and bounds.
    """

    fallback: ClassVar["type[Aggregator] | None"] = None

    def __init__(self, config: RobustnessConfig) -> None:
        self.config = config

    def num_needed(self, num_attackers: int) -> int:
        """Return the fewest senders that this aggregator works with, if so many of them are attackers."""
        raise NotImplementedError

    def combine(self, values: Tensor, reference: Tensor, weights: Tensor, num_attackers: int) -> Tensor:
        """Make one row of each group of rows; senders are in the order of their ids.

        Args:
            values: what was sent, float64 [num_rows, num_senders, dim].
            reference: the server's rows of the round before, [num_rows, dim].
            weights: of the senders, [num_senders]. They come from counts that clients name themselves, so most
                aggregators weigh all alike.
            num_attackers: how many of the senders are taken for attackers.

        Returns:
            [num_rows, dim].
        """
        raise NotImplementedError


def expected_attackers(share: float, num_senders: int) -> int:
    """Return how many of a row's senders are taken for attackers: the share, rounded up."""
    return math.ceil(round(share * num_senders, 9))


def combine(aggregator: Aggregator, values: Tensor, reference: Tensor, weights: Tensor) -> Tensor:
    """Combine rows that have equally many senders by an aggregator, or by the first fallback that has enough.

    Args:
        aggregator: the one that the config names.
        values: float64 [num_rows, num_senders, dim].
        reference: float64 [num_rows, dim].
        weights: float64 [num_senders].
    """
    num_senders = values.shape[1]
    num_attackers = expected_attackers(aggregator.config.attacker_share, num_senders)
    while num_senders < aggregator.num_needed(num_attackers):
        assert aggregator.fallback is not None, "the last fallback needs one sender, and every row here has one"
        aggregator = aggregator.fallback(aggregator.config)
    return aggregator.combine(values, reference, weights, num_attackers)
