"""Which clients are trained together: a pure function of the config and of all clients' sizes (method.md section 8).

A batch is the unit of placement and of computation: it never spans actors, and the members that a round samples train
as one stacked computation. It does not depend on the cohort, the machine or the number of actors, so any placement
gives the same bits.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedsim.config import Config

# Clients and rows of entity tables in a batch, at most; on a CPU a larger stack leaves the cache and gains nothing.
CPU_BATCH = (16, 1 << 13)
GPU_BATCH = (256, 1 << 18)
MIN_BATCHES = 8  # fewer clients than twice as many train alone, and can be spread over as many actors
MAX_PADDING = 1.5  # most entities over fewest in a batch

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


def state_bytes(config: Config, size: ClientSize, num_views: int, num_module_numbers: int) -> float:
    """Predict the bytes of what a client keeps: entity table, modules, and the optimizer's two means, per view.

    Args:
        config: the experiment.
        size: of the client.
        num_views: models that it trains.
        num_module_numbers: parameters of a model's modules; those of the imputer, most of them, have a moving average.
    """
    return 4.0 * num_views * (3 * config.model.dim * size.num_entities + 4 * num_module_numbers)


def plan_batches(config: Config, sizes: Mapping[int, ClientSize]) -> tuple[tuple[int, ...], ...]:
    """Divide the clients into batches of similar size.

    Args:
        config: `runtime.clients_per_batch` is the most that share a batch, or null for the rule below; dedicated
            placement has batches of one.
        sizes: client id -> size, of all clients of the federation.

    Returns:
        The batches, each sorted, in order of their first client.
    """
    runtime = config.runtime
    if runtime.placement == "dedicated":
        limit, rows = 1, math.inf
    elif runtime.clients_per_batch is not None:
        limit, rows = runtime.clients_per_batch, math.inf
    else:
        most, rows = GPU_BATCH if runtime.gpus_per_client > 0 else CPU_BATCH
        limit = max(1, min(most, len(sizes) // MIN_BATCHES))
    # Neighbours in this order are alike, so a stacked table has little padding.
    ordered = sorted(sizes, key=lambda client: (sizes[client].num_entities, sizes[client].num_triples, client))
    batches: list[list[int]] = []
    for client in ordered:
        size = sizes[client].num_entities
        last = batches[-1] if batches else []
        padded = size * (len(last) + 1)
        alike = runtime.clients_per_batch is not None or not last or size <= MAX_PADDING * sizes[last[0]].num_entities
        if last and len(last) < limit and padded <= rows and alike:
            last.append(client)
        else:
            batches.append([client])
    return tuple(sorted(tuple(sorted(batch)) for batch in batches))
