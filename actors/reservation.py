"""The share of a cluster that a federation gets: what is free, or the placement group that was reserved for it.

A trial of a sweep runs in a placement group. Its bundles are one per client actor, and one for the server; the process
that leads the trial waits most of the time and reserves nothing, like that of a single run.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray.util
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster import settled_resources, with_measured_memory
from actors.placement import Batch, PlacementPlan, plan_placement, plan_reserved
from fedsim.config import RuntimeConfig

TOLERANCE = 1e-3  # Ray keeps amounts in steps of 1e-4

Bundle = dict[str, float]


@dataclass(frozen=True)
class Share:
    """Where the actors of a federation go; without a group, wherever there is room."""

    plan: PlacementPlan
    with_server: bool
    group: PlacementGroup | None = None

    def of_client_actor(self, number: int) -> PlacementGroupSchedulingStrategy | str:
        """Return the scheduling strategy of a client actor."""
        return "SPREAD" if self.group is None else PlacementGroupSchedulingStrategy(self.group, number)

    def of_server(self) -> PlacementGroupSchedulingStrategy | str:
        """Return the scheduling strategy of the server actor."""
        last = -1 if self.group is None else self.group.bundle_count - 1
        return "DEFAULT" if self.group is None else PlacementGroupSchedulingStrategy(self.group, last)


def federation_bundles(config: RuntimeConfig, num_actors: int, *, with_server: bool) -> list[Bundle]:
    """Return what to reserve for a federation with so many client actors: the server's bundle is the last."""
    client = {"CPU": config.cpus_per_actor, "GPU": config.gpus_per_client}
    client = {name: amount for name, amount in client.items() if amount > 0}
    return [client] * num_actors + [{"CPU": config.cpus_per_actor}] * int(with_server)


def take_share(
    config: RuntimeConfig, work: Mapping[Batch, float], *, with_server: bool, state_bytes: float = 0.0
) -> Share:
    """Place a federation in the placement group of this process if it was made for one, else in the cluster.

    Args:
        config: placement asked for and resources per actor.
        work: batch of clients -> amount of work.
        with_server: there is a server actor.
        state_bytes: what all clients together keep in memory, beside their actors' own.

    Raises:
        RunError: if the cluster is too small for what the config asks.
    """
    group = ray.util.get_current_placement_group()
    if group is not None:
        num_actors = group.bundle_count - int(with_server)
        if _alike(group.bundle_specs, federation_bundles(config, num_actors, with_server=with_server)):
            return Share(plan_reserved(config, work, num_actors, with_server=with_server), with_server, group)
    nodes, free = settled_resources()
    nodes = with_measured_memory(nodes)
    plan = plan_placement(config, work, nodes, free, with_server=with_server, state_bytes=state_bytes)
    return Share(plan, with_server)


def free_name(base: str) -> str:
    """Return a name that no actor's begins with: it is free again only some time after a run's actors ended."""
    taken = {name.rpartition("/")[0] for name in ray.util.list_named_actors()}
    names = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


def _alike(found: Sequence[Mapping[str, float]], expected: Sequence[Bundle]) -> bool:
    """Tell whether a placement group has these bundles, in this order."""
    return len(found) == len(expected) and all(
        abs(one.get(name, 0.0) - other.get(name, 0.0)) < TOLERANCE
        for one, other in zip(found, expected, strict=True)
        for name in one.keys() | other.keys()
    )
