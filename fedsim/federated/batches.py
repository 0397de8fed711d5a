"""Which clients are trained together: a pure function of the config and of all clients' sizes (method.md section 8).

A batch is the unit of placement and of computation: it never spans actors, and the members that a round samples train
as one stacked computation. It does not depend on the cohort, the machine or the number of actors, so any placement
gives the same bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedsim.config import Config


@dataclass(frozen=True)
class ClientSize:
    """What a client's cost follows from."""

    num_entities: int
    num_triples: int


def plan_batches(config: Config, sizes: Mapping[int, ClientSize]) -> tuple[tuple[int, ...], ...]:
    """Divide the clients into batches of similar size.

    Args:
        config: `runtime.clients_per_batch` is the most that share a batch; dedicated placement has batches of one.
        sizes: client id -> size, of all clients of the federation.

    Returns:
        The batches, each sorted, in order of their first client.
    """
    limit = 1 if config.runtime.placement == "dedicated" else config.runtime.clients_per_batch or 1
    # Neighbours in this order are alike, so a stacked table has little padding.
    ordered = sorted(sizes, key=lambda client: (sizes[client].num_entities, sizes[client].num_triples, client))
    batches = [tuple(sorted(ordered[start : start + limit])) for start in range(0, len(ordered), limit)]
    return tuple(sorted(batches))
