"""The actors of a run: where they are, what they are given, and calls to them."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle, ActorProxy
from ray.exceptions import RayError
from torch import Tensor

from actors.calls import Call, Guard, collect, name_clients, result_of
from actors.client import ClientActor
from actors.metrics import RunMetrics, WatchedTimeline
from actors.placement import Batch
from actors.pool import PARTS, Held, NoRoomError
from actors.reservation import Share, free_name, take_share
from actors.server import ServerActor, _ServerActor
from fedsim.config import Config
from fedsim.data.clients import ClientData, shared_matrices, without_matrices
from fedsim.errors import RunError
from fedsim.evaluation.consistency import shared_entities
from fedsim.federated.aggregation import SumShape
from fedsim.federated.batches import plan_batches, predicted_work, state_bytes
from fedsim.federated.robust import placement_lines, sends_singly
from fedsim.federated.runtime import (
    Experiment,
    client_sizes,
    make_strategy,
    num_module_numbers,
    num_shared,
    sampled,
)
from fedsim.federated.timeline import Timeline
from fedsim.process import return_freed_memory

logger = logging.getLogger(__name__)

T = TypeVar("T")
H = TypeVar("H")

STARTING = "starting (waiting for free CPUs, GPUs and a process)"
NAME_SECONDS = 20.0  # for Ray to learn that an actor is dead, after which another may have its name


class Crew:
    """Clients and server in actors, and calls to them.

    Args:
        config: the experiment.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.timeout = config.runtime.timeout_seconds
        self.placement: list[str] = []
        self.timeline: Timeline = WatchedTimeline(self._tell_failed)
        self.metrics: RunMetrics | None = None
        self.pool: list[Held] = []
        self.server: ActorProxy[_ServerActor] | None = None
        self.server_name, self.server_node, self.server_pid = "", "not known yet", 0
        self.clients: list[int] = []
        self.shared: ObjectRef[Tensor] | None = None  # ids of entities that several clients have
        self.shape: SumShape | None = None  # of a round's sums, once all clients are known
        self.sums_at_nodes = False  # whether actors send partial sums, or each client's update
        self.guard: Guard | None = None  # mends what fails in calls to client actors
        self.at_once: dict[str, int] = {}  # actor -> clients that its GPU's memory was said to hold
        self.starting_seconds = 0.0  # waited for actors that take the place of others
        self._options: dict[str, dict[str, Any]] = {}  # actor -> how Ray starts it
        self._num_started: Counter[str] = Counter()
        self._server_data: tuple[int, Mapping[str, int]] = (0, {})  # rows that clients share, widths of features
        self._matrices: dict[str, ObjectRef[Any]] = {}  # of features, read in place by the actors of a node

    def start(self, experiment: Experiment) -> None:
        """Place the actors, hand each client its data, and make it known to the server; keep no data here."""
        share = self._take_share(experiment)
        plan = share.plan
        run = free_name(f"fedsim/{self._base_name(experiment.graph_name)}")
        per_client = len(experiment.clients) < self.config.watching.per_client_below
        self.metrics = RunMetrics(run, self.config.federation.num_rounds, per_client=per_client)
        # Ray would restart an actor without what its clients kept: `actors.recovery` does it with that.
        fixed = {"num_cpus": plan.num_cpus, "max_restarts": 0, "max_task_retries": 0}
        if share.with_server:
            self.server_name = f"{run}/server"
            self._options[self.server_name] = {"scheduling_strategy": share.of_server(), **fixed}
            self._server_data = num_shared(experiment), experiment.feature_dims
            self.server = self._new_server()
        for number, group in enumerate(plan.groups):
            name = f"{run}/client-{group[0][0]:05d}" if plan.kind == "dedicated" else f"{run}/pool-{number}"
            where = share.of_client_actor(number)
            self._options[name] = {"num_gpus": plan.num_gpus, "scheduling_strategy": where, **fixed}
            self.pool.append(Held(self._new_client_actor(name), name, group))
        places = {
            call.actor: place for call, place in self.each_actor(STARTING, lambda held: held.actor.start.remote())
        }
        for held in self.pool:
            held.settle(places[held.name])
        if self.server is not None:
            self.server_node, self.server_pid = self.await_server(self.server.start.remote(), STARTING)
        num_nodes = len({held.node_id for held in self.pool})
        self.sums_at_nodes = not sends_singly(self.config) and (plan.kind == "pooled" or num_nodes > 1)
        machines = "on this machine" if self.config.runtime.address is None else f"on {num_nodes} node(s)"
        threads = f"{self.config.runtime.torch_threads} torch thread(s) each"
        largest = max(held.private_bytes for held in self.pool) / 1e6
        lines = [*plan.lines, *placement_lines(self.config)]
        self.placement = [*lines, f"actors {run}/... {machines}, {threads}, {largest:.0f} MB before their clients"]
        self._hand_out(experiment)

    def each_batch(
        self,
        what: str,
        submit: "Callable[[Held, Batch], ObjectRef[T]]",
        cohort: Sequence[int] | None = None,
        *,
        optional: bool = False,
        deadline: float = math.inf,
        pool: Sequence[Held] | None = None,
    ) -> Iterator[tuple[Call[T], T]]:
        """Make a call for every batch (its members in the cohort), results in order of completion.

        Args:
            what: the work, in words.
            submit: makes the call.
            cohort: clients of the round; None for all.
            optional: whether a round can go on without some.
            deadline: as in `collect`.
            pool: actors that are called; None for all.
        """
        queues = [
            [
                Call(name_clients(batch), held.name, held.node, what, partial(submit, held, batch), batch, optional)
                for batch in (held.batches if cohort is None else sampled(held.batches, cohort))
            ]
            for held in (self.pool if pool is None else pool)
        ]
        results = collect(queues, self.timeout, self.timeline, self.guard, deadline)
        return results if self.metrics is None else self.metrics.queues(queues, results)

    def each_actor(
        self, what: str, submit: "Callable[[Held], ObjectRef[T]]", pool: Sequence[Held] | None = None
    ) -> Iterator[tuple[Call[T], T]]:
        """Make a call to every client actor (of those given), results in order of completion."""
        calls = [
            Call(name_clients(held.clients), held.name, held.node, what, partial(submit, held))
            for held in (self.pool if pool is None else pool)
        ]
        return collect([[call] for call in calls], self.timeout, self.timeline, self.guard)

    def await_server(self, ref: "ObjectRef[T]", what: str) -> T:
        """Wait for the result of a call to the server."""
        call = Call("the server", self.server_name, self.server_node, what, lambda: ref)
        return result_of(call, self.timeout, self.timeline)

    def say_parts(self, call: Call[Any], at_once: int) -> None:
        """Say once per actor and size that a GPU's memory holds fewer clients at once than a batch has."""
        if at_once < min(len(call.clients), self.at_once.get(call.actor, len(call.clients))):
            self.at_once[call.actor] = at_once
            logger.warning(PARTS, call.actor, call.what, len(call.clients), at_once)

    def give(self, data_of: Mapping[int, ClientData], pool: Sequence[Held]) -> None:
        """Give client actors the data of the clients that they hold."""

        def submit(held: Held) -> "ObjectRef[None]":
            data = ray.put([data_of[client] for client in held.clients])
            matrices = cast(Any, self._matrices.values())
            given: ObjectRef[None] = held.actor.add_clients.remote(data, self.shape, list(self._matrices), *matrices)
            return given

        list(self.each_actor("taking its data", submit, pool))

    def introduce(self) -> None:
        """Make all clients known to the server, and the actors to each other's sums."""
        server = self.server
        if server is not None:
            list(self.each_actor("hello", lambda held: server.register.remote(held.actor.hello.remote())))
            self.shape = self.await_server(server.sum_shape.remote(), "counting the clients")

    def named(self, name: str) -> Held:
        """Return the client actor of that name."""
        return next(held for held in self.pool if held.name == name)

    def restart(self, held: Held) -> None:
        """Start a new actor in place of a client actor, without its clients.

        Raises:
            NoRoomError: if it does not start in time.
        """
        end(held.actor)
        held.actor = self._new_client_actor(held.name)
        held.settle(self._await_start(held.actor.start.remote(), held.name, held.actor))

    def restart_server(self) -> None:
        """Start a new server actor; it knows no client yet.

        Raises:
            NoRoomError: if it does not start in time.
        """
        assert self.server is not None, "there is one to replace"
        end(self.server)
        self.server = self._new_server()
        self.server_node, self.server_pid = self._await_start(self.server.start.remote(), self.server_name, self.server)

    def dissolve(self, held: Held) -> set[str]:
        """Give up a client actor: others take its batches. Returns their names; they have yet to be given the data."""
        end(held.actor)
        self.pool.remove(held)
        if not self.pool:
            raise RunError(
                f"{name_clients(held.clients)}: the cluster has no room for an actor in place of {held.name}; add "
                f"nodes, or continue where there is room with `fedsim resume RUN`"
            )
        targets = set()
        for batch in held.batches:
            target = min(self.pool, key=lambda other: len(other.clients))
            target.batches = (*target.batches, batch)
            targets.add(target.name)
        logger.warning("%s is given up; its clients go to %s", held.name, ", ".join(sorted(targets)))
        return targets

    def client_data(self, experiment: Experiment) -> dict[int, ClientData]:
        """Return each client's data without what all of them share, which the object store has."""
        return {data.client: without_matrices(data, self._matrices) for data in experiment.clients}

    def close(self) -> None:
        """End the actors."""
        for actor in [held.actor for held in self.pool] + ([self.server] if self.server is not None else []):
            end(actor)
        self.pool, self.server = [], None
        if self.metrics is not None:
            self.metrics.close()

    def _take_share(self, experiment: Experiment) -> Share:
        """Decide where the actors go."""
        strategy, sizes = make_strategy(self.config), client_sizes(experiment)
        work = {
            batch: sum(predicted_work(self.config, sizes[client]) for client in batch)
            for batch in plan_batches(self.config, sizes)
        }
        in_memory = sizes.values() if self.config.runtime.scratch is None else []
        modules = num_module_numbers(experiment)
        kept = sum(state_bytes(self.config, size, len(strategy.views), modules) for size in in_memory)
        return take_share(self.config.runtime, work, with_server=strategy.federated, state_bytes=kept)

    def _base_name(self, graph_name: str) -> str:
        config = self.config
        return Path(config.output).name if config.output else f"{graph_name}-{config.federation.strategy}"

    def _hand_out(self, experiment: Experiment) -> None:
        """Put what clients share into the object store, and give each its own data."""
        shared = shared_matrices(experiment.clients)
        self._matrices = {name: ray.put(matrix) for name, matrix in shared.items()}
        self.clients = [data.client for data in experiment.clients]
        owned = {data.client: torch.from_numpy(data.entity_ids) for data in experiment.clients}
        self.shared = ray.put(shared_entities(owned))
        return_freed_memory()  # what the search took, before the actors take more
        self.give(self.client_data(experiment), self.pool)
        self.introduce()

    def _new_client_actor(self, name: str) -> Any:
        folder = self.config.runtime.scratch
        scratch = None if folder is None else str(Path(folder).absolute())  # an actor may have another working folder
        return self._new(name, lambda made: made(ClientActor).remote(name, self.config, scratch, self._restarts(name)))

    def _new_server(self) -> Any:
        name, data = self.server_name, self._server_data
        return self._new(name, lambda made: made(ServerActor).remote(name, self.config, *data, self._restarts(name)))

    def _new(self, name: str, make: Callable[[Callable[[Any], Any]], H]) -> H:
        """Start an actor; if it takes the place of one that died, as soon as its name is free."""
        deadline = time.monotonic() + NAME_SECONDS
        self._num_started[name] += 1
        while True:
            try:
                return make(lambda kind: kind.options(name=name, **self._options[name]))
            except ValueError as err:
                if time.monotonic() > deadline:
                    raise RunError(f"actor {name} cannot be started: {err}") from err
                time.sleep(0.05)

    def _restarts(self, name: str) -> int:
        return self._num_started[name] - 1

    def _await_start(self, ref: "ObjectRef[T]", name: str, actor: Any) -> T:
        """Wait for an actor that takes the place of one that died."""
        limit, began = min(self.config.faults.restart_seconds, self.timeout), time.monotonic()
        ready, _ = ray.wait([ref], timeout=limit, fetch_local=False)
        self.starting_seconds += time.monotonic() - began
        if not ready:
            end(actor)
            raise NoRoomError(f"actor {name} has not started in {limit:g} seconds (faults.restart_seconds)")
        return result_of(Call(f"actor {name}", name, "not known yet", STARTING, lambda: ref), self.timeout)

    def _tell_failed(self, actor: str) -> None:
        """Tell Ray's metrics how many clients the actor of a failed call holds."""
        if self.metrics is not None:
            self.metrics.failed(sum(len(held.clients) for held in self.pool if held.name == actor))


def end(actor: Any) -> None:
    """Kill an actor, which may be dead already."""
    try:
        ray.kill(cast("ActorHandle[Any]", actor))
    except (RayError, ValueError):
        logger.debug("an actor was gone before it was ended", exc_info=True)
