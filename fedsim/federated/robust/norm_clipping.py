"""Norm clipping: no client moves a row further than is usual among the row's senders, then the mean.

Source: Sun et al., "Can You Really Backdoor Federated Learning?", 2019, where the bound is a constant. Here it is the
median of the senders' changes (our choice): x_i' = g + (x_i - g) min(1, k m / ||x_i - g||), m = median_j ||x_j - g||.
Of an even number the lower middle one is the median, so that of two senders the one that moves more is cut down to
the other. Needs one sender, whose row it takes as it is: nobody else can tell whether it is right.

It bounds what an attacker can do and takes no direction away: many attackers still pull the mean their way.

Symbols: g `reference`, k `robustness.clip_factor`, m `middle`.
"""

from torch import Tensor

from fedsim.federated.robust.base import Aggregator


class NormClipping(Aggregator):
    """Weighted mean of clipped changes."""

    def num_needed(self, num_attackers: int) -> int:
        """Return 1."""
        return 1

    def combine(self, values: Tensor, reference: Tensor, weights: Tensor, num_attackers: int) -> Tensor:
        """Clip each sender's change and average."""
        change = values - reference.unsqueeze(1)
        norm: Tensor = change.norm(dim=-1)  # [num_rows, num_senders]
        middle = norm.median(1, keepdim=True).values
        factor = (self.config.clip_factor * middle / norm.clamp(min=1e-300)).clamp(max=1.0)
        share = (weights / weights.sum() * factor).unsqueeze(-1)
        return reference + (change * share).sum(1)
