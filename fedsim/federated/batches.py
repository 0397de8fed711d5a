"""Which clients are trained together: a pure function of the config and of all clients' sizes (method.md section 8).

A batch is the unit of placement and of computation: it never spans actors, and the members that a round samples train
as one stacked computation. It does not depend on the cohort, the machine or the number of actors, so any placement
gives the same bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedsim.config import Config

STEP_ROWS = 16  # scoring so many rows costs as much as an optimizer step on one


@dataclass(frozen=True)
class ClientSize:
    """What a client's cost follows from."""

    num_entities: int
    num_triples: int


def predicted_work(config: Config, size: ClientSize) -> float:
    """Predict a client's work in a round: scores of its queries, and updates of its entity table, in rows of `dim`.

    Batches are dealt to actors by this; their measured seconds correct it.
    """
    training = config.training
    steps = -(-size.num_triples // training.batch_size)
    candidates = size.num_entities if training.loss == "one_vs_all" else training.num_negatives
    scored = size.num_triples * candidates
    return float(max(training.local_epochs, 1) * (scored + STEP_ROWS * steps * size.num_entities))


def state_bytes(config: Config, size: ClientSize, num_views: int) -> float:
    """Predict the bytes of what a client keeps: its entity table and the optimizer's two means of it, per view."""
    return 3.0 * 4 * config.model.dim * size.num_entities * num_views


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
