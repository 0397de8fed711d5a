"""Boosted update: the honest change, many times as long, so that it outweighs all others: x' = g + s (x - g).

Source: Bagdasaryan et al., "How To Backdoor Federated Learning", AISTATS 2020, whose attacker scales its update so that
it survives the average.

Symbols: x what an honest client sends, g `reference`, s `adversary.strength`.
"""

import torch

from fedsim.federated.attacks.base import Attack, Received, remake
from fedsim.federated.messages import ClientUpdate


class Boost(Attack):
    """Lengthen the change."""

    default_strength = 20.0

    def craft(self, update: ClientUpdate, received: Received, generator: torch.Generator) -> ClientUpdate:
        """Lengthen the change."""
        return remake(update, received, lambda value, reference: reference + self.strength * (value - reference))
