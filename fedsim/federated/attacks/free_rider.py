"""Free rider: a client that gives nothing and sends back what it got, x' = g; its tokens are zero.

Source: the plain free rider of Fraboni, Vidal and Lorenzi, "Free-rider Attacks on Model Aggregation in Federated
Learning", AISTATS 2021. It harms little at once: it slows the others down. Its soft queries stay honest here.
"""

import torch

from fedsim.federated.attacks.base import Attack, Received, remake
from fedsim.federated.messages import ClientUpdate


class FreeRider(Attack):
    """Send back what was received."""

    def craft(self, update: ClientUpdate, received: Received, generator: torch.Generator) -> ClientUpdate:
        """Send what was received."""
        return remake(update, received, lambda value, reference: reference)
