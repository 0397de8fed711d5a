"""Krum and Multi-Krum: the rows that are nearest to the others.

Source: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017. With
n senders of which f attack, the score of a row is the sum of its squared distances to its n - f - 2 nearest others.
Krum takes the row with the lowest score; of equal ones the sender with the lowest id. Multi-Krum averages the n - f
rows with the lowest scores (the number is our choice). Both need n >= 2 f + 3 senders, at least 4 (of three and with f
= 0 the two that are nearest to each other always tie); fewer are combined by the trimmed mean.

A row here is one entity's, or all shared modules of a client as one vector.
"""

import torch
from torch import Tensor

from fedsim.federated.robust.base import Aggregator
from fedsim.federated.robust.trimmed_mean import TrimmedMean


class Krum(Aggregator):
    """The one row with the lowest score."""

    fallback = TrimmedMean

    def num_needed(self, num_attackers: int) -> int:
        """Return 2 f + 3, at least 4."""
        return max(2 * num_attackers + 3, 4)

    def combine(self, values: Tensor, reference: Tensor, weights: Tensor, num_attackers: int) -> Tensor:
        """Take the row with the lowest score."""
        return self._lowest(values, reference, num_attackers, 1)[:, 0]

    def _lowest(self, values: Tensor, reference: Tensor, num_attackers: int, num_taken: int) -> Tensor:
        """Return the rows with the lowest scores in the order of their senders, [num_rows, num_taken, dim]."""
        num = values.shape[1]
        scores = nearest_sums(squared_distances(values, reference), num - num_attackers - 2)
        taken = scores.sort(dim=1, stable=True).indices[:, :num_taken].sort(1).values
        return take_senders(values, taken)


class MultiKrum(Krum):
    """The mean of the n - f rows with the lowest scores."""

    def combine(self, values: Tensor, reference: Tensor, weights: Tensor, num_attackers: int) -> Tensor:
        """Average the rows with the lowest scores."""
        return self._lowest(values, reference, num_attackers, values.shape[1] - num_attackers).mean(1)


def squared_distances(values: Tensor, reference: Tensor) -> Tensor:
    """Return squared distances between senders, infinite to themselves, [num_rows, num_senders, num_senders].

    Taken of the changes: they are small beside the rows, and a difference of large numbers would lose digits.
    """
    change = values - reference.unsqueeze(1)
    products = change @ change.transpose(1, 2)
    squares = products.diagonal(dim1=1, dim2=2)
    distances = (squares.unsqueeze(2) + squares.unsqueeze(1) - 2 * products).clamp(min=0)
    return distances.diagonal_scatter(torch.full_like(squares, torch.inf), dim1=1, dim2=2)


def nearest_sums(distances: Tensor, num_near: int) -> Tensor:
    """Add up each sender's distances to so many nearest others, [num_rows, num_senders]."""
    return distances.sort(2).values[:, :, :num_near].sum(2)


def take_senders(values: Tensor, senders: Tensor) -> Tensor:
    """Take some senders of each row, int64 [num_rows, num_taken] -> [num_rows, num_taken, dim]."""
    return values.gather(1, senders.unsqueeze(-1).expand(-1, -1, values.shape[2]))
