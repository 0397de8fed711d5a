"""What a trial reserves: a bundle per client actor and one for the server, and whether the cluster has that much."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from ray.tune import PlacementGroupFactory

from actors.placement import ACTOR_BYTES, EPSILON, NodeResources
from actors.reservation import Bundle, federation_bundles
from fedsim.config import Config
from fedsim.data.dataset import load_dataset, resolve_dataset
from fedsim.data.splits import load_split, resolve_split
from fedsim.errors import RunError
from fedsim.federated.runtime import make_strategy


@dataclass(frozen=True)
class Reservation:
    """What one trial takes of the cluster.

    Attributes:
        bundles: what is reserved, each part on one node.
        what: in words.
        with_leader: the process that leads the trial does its work in the first bundle (else it waits for actors).
    """

    bundles: tuple[Bundle, ...]
    what: str
    with_leader: bool

    @property
    def num_processes(self) -> int:
        """Count the processes that hold torch."""
        return len(self.bundles) + (not self.with_leader)

    @property
    def factory(self) -> PlacementGroupFactory:
        """Return it as Tune takes it; the first bundle is the leader's."""
        bundles = [dict(bundle) for bundle in self.bundles]
        return PlacementGroupFactory(bundles if self.with_leader else [{}, *bundles], strategy="PACK")


def reserve(config: Config, share_cpus: float | None) -> Reservation:
    """Say what a trial reserves.

    Args:
        config: the trial's; with `runtime.placement` auto it gets one client actor, or as many as its share has room
            for, and at most one per client.
        share_cpus: the CPUs that a trial may have, if somebody said how many trials there are at a time.
    """
    runtime, strategy = config.runtime, make_strategy(config)
    if runtime.kind == "in_process":
        bundle = {"CPU": float(runtime.torch_threads), "GPU": runtime.gpus_per_client}
        what = f"one process on {_amounts(bundle)}"
        return Reservation(({name: value for name, value in bundle.items() if value > 0},), what, with_leader=True)
    num_clients = _num_clients(config) if not strategy.together else 1
    if runtime.placement == "dedicated":
        num_actors = num_clients
    elif runtime.num_actors is not None:
        num_actors = min(runtime.num_actors, num_clients)
    else:
        room = 1 if share_cpus is None else int(share_cpus / runtime.cpus_per_actor + EPSILON) - strategy.federated
        num_actors = min(max(room, 1), num_clients)
    bundles = federation_bundles(runtime, num_actors, with_server=strategy.federated)
    actors = f"{num_actors} client actor{'s' if num_actors > 1 else ''} on {_amounts(bundles[0])} each"
    server = f" and the server on {_amounts(bundles[-1])}" if strategy.federated else ""
    return Reservation(tuple(bundles), actors + server, with_leader=False)


def check_room(name: str, reservation: Reservation, nodes: Sequence[NodeResources]) -> None:
    """Refuse a trial that the cluster has no room for, even if it were alone.

    Raises:
        RunError: naming what it needs and what there is.
    """
    cpus = [node.cpus + EPSILON for node in nodes]
    gpus = [[1.0 + EPSILON] * int(node.gpus + EPSILON) for node in nodes]
    for bundle in sorted(reservation.bundles, key=lambda item: (-item.get("GPU", 0.0), -item.get("CPU", 0.0))):
        cpu, gpu = bundle.get("CPU", 0.0), bundle.get("GPU", 0.0)
        fitting = [
            at for at in range(len(nodes)) if cpus[at] >= cpu and (gpu == 0 or max(gpus[at], default=0.0) >= gpu)
        ]
        if not fitting:
            raise RunError(_too_large(name, reservation, nodes))
        cpus[fitting[0]] -= cpu
        if gpu > 0:  # a share lies on one GPU
            first = next(place for place, left in enumerate(gpus[fitting[0]]) if left >= gpu)
            gpus[fitting[0]][first] -= gpu
    memory, needs = sum(node.memory_bytes for node in nodes), reservation.num_processes * ACTOR_BYTES
    if memory < needs:
        raise RunError(
            f"{name} needs about {needs / 1e9:.1f} GB of memory ({reservation.num_processes} processes), but the "
            f"cluster has {memory / 1e9:.1f} GB free; choose runtime.placement pooled with a smaller num_actors"
        )


def most_at_a_time(reservations: Sequence[Reservation], nodes: Sequence[NodeResources]) -> int:
    """Count the trials whose processes the memory holds; CPUs and GPUs are counted by Ray."""
    memory = sum(node.memory_bytes for node in nodes)
    largest = max(reservation.num_processes for reservation in reservations)
    return max(int(memory / (largest * ACTOR_BYTES)), 1)


def _num_clients(config: Config) -> int:
    if config.data.split != "given":
        return config.data.num_clients
    return _count_given(config.data.path, str(config.data.split_file))


@cache
def _count_given(path: str, split_file: str) -> int:
    """Count the clients of a given split, which brings its own."""
    graph = load_dataset(resolve_dataset(path))
    return load_split(resolve_split(graph, split_file), graph).num_clients


def _too_large(name: str, reservation: Reservation, nodes: Sequence[NodeResources]) -> str:
    needed = {kind: sum(item.get(kind, 0.0) for item in reservation.bundles) for kind in ("CPU", "GPU")}
    has = {"CPU": sum(node.cpus for node in nodes), "GPU": sum(node.gpus for node in nodes)}
    pieces = " in pieces too small for it" if all(has[kind] + EPSILON >= needed[kind] for kind in has) else ""
    have = f"the cluster has {_amounts(has, both=True)}{pieces}"
    return (
        f"{name} needs {_amounts(needed)} ({reservation.what}), but {have}; "
        f"lower --concurrent, runtime.num_actors, runtime.cpus_per_actor or runtime.gpus_per_client, choose "
        f"runtime.placement pooled, or add nodes"
    )


def _amounts(bundle: Bundle, *, both: bool = False) -> str:
    gpus = bundle.get("GPU", 0.0)
    return f"{bundle.get('CPU', 0.0):g} CPU" + (f" and {gpus:g} GPU" if gpus > 0 or both else "")
