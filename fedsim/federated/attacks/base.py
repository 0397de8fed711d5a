"""The contract of a simulated attack (method.md section 5).

An attacker trains honestly, so that its own evaluation means something, and then sends something else; or its training
triples are poisoned beforehand. To add an attack: write a file with a class that extends `Attack`, and add a line to
`ATTACKS` in `fedsim/federated/attacks/__init__.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedsim.data.clients import ClientData
from fedsim.federated.messages import ClientUpdate
from fedsim.models.parameters import Params


@dataclass(frozen=True)
class Received:
    """What an attacker got from the server.

    Attributes:
        entity: the server's row of each row of the attacker's update, [num_rows, dim].
        modules: the server's modules.
    """

    entity: Tensor
    modules: Params


class Attack:
    """Does nothing at each of the three points where an attack can be made.

    Attributes:
        default_strength: that of `adversary.strength` null.
        max_strength: the largest that makes sense; None for any.
        colludes: whether attackers see each other's updates, see `forge`.

    Args:
        strength: how strongly.
    """

    default_strength: float = 1.0
    max_strength: float | None = None
    colludes: bool = False

    def __init__(self, strength: float | None) -> None:
        self.strength = self.default_strength if strength is None else strength

    def poison(self, data: ClientData, generator: np.random.Generator) -> ClientData:
        """Return what an attacker trains on."""
        return data

    def craft(self, update: ClientUpdate, received: Received, generator: torch.Generator) -> ClientUpdate:
        """Return what an attacker sends, of what it would send if it were honest."""
        return update

    def forge(
        self, updates: Sequence[ClientUpdate], received: Received, num_clients: int, num_attackers: int
    ) -> list[ClientUpdate]:
        """Return what colluding attackers send, of all that they would send if they were honest.

        Args:
            updates: of the round's attackers, in the order of their ids, in float32.
            received: the server's whole table, and its modules.
            num_clients: of the federation.
            num_attackers: of the federation.
        """
        return list(updates)


def remake(update: ClientUpdate, received: Received, change: Callable[[Tensor, Tensor], Tensor]) -> ClientUpdate:
    """Change rows, modules and tokens, in the precision in which they are sent.

    Args:
        update: what an honest client would send.
        received: what it got.
        change: makes a value of the honest one and of what was received; for tokens, of which nothing was, of zeros.
    """

    def changed(value: Tensor, reference: Tensor) -> Tensor:
        return change(value.float(), reference.float()).to(value.dtype)

    tokens = update.tokens
    return replace(
        update,
        entity=changed(update.entity, received.entity),
        modules={name: changed(value, received.modules[name]) for name, value in update.modules.items()},
        tokens=None if tokens is None else changed(tokens, torch.zeros_like(tokens)),
    )
