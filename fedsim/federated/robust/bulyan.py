"""Bulyan: a selection by Krum, then number by number the values nearest to the selection's median.

Source: El Mhamdi, Guerraoui and Rouault, "The Hidden Vulnerability of Distributed Learning in Byzantium", ICML 2018.
With n senders of which f attack: Krum's choice is taken out and kept, again and again, until n - 2 f are kept; then of
each number the n - 4 f kept values nearest to their median are averaged. Needs n >= 4 f + 3; fewer are combined by
Multi-Krum. As fewer are left, Krum's score counts (number left) - f - 2 nearest others, at least two (our choice: by a
single one, the two that are nearest to each other always tie).
"""

import torch
from torch import Tensor

from fedsim.federated.robust.base import Aggregator
from fedsim.federated.robust.krum import MultiKrum, nearest_sums, squared_distances, take_senders


class Bulyan(Aggregator):
    """Repeated Krum and a trimmed mean around the median."""

    fallback = MultiKrum

    def num_needed(self, num_attackers: int) -> int:
        """Return 4 f + 3."""
        return 4 * num_attackers + 3

    def combine(self, values: Tensor, reference: Tensor, weights: Tensor, num_attackers: int) -> Tensor:
        """Select, then average what is near the median."""
        num = values.shape[1]
        selected = take_senders(values, _select(squared_distances(values, reference), num_attackers))
        ordered = selected.sort(1).values
        num_selected = ordered.shape[1]
        median = (ordered[:, (num_selected - 1) // 2] + ordered[:, num_selected // 2]) / 2
        nearest = (ordered - median.unsqueeze(1)).abs().sort(dim=1, stable=True).indices[:, : num - 4 * num_attackers]
        return ordered.gather(1, nearest).mean(1)


def _select(distances: Tensor, num_attackers: int) -> Tensor:
    """Return the n - 2 f senders that repeated Krum takes, in the order of their ids, int64 [num_rows, n - 2 f]."""
    num = distances.shape[1]
    gone = torch.zeros(distances.shape[:2], dtype=torch.bool)  # [num_rows, num_senders]
    for num_left in range(num, 2 * num_attackers, -1):
        num_near = min(max(num_left - num_attackers - 2, 2), num_left - 1)
        scores = nearest_sums(distances.masked_fill(gone.unsqueeze(1), torch.inf), num_near)
        best = scores.masked_fill(gone, torch.inf).argmin(1, keepdim=True)
        gone = gone.scatter(1, best, True)
    return gone.nonzero()[:, 1].view(len(gone), -1)
