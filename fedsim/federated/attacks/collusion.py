"""Attackers who know each other: what they send is made of the mean and the spread of their honest updates.

In the papers attackers share what they would have sent honestly and estimate from it what the others send. **The
simulation's shortcut:** attackers send their honest updates to the server like everybody, and `Colluders` there holds
them back, apart from all sums, and hands on what they agreed to send. So no message between clients exists that a
real federation would not have, and the numbers do not depend on where clients run. The strategy, the checks and the
aggregator see the forged updates alone.

With partial ownership the statistics of a row are over the attackers that own it: a single one has its own row as the
mean and no spread.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedsim.federated.attacks.base import Attack, Received
from fedsim.federated.messages import ClientUpdate


class Collusion(Attack):
    """Sends one value per row and module, of the attackers' mean and standard deviation."""

    colludes = True

    def value(self, mean: Tensor, deviation: Tensor, reference: Tensor, num_clients: int, num_attackers: int) -> Tensor:
        """Return what is sent in place of values whose honest statistics are given, all of the same shape."""
        raise NotImplementedError

    def forge(
        self, updates: Sequence[ClientUpdate], received: Received, num_clients: int, num_attackers: int
    ) -> list[ClientUpdate]:
        """Let all attackers send the same row of an entity, the same modules and the same tokens."""
        if not updates:
            return []
        num_rows = len(received.entity)

        def value(moments: tuple[Tensor, Tensor], reference: Tensor) -> Tensor:
            return self.value(*moments, reference.double(), num_clients, num_attackers).float()

        rows = _moments([update.entity_ids for update in updates], [update.entity for update in updates], num_rows)
        table = value(rows, received.entity)
        modules = {}
        for name, reference in received.modules.items():
            flat = torch.stack([update.modules[name].flatten() for update in updates]).double()
            moments = flat.mean(0), flat.std(0, correction=0)
            modules[name] = value(moments, reference.flatten()).view_as(reference)
        tokens = self._tokens(updates, num_rows, num_clients, num_attackers)
        return [
            replace(update, entity=table[update.entity_ids], modules=dict(modules), tokens=own)
            for update, own in zip(updates, tokens, strict=True)
        ]

    def _tokens(
        self, updates: Sequence[ClientUpdate], num_rows: int, num_clients: int, num_attackers: int
    ) -> list[Tensor | None]:
        """Forge the tokens of each modality like rows whose reference is zero."""
        sent = [
            (update.token_present, update.tokens)
            for update in updates
            if update.token_present is not None and update.tokens is not None
        ]
        if len(sent) < len(updates):
            return [None] * len(updates)
        forged: list[list[Tensor]] = [[] for _ in updates]
        starts = [0] * len(updates)
        for modality in range(len(sent[0][0])):
            ids, values = [], []
            for index, (present, tokens) in enumerate(sent):
                ids.append(updates[index].entity_ids[present[modality]])
                values.append(tokens[starts[index] : starts[index] + len(ids[-1])])
                starts[index] += len(ids[-1])
            mean, deviation = _moments(ids, values, num_rows)
            table = self.value(mean, deviation, torch.zeros_like(mean), num_clients, num_attackers).float()
            for index, own in enumerate(ids):
                forged[index].append(table[own])
        return [torch.cat(parts) for parts in forged]


def _moments(ids: Sequence[Tensor], values: Sequence[Tensor], num_rows: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each row over those that have it, [num_rows, dim] each; else zero."""
    count = torch.zeros(num_rows, 1, dtype=torch.float64)
    total = torch.zeros(num_rows, values[0].shape[1], dtype=torch.float64)
    for own, rows in zip(ids, values, strict=True):
        count[own] += 1
        total[own] += rows.double()
    mean = total / count.clamp(min=1)
    spread = torch.zeros_like(total)
    for own, rows in zip(ids, values, strict=True):
        spread[own] += (rows.double() - mean[own]).square()
    return mean, (spread / count.clamp(min=1)).sqrt()
