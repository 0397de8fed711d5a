"""Which client lives in which actor: a pure function of config, clients and what the cluster has."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from fedsim.config import RuntimeConfig
from fedsim.errors import RunError

ACTOR_BYTES = 250_000_000  # private memory of a process that has imported torch, measured on Linux
Batch: TypeAlias = tuple[int, ...]
IMBALANCE = 0.15  # of the busiest actor above the mean that is left as it is: a move costs about as much
EPSILON = 1e-6  # shares such as 0.1 are not exact in binary


@dataclass(frozen=True)
class NodeResources:
    """What one node of the cluster has."""

    cpus: float
    gpus: float
    memory_bytes: float


@dataclass(frozen=True)
class PlacementPlan:
    """Where clients go.

    Attributes:
        kind: one actor per client, or a pool.
        groups: the batches of client ids of each actor.
        num_cpus: CPUs reserved per actor, and for the server.
        num_gpus: GPUs reserved per client actor.
        lines: what was chosen and why, for the user.
    """

    kind: Literal["dedicated", "pooled"]
    groups: tuple[tuple[Batch, ...], ...]
    num_cpus: float
    num_gpus: float
    lines: tuple[str, ...]


@dataclass(frozen=True)
class _Limit:
    """How many client actors one resource carries, and what it would take to carry `num_actors`."""

    resource: str
    num_actors: int
    each: str
    needed: float
    available: float
    mend: str


def plan_placement(
    config: RuntimeConfig,
    work: Mapping[Batch, float],
    nodes: Sequence[NodeResources],
    free: NodeResources,
    *,
    with_server: bool,
    state_bytes: float = 0.0,
) -> PlacementPlan:
    """Decide how many actors there are and which clients each one holds.

    Args:
        config: placement asked for and resources per actor.
        work: batch of clients -> amount of work; actors of a pool get about the same.
        nodes: what each node has.
        free: what all nodes together have free.
        with_server: leave room for a server actor.
        state_bytes: what all clients together keep in memory, beside their actors' own.

    Raises:
        RunError: if the cluster is too small for what the config asks, naming what is needed and what there is.
    """
    num_clients, singles = sum(map(len, work)), all(len(batch) == 1 for batch in work)
    memory = sum(node.memory_bytes for node in nodes)
    share = state_bytes / len(nodes)
    nodes = [replace(node, memory_bytes=max(node.memory_bytes - share, 0.0)) for node in nodes]
    reserved = f"{memory / 1e9:.1f} GB of memory free, {state_bytes / 1e9:.1f} GB of it for the clients' state"
    limits = _limits(config, nodes, free, num_clients, with_server)
    tightest = min(limits, key=lambda limit: limit.num_actors)
    fits = max(min(tightest.num_actors, _packed(config, nodes, with_server)), 0)
    if config.placement == "dedicated" and fits < num_clients:
        raise RunError(_too_small(f"dedicated placement of {num_clients} clients", num_clients, tightest, with_server))
    if config.placement == "dedicated" or (config.placement == "auto" and singles and fits >= num_clients):
        why = "as asked" if config.placement == "dedicated" else f"the cluster has room for all {num_clients}"
        groups = tuple((batch,) for batch in sorted(work))
        return _plan("dedicated", groups, config, f"{why}; {reserved}", with_server)
    wanted = min(config.num_actors or max(fits, 1), len(work))
    if wanted > fits:
        raise RunError(_too_small(f"a pool of {wanted} client actors", wanted, tightest, with_server))
    why = f"room for {fits} client actors, not for {num_clients} (limit: {tightest.resource})"
    if fits >= num_clients:
        why = f"{num_clients} clients train together in {len(work)} batches"
    why = "as asked" if config.placement == "pooled" else why
    return _plan("pooled", deal(work, wanted), config, f"{why}; {reserved}", with_server)


def plan_reserved(
    config: RuntimeConfig, work: Mapping[Batch, float], num_actors: int, *, with_server: bool
) -> PlacementPlan:
    """Deal clients to the actors that a placement group was reserved for; arguments as in `plan_placement`."""
    kind: Literal["dedicated", "pooled"] = "dedicated" if config.placement == "dedicated" else "pooled"
    groups = deal(work, min(num_actors, len(work)))
    return _plan(kind, groups, config, "in the placement group reserved for it", with_server)


def deal(work: Mapping[Batch, float], num_actors: int) -> tuple[tuple[Batch, ...], ...]:
    """Deal batches to actors, the longest first and each to the actor with the least work, in that order."""
    groups: list[list[Batch]] = [[] for _ in range(num_actors)]
    load = [0.0] * num_actors
    for batch in sorted(work, key=lambda batch: (-work[batch], batch)):
        target = load.index(min(load))
        groups[target].append(batch)
        load[target] += max(work[batch], 1.0)
    return tuple(tuple(group) for group in groups)


@dataclass(frozen=True)
class Move:
    """A batch of clients that goes from one actor to another; actors are positions in the pool."""

    batch: Batch
    source: int
    target: int


def rebalance(groups: Sequence[Sequence[Batch]], seconds: Mapping[Batch, float]) -> list[Move]:
    """Choose batches to move until the busiest actor is near the mean, or no move helps.

    Args:
        groups: the batches of each actor.
        seconds: of each batch in a round, as measured.

    Returns:
        The moves; none as long as the busiest actor is within `IMBALANCE` of the mean.
    """
    held = [list(group) for group in groups]
    load = [sum(seconds[batch] for batch in group) for group in held]
    moves: list[Move] = []
    bound = (1 + IMBALANCE) * sum(load) / len(load)
    while max(load) > bound and len(moves) < len(seconds):
        source, target = load.index(max(load)), load.index(min(load))
        gap = load[source] - load[target]
        # Half of the gap would make both alike; more than the gap would make it worse.
        batch = min(held[source], key=lambda batch: (abs(seconds[batch] - gap / 2), batch))
        if not 0 < seconds[batch] < (1 - IMBALANCE) * gap:
            break
        held[source].remove(batch)
        held[target].append(batch)
        load[source] -= seconds[batch]
        load[target] += seconds[batch]
        moves.append(Move(batch, source, target))
    return moves


def _plan(
    kind: Literal["dedicated", "pooled"],
    groups: tuple[tuple[Batch, ...], ...],
    config: RuntimeConfig,
    why: str,
    with_server: bool,
) -> PlacementPlan:
    num_clients = sum(len(batch) for group in groups for batch in group)
    actors = "1 client actor" if len(groups) == 1 else f"{len(groups)} client actors"
    gpus = f" and {config.gpus_per_client:g} GPU" if config.gpus_per_client > 0 else ""
    server = f", server actor on {config.cpus_per_actor:g} CPU" if with_server else ""
    held = "one per client" if kind == "dedicated" else f"holding {num_clients} clients"
    lines = (
        f"{kind}: {actors}, {held}, each on {config.cpus_per_actor:g} CPU{gpus}{server}",
        f"placement {config.placement}: {why}",
    )
    return PlacementPlan(kind, groups, config.cpus_per_actor, config.gpus_per_client, lines)


def _limits(
    config: RuntimeConfig, nodes: Sequence[NodeResources], free: NodeResources, num_clients: int, with_server: bool
) -> list[_Limit]:
    """Ask each resource alone how many client actors it carries."""
    server = int(with_server)
    cpus, gpus = config.cpus_per_actor, config.gpus_per_client
    by_cpu = min(sum(_times(node.cpus, cpus) for node in nodes), _times(free.cpus, cpus)) - server
    by_memory = sum(_times(node.memory_bytes, ACTOR_BYTES) for node in nodes) - server
    lower = "lower runtime.cpus_per_actor, choose runtime.placement pooled with a smaller num_actors, or add CPUs"
    limits = [
        _Limit("CPUs", by_cpu, f"{cpus:g} each", cpus, free.cpus, lower),
        _Limit(
            "GB of memory",
            by_memory,
            f"about {ACTOR_BYTES / 1e9:g} GB each",
            ACTOR_BYTES / 1e9,
            sum(node.memory_bytes for node in nodes) / 1e9,
            "choose runtime.placement pooled with a smaller num_actors, or add memory",
        ),
    ]
    if gpus > 0:
        per_gpu = _times(1, gpus)  # an actor's share lies on one GPU: 0.4 fits twice
        by_gpu = min(sum(int(node.gpus + EPSILON) for node in nodes) * per_gpu, _times(free.gpus, gpus))
        mend = "lower runtime.gpus_per_client (0 trains on CPUs), or add GPUs"
        limits.append(_Limit("GPUs", by_gpu, f"{gpus:g} each", gpus, free.gpus, mend))
    return limits


def _packed(config: RuntimeConfig, nodes: Sequence[NodeResources], with_server: bool) -> int:
    """Count the client actors that fit node by node, where all of an actor's resources must be on one node."""
    total, spare = 0, False
    per_gpu = _times(1, config.gpus_per_client) if config.gpus_per_client > 0 else 0
    for node in nodes:
        slots = min(_times(node.cpus, config.cpus_per_actor), _times(node.memory_bytes, ACTOR_BYTES))
        clients = min(slots, int(node.gpus + EPSILON) * per_gpu) if per_gpu else slots
        spare = spare or slots > clients
        total += clients
    return total - (1 if with_server and not spare else 0)


def _times(amount: float, share: float) -> int:
    return math.floor(amount / share + EPSILON)


def _too_small(what: str, num_actors: int, limit: _Limit, with_server: bool) -> str:
    server = with_server and limit.resource != "GPUs"
    actors = f"{num_actors} client actor{'s' if num_actors > 1 else ''}{' and the server' if server else ''}"
    needed = limit.needed * (num_actors + int(server))
    return (
        f"{what} needs {needed:g} {limit.resource} ({actors}, {limit.each}), but {limit.available:g} are available; "
        f"{limit.mend}"
    )
