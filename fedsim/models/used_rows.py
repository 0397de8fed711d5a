"""Which entities a step with shared negatives uses (see `fedsim.models.step_entities`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.models.client_stack import ClientStack
from fedsim.models.imputers import Draws
from fedsim.models.step_entities import StepEntities


def cut_down(
    stack: ClientStack, triples: list[Tensor], negatives: list[Tensor], draws: dict[str, list[Draws]]
) -> tuple[StepEntities, list[Tensor], list[Tensor], dict[str, list[Draws]]]:
    """Find the entities that each client's step uses, and number triples, negatives and draws by them.

    Args:
        stack: the clients.
        triples: of each client's batch, int64 [batch, 3].
        negatives: that each client's batch shares, int64 [..., num_negatives].
        draws: view -> what its imputer drew for each client.

    Returns:
        The entities, and triples, negatives and draws with their places among them.
    """
    used = [
        UsedRows.of_step(own, others, [found[place] for found in draws.values()], member.num_entities)
        for place, (member, own, others) in enumerate(zip(stack.members, triples, negatives, strict=True))
    ]
    return (
        stack.some_entities([client.rows for client in used], [client.linked for client in used]),
        [client.number_triples(own) for client, own in zip(used, triples, strict=True)],
        [client.number(others) for client, others in zip(used, negatives, strict=True)],
        {
            view: [client.number_draws(own) for client, own in zip(used, found, strict=True)]
            for view, found in draws.items()
        },
    )


@dataclass(frozen=True)
class UsedRows:
    """The entities that one client's step uses, in ascending order, and each one's place among them.

    Attributes:
        rows: int64 [num_rows].
        linked: which of them the triples and the negatives name, bool [num_rows].
        place: int64 [num_entities]; undefined for entities that are not used.
    """

    rows: Tensor
    linked: Tensor
    place: Tensor

    @classmethod
    def of_step(cls, triples: Tensor, negatives: Tensor, draws: Sequence[Draws], num_entities: int) -> "UsedRows":
        """Find them.

        Args:
            triples: of the batch, int64 [batch, 3].
            negatives: that the batch shares, int64 [..., num_negatives].
            draws: of the imputer of each view.
            num_entities: of the client.
        """
        drawn = [value for own in draws for name, value in own.items() if name.endswith("rows")]
        named = torch.cat([triples[:, 0], triples[:, 2], negatives.flatten().to(triples.device)])
        rows = torch.cat([named, *(ids.to(named.device) for ids in drawn)]).unique()
        place = torch.empty(num_entities, dtype=torch.int64, device=rows.device)
        place[rows] = torch.arange(len(rows), device=rows.device)
        linked = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        linked[place[named]] = True
        return cls(rows, linked, place)

    def number_triples(self, triples: Tensor) -> Tensor:
        """Name heads and tails by their places, int64 [batch, 3]."""
        head, relation, tail = triples.unbind(-1)
        return torch.stack([self.place[head], relation, self.place[tail]], -1)

    def number(self, ids: Tensor) -> Tensor:
        """Name entities by their places, int64 [...]."""
        return self.place[ids.to(self.place.device)]

    def number_draws(self, draws: Draws) -> Draws:
        """Name the entities that an imputer drew by their places, and keep the draws of those that are used."""
        found = {}
        for name, value in draws.items():
            if name.endswith("rows"):
                found[name] = self.number(value)
            else:
                found[name] = value[:, self.rows.to(value.device)] if name.startswith("entity_") else value
        return found
