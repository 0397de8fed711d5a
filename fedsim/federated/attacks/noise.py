"""Gaussian noise: x' = g + s r z, z standard normal, r the root mean square of the honest change.

Source: the Gaussian attack of Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient
Descent", NeurIPS 2017, there with a fixed large variance.

Symbols: g `reference`, s `adversary.strength`.
"""

import torch
from torch import Tensor

from fedsim.federated.attacks.base import Attack, Received, remake
from fedsim.federated.messages import ClientUpdate


class Noise(Attack):
    """Send noise in place of what was learned."""

    default_strength = 10.0

    def craft(self, update: ClientUpdate, received: Received, generator: torch.Generator) -> ClientUpdate:
        """Draw noise as long as the strength says."""

        def drawn(value: Tensor, reference: Tensor) -> Tensor:
            size = (value - reference).square().mean().sqrt() if value.numel() else 0.0
            return reference + self.strength * size * torch.randn(value.shape, generator=generator)

        return remake(update, received, drawn)
