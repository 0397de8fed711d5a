"""Sign flip: the change is turned around and lengthened, x' = g - s (x - g).

Source: Li et al., "RSA: Byzantine-Robust Stochastic Aggregation Methods for Distributed Learning from Heterogeneous
Datasets", AAAI 2019.

Symbols: x what an honest client sends, g `reference`, s `adversary.strength`.
"""

import torch

from fedsim.federated.attacks.base import Attack, Received, remake
from fedsim.federated.messages import ClientUpdate


class SignFlip(Attack):
    """Send the opposite of what was learned."""

    default_strength = 10.0

    def craft(self, update: ClientUpdate, received: Received, generator: torch.Generator) -> ClientUpdate:
        """Turn the change around."""
        return remake(update, received, lambda value, reference: reference - self.strength * (value - reference))
