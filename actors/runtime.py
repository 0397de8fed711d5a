"""The federation on Ray behind the `Runtime` protocol of `fedsim`.

The driver moves references: updates and broadcasts go from actor to actor through Ray's object store. It sees
reports, metrics and what the evaluation instruments sampled.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle, ActorProxy

from actors.calls import Call, collect, result_of
from actors.client import ClientActor, _ClientActor
from actors.cluster import connect, settled_resources
from actors.placement import plan_placement
from actors.server import ServerActor, _ServerActor
from fedsim.evaluation.consistency import semantic_consistency, shared_entities
from fedsim.federated.client import ClientEvaluation, ClientReport
from fedsim.federated.messages import Broadcast, ClientUpdate
from fedsim.federated.runtime import (
    Experiment,
    Measurements,
    RoundResult,
    Runtime,
    make_strategy,
    phase_seconds,
)
from fedsim.process import pin_threads

logger = logging.getLogger(__name__)

T = TypeVar("T")

_run_numbers = itertools.count(1)  # a name is free again only some time after its actor ended


@dataclass
class _Held:
    """One client actor: its handle, its name, its clients, and its node once it has started."""

    actor: ActorProxy[_ClientActor]
    name: str
    clients: tuple[int, ...]
    node: str = "not known yet"
    pid: int = 0


def ray_runtime(experiment: Experiment) -> Runtime:
    """Make the runtime on Ray; joins or starts the cluster that the config names if no Ray is connected yet.

    Raises:
        RunError: if the cluster cannot be reached or is too small, or an actor does not start.
    """
    started_here = not ray.is_initialized()
    if started_here:
        connect(experiment.config.runtime.address)
    runtime = RayRuntime(experiment, shut_down=started_here)
    try:
        runtime.start()
    except BaseException:  # Ctrl-C too must leave no process behind
        runtime.close()
        raise
    return runtime


class RayRuntime:
    """Clients and server in actors.

    Args:
        experiment: config and data.
        shut_down: leave the cluster on `close`, which ends one that was started for this run.
    """

    def __init__(self, experiment: Experiment, *, shut_down: bool) -> None:
        self.experiment, self.config = experiment, experiment.config
        self.shut_down = shut_down
        self.timeout = self.config.runtime.timeout_seconds
        self.placement: list[str] = []
        self.pool: list[_Held] = []
        self.server: ActorProxy[_ServerActor] | None = None
        self.server_name, self.server_node, self.server_pid = "", "not known yet", 0

    def start(self) -> None:
        """Place the actors, hand each client its data, and introduce the clients to the server."""
        pin_threads(self.config.runtime.torch_threads)  # the instruments' sums run here
        experiment, federated = self.experiment, make_strategy(self.config).federated
        nodes, free = settled_resources()
        sizes = {data.client: len(data.train) for data in experiment.clients}
        plan = plan_placement(self.config.runtime, sizes, nodes, free, with_server=federated)
        run = self._run_name()
        # An actor that dies has lost what its clients kept: it is not restarted, the run stops and says so.
        fixed = {"num_cpus": plan.num_cpus, "max_restarts": 0, "max_task_retries": 0}
        if federated:
            self.server_name = f"{run}/server"
            self.server = ServerActor.options(name=self.server_name, **fixed).remote(
                self.server_name, self.config, experiment.num_entities, experiment.feature_dims
            )
        for number, group in enumerate(plan.groups):
            name = f"{run}/client-{group[0]:05d}" if plan.kind == "dedicated" else f"{run}/pool-{number}"
            actor = ClientActor.options(name=name, num_gpus=plan.num_gpus, **fixed).remote(name, self.config)
            self.pool.append(_Held(actor, name, group))
        self._await_actors()
        num_nodes = len({held.node for held in self.pool} | ({self.server_node} if self.server else set()))
        where = "on this machine" if self.config.runtime.address is None else f"on {num_nodes} node(s)"
        threads = f"{self.config.runtime.torch_threads} torch thread(s) each"
        self.placement = [*plan.lines, f"actors {run}/... {where}, {threads}"]
        self._hand_out()

    def train(self, round_num: int, cohort: Sequence[int]) -> RoundResult:
        """Train the cohort; each update goes from its client's actor to the server's sums as it comes."""
        started = time.perf_counter()
        what, adding = f"training in round {round_num}", f"adding updates in round {round_num}"
        broadcast = self._begin_round(self.server, round_num) if self.server is not None else None
        updates: dict[str, ObjectRef[ClientUpdate]] = {}

        def submit(held: "_Held", client: int) -> "ObjectRef[ClientReport]":
            pair: Any = held.actor.train.remote(
                client, round_num, cast(Any, broadcast)
            )  # num_returns=2: two references
            updates[f"client {client}"], report = pair
            return cast("ObjectRef[ClientReport]", report)

        reports = []
        receiving: ObjectRef[None] | None = None
        for call, report in self._each_client(what, submit, cohort):
            reports.append(report)
            update = updates.pop(call.who)
            if self.server is not None:
                if receiving is not None:
                    self._await_server(receiving, adding)  # so at most two wait there
                receiving = self.server.receive.remote(update)
        if receiving is not None:
            self._await_server(receiving, adding)
        reports.sort(key=lambda report: report.client)
        elapsed = time.perf_counter() - started
        if self.server is None:
            return RoundResult(reports, None, {"train": elapsed})
        report_of_server = self._await_server(self.server.finish_round.remote(), f"distilling in round {round_num}")
        return RoundResult(reports, report_of_server, phase_seconds(elapsed, report_of_server))

    def evaluate(self, split: str, round_num: int, *, choose: bool) -> list[ClientEvaluation]:
        """Rank every client's triples of a split."""
        what = f"evaluation on {split} in round {round_num}"
        calls = self._each_client(what, lambda held, c: held.actor.evaluate.remote(c, split, round_num, choose))
        parts = {call.who: part for call, part in calls}
        return [item for data in self.experiment.clients for item in parts[f"client {data.client}"]]

    def measure(self, round_num: int) -> Measurements:
        """Measure imputation where the data is, and semantic consistency on tokens sampled from the actors."""
        owned = {data.client: torch.from_numpy(data.entity_ids) for data in self.experiment.clients}
        shared = ray.put(shared_entities(owned))
        what = f"measurement in round {round_num}"
        calls = self._each_client(what, lambda held, c: held.actor.measure.remote(c, shared, round_num))
        parts = {call.who: part for call, part in calls}
        ordered = {client: parts[f"client {client}"] for client in owned}
        consistency = semantic_consistency([sample for _, sample in ordered.values()])
        return Measurements({client: numbers for client, (numbers, _) in ordered.items()}, consistency)

    def save(self, folder: Path) -> None:
        """Let each actor write its own files; on several nodes the folder must be on storage that they share."""
        self._move_state(folder.absolute(), "save")

    def load(self, folder: Path) -> None:
        """Let each actor read its own files."""
        self._move_state(folder.absolute(), "load")

    def close(self) -> None:
        """End the actors, and the cluster if it was started for this run."""
        for actor in [held.actor for held in self.pool] + ([self.server] if self.server is not None else []):
            ray.kill(cast("ActorHandle[Any]", actor))
        self.pool, self.server = [], None
        if self.shut_down:
            ray.shutdown()

    def _run_name(self) -> str:
        config = self.config
        base = (
            Path(config.output).name if config.output else f"{self.experiment.graph_name}-{config.federation.strategy}"
        )
        number = next(_run_numbers)
        return f"fedsim/{base}" if number == 1 else f"fedsim/{base}-{number}"

    def _await_actors(self) -> None:
        """Wait until all actors run, and learn their nodes."""
        what = "starting (waiting for free CPUs, GPUs and a process)"
        calls = [
            [Call(_names(held.clients), held.name, held.node, what, held.actor.start.remote)] for held in self.pool
        ]
        places = {call.actor: place for call, place in collect(calls, self.timeout)}
        for held in self.pool:
            held.node, held.pid = places[held.name]
        if self.server is not None:
            self.server_node, self.server_pid = self._await_server(self.server.start.remote(), what)

    def _hand_out(self) -> None:
        """Give each client its data, make it known to the server, and send it the initial global model."""
        data_of = {data.client: data for data in self.experiment.clients}
        list(self._each_client("start", lambda held, c: held.actor.add_client.remote(ray.put(data_of[c]))))
        server = self.server
        if server is not None:
            list(self._each_client("hello", lambda held, c: server.register.remote(held.actor.hello.remote(c))))
            welcome = self._begin_round(server, 0)
            list(self._each_client("joining", lambda held, c: held.actor.join.remote(c, welcome)))

    def _begin_round(self, server: "ActorProxy[_ServerActor]", round_num: int) -> "ObjectRef[Broadcast]":
        """Let the server publish its broadcast; the driver gets a reference."""
        return self._await_server(server.begin_round.remote(round_num), f"opening round {round_num}")[0]

    def _each_client(
        self, what: str, submit: "Callable[[_Held, int], ObjectRef[T]]", cohort: Sequence[int] | None = None
    ) -> Iterator[tuple[Call[T], T]]:
        """Make a call for every client (of the cohort), results in order of completion."""
        queues = [
            [
                Call(f"client {client}", held.name, held.node, what, partial(submit, held, client))
                for client in held.clients
                if cohort is None or client in cohort
            ]
            for held in self.pool
        ]
        return collect(queues, self.timeout)

    def _await_server(self, ref: "ObjectRef[T]", what: str) -> T:
        call = Call("the server", self.server_name, self.server_node, what, lambda: ref)
        return result_of(call, self.timeout)

    def _move_state(self, folder: Path, verb: Literal["save", "load"]) -> None:
        """Save or load the state of server and clients."""
        what = "saving" if verb == "save" else "loading"
        if self.server is not None:
            self._await_server(getattr(self.server, verb).remote(folder), what)
        list(self._each_client(what, lambda held, c: getattr(held.actor, verb).remote(c, folder)))


def _names(clients: Sequence[int]) -> str:
    """Name clients in a message: ``client 3``, ``clients 0, 2``."""
    return f"client {clients[0]}" if len(clients) == 1 else f"clients {', '.join(map(str, clients))}"
