"""Tail-entity flip: an attacker's training triples get wrong tails, and it trains on them in good faith.

Source: label flipping, as in Fung, Yoon and Beschastnikh, "The Limitations of Federated Learning in Sybil Settings",
RAID 2020; the form for triples is our inference. A share of the triples, `adversary.strength`, gets a tail drawn from
the client's other entities. Validation and test triples stay as they are.
"""

from dataclasses import replace

import numpy as np

from fedsim.data.clients import ClientData
from fedsim.federated.attacks.base import Attack


class TailFlip(Attack):
    """Poison the training triples."""

    max_strength = 1.0

    def poison(self, data: ClientData, generator: np.random.Generator) -> ClientData:
        """Give a share of the training triples another tail."""
        num_triples, num_entities = len(data.train), len(data.entity_ids)
        flipped = generator.choice(num_triples, round(self.strength * num_triples), replace=False)
        train = data.train.copy()
        train[flipped, 2] += generator.integers(1, max(num_entities, 2), len(flipped))
        train[:, 2] %= num_entities
        return replace(data, train=train)
