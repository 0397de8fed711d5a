"""The federation on Ray behind the `Runtime` protocol of `fedsim`.

The driver moves references: updates and broadcasts go from actor to actor through Ray's object store. It sees
reports, metrics and what the evaluation instruments sampled.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle, ActorProxy
from torch import Tensor

from actors.calls import Call, collect, name_clients, result_of
from actors.client import ClientActor
from actors.cluster import connect
from actors.metrics import RunMetrics, WatchedTimeline
from actors.placement import Batch, rebalance
from actors.pool import PARTS, Held
from actors.reservation import free_name, take_share
from actors.scaling import await_nodes
from actors.server import ServerActor, _ServerActor
from actors.state_files import keep_clients, keep_server, marked
from actors.summing import train_and_sum, train_masked
from fedsim.checkpoint import load_clients, load_tensors, server_file
from fedsim.config import Config
from fedsim.data.clients import ClientData, shared_matrices, without_matrices
from fedsim.evaluation.consistency import merge_sums, semantic_consistency, shared_entities
from fedsim.federated.batches import plan_batches, predicted_work, state_bytes
from fedsim.federated.messages import Broadcast, ClientUpdate
from fedsim.federated.reports import ClientEvaluation, ClientReport
from fedsim.federated.robust import placement_lines, sends_singly
from fedsim.federated.runtime import (
    Experiment,
    Measurements,
    RoundResult,
    Runtime,
    client_sizes,
    make_strategy,
    num_shared,
    phase_seconds,
    sampled,
)
from fedsim.federated.timeline import Timeline
from fedsim.models.parameters import Params
from fedsim.process import pin_threads

logger = logging.getLogger(__name__)

T = TypeVar("T")

BALANCE_ROUNDS = 5  # between two looks at how evenly the actors are busy


def ray_runtime(experiment: Experiment) -> Runtime:
    """Make the runtime on Ray; joins or starts the cluster that the config names if no Ray is connected yet.

    Raises:
        RunError: if the cluster cannot be reached or is too small, or an actor does not start.
    """
    started_here = not ray.is_initialized()
    if started_here:
        runtime_config = experiment.config.runtime
        connect(runtime_config.address, dashboard=runtime_config.dashboard)
        await_nodes(runtime_config)
    runtime = RayRuntime(experiment.config, shut_down=started_here)
    try:
        runtime.start(experiment)
    except BaseException:  # Ctrl-C too must leave no process behind
        runtime.close()
        raise
    return runtime


class RayRuntime:
    """Clients and server in actors.

    Args:
        config: the experiment.
        shut_down: leave the cluster on `close`, which ends one that was started for this run.
    """

    def __init__(self, config: Config, *, shut_down: bool) -> None:
        self.config = config
        self.shut_down = shut_down
        self.timeout = self.config.runtime.timeout_seconds
        self.placement: list[str] = []
        self.timeline: Timeline = WatchedTimeline(self._tell_failed)
        self.metrics: RunMetrics | None = None
        self.pool: list[Held] = []
        self.server: ActorProxy[_ServerActor] | None = None
        self.server_name, self.server_node, self.server_pid = "", "not known yet", 0
        self.clients: list[int] = []
        self.shared: ObjectRef[Tensor] | None = None  # ids of entities that several clients have
        self.matrices: list[ObjectRef[Any]] = []  # of features, read in place by the actors of a node
        self.measured: dict[int, float] = {}  # client -> seconds of its last training
        self.rounds_since_balance = 0
        self.at_once: dict[str, int] = {}  # actor -> clients that its GPU's memory was said to hold
        self.sums_at_nodes = False  # whether actors send partial sums, or each client's update

    def start(self, experiment: Experiment) -> None:
        """Place the actors, hand each client its data, and introduce the clients to the server; keep no data here."""
        pin_threads(self.config.runtime.torch_threads)  # the instruments' sums run here
        strategy = make_strategy(self.config)
        sizes = client_sizes(experiment)
        work = {
            batch: sum(predicted_work(self.config, sizes[client]) for client in batch)
            for batch in plan_batches(self.config, sizes)
        }
        folder = self.config.runtime.scratch
        scratch = None if folder is None else str(Path(folder).absolute())  # an actor may have another working folder
        in_memory = sizes.values() if scratch is None else []
        kept = sum(state_bytes(self.config, size, len(strategy.views)) for size in in_memory)
        share = take_share(self.config.runtime, work, with_server=strategy.federated, state_bytes=kept)
        plan = share.plan
        run = self._run_name(experiment.graph_name)
        per_client = len(sizes) < self.config.watching.per_client_below
        self.metrics = RunMetrics(run, self.config.federation.num_rounds, per_client=per_client)
        # An actor that dies has lost what its clients kept: it is not restarted, the run stops and says so.
        fixed = {"num_cpus": plan.num_cpus, "max_restarts": 0, "max_task_retries": 0}
        if strategy.federated:
            self.server_name = f"{run}/server"
            self.server = ServerActor.options(
                name=self.server_name, scheduling_strategy=share.of_server(), **fixed
            ).remote(self.server_name, self.config, num_shared(experiment), experiment.feature_dims)
        for number, group in enumerate(plan.groups):
            name = f"{run}/client-{group[0][0]:05d}" if plan.kind == "dedicated" else f"{run}/pool-{number}"
            where = share.of_client_actor(number)
            options = {"name": name, "num_gpus": plan.num_gpus, "scheduling_strategy": where, **fixed}
            self.pool.append(Held(ClientActor.options(**options).remote(name, self.config, scratch), name, group))
        self._await_actors()
        num_nodes = len({held.node_id for held in self.pool})
        self.sums_at_nodes = not sends_singly(self.config) and (plan.kind == "pooled" or num_nodes > 1)
        machines = "on this machine" if self.config.runtime.address is None else f"on {num_nodes} node(s)"
        threads = f"{self.config.runtime.torch_threads} torch thread(s) each"
        largest = max(held.private_bytes for held in self.pool) / 1e6
        lines = [*plan.lines, *placement_lines(self.config)]
        self.placement = [*lines, f"actors {run}/... {machines}, {threads}, {largest:.0f} MB before their clients"]
        self._hand_out(experiment)

    def train(self, round_num: int, cohort: Sequence[int]) -> RoundResult:
        """Train the cohort; what the clients send goes to the server, one by one or as sums."""
        started = time.perf_counter()
        self._balance()
        broadcast = self._begin_round(self.server, round_num) if self.server is not None else None
        if self.server is not None and self.config.secure_aggregation.enabled:
            reports = train_masked(self, self.server, round_num, cohort, broadcast)
        elif self.server is not None and self.sums_at_nodes:
            reports = train_and_sum(self, self.server, round_num, cohort, broadcast)
        else:
            reports = self._train_and_send(round_num, cohort, broadcast)
        reports.sort(key=lambda report: report.client)
        self.measured |= {report.client: report.seconds for report in reports}
        self.rounds_since_balance += 1
        elapsed = time.perf_counter() - started
        if self.server is None:
            return RoundResult(reports, None, {"train": elapsed})
        report_of_server = self.await_server(self.server.finish_round.remote(), f"distilling in round {round_num}")
        return RoundResult(reports, report_of_server, phase_seconds(elapsed, report_of_server))

    def evaluate(self, split: str, round_num: int, *, choose: bool) -> list[ClientEvaluation]:
        """Rank every client's triples of a split."""
        what = f"evaluation on {split} in round {round_num}"
        calls = self.each_batch(what, lambda held, batch: held.actor.evaluate.remote(batch, split, round_num, choose))
        parts = {client: part for call, done in calls for client, part in zip(call.clients, done, strict=True)}
        return [item for client in self.clients for item in parts[client]]

    def measure(self, round_num: int) -> Measurements:
        """Measure imputation where the data is, and semantic consistency on sums of tokens from the actors."""
        what, shared = f"measurement in round {round_num}", cast(Any, self.shared)
        calls = self.each_batch(what, lambda held, batch: held.actor.measure.remote(batch, shared, round_num))
        found = {client: metrics for call, done in calls for client, metrics in zip(call.clients, done, strict=True)}
        sums = [part for _, part in self.each_actor(what, lambda held: held.actor.sum_tokens.remote())]
        return Measurements({client: found[client] for client in self.clients}, semantic_consistency(merge_sums(sums)))

    def record(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Tell Ray's metrics of a finished round."""
        if self.metrics is not None:
            self.metrics.record(rows)

    def save(self, folder: Path) -> None:
        """Let each actor write its own files; what one cannot write where it is comes here."""
        started = time.perf_counter()
        with marked(folder) as mark:
            if self.server is not None:
                keep_server(self.await_server(self.server.save.remote(mark), "saving"), folder)
            for _, states in self.each_batch("saving", lambda held, batch: held.actor.save.remote(batch, mark)):
                keep_clients(states, folder)
        if self.metrics is not None:
            self.metrics.phase("checkpoint", time.perf_counter() - started)

    def load(self, folder: Path) -> None:
        """Let each actor read its own files, or what this process reads for it."""
        with marked(folder) as mark:
            if self.server is not None and not self.await_server(self.server.load.remote(mark), "loading"):
                self.await_server(self.server.take.remote(load_tensors(server_file(folder))), "loading")
            calls = self.each_batch("loading", lambda held, batch: held.actor.load.remote(batch, mark))
            absent = [client for call, found in calls if not found for client in call.clients]
        read = partial(load_clients, folder=folder)
        list(self.each_batch("loading", lambda held, batch: held.actor.take.remote(read(batch)), absent))

    def close(self) -> None:
        """End the actors, and the cluster if it was started for this run."""
        for actor in [held.actor for held in self.pool] + ([self.server] if self.server is not None else []):
            ray.kill(cast("ActorHandle[Any]", actor))
        self.pool, self.server = [], None
        if self.metrics is not None:
            self.metrics.close()
        if self.shut_down:
            ray.shutdown()

    def _run_name(self, graph_name: str) -> str:
        config = self.config
        base = Path(config.output).name if config.output else f"{graph_name}-{config.federation.strategy}"
        return free_name(f"fedsim/{base}")

    def _train_and_send(
        self, round_num: int, cohort: Sequence[int], broadcast: "ObjectRef[Broadcast] | None"
    ) -> list[ClientReport]:
        """Train the cohort; each update goes from its client's actor to the server as it comes."""
        adding = f"adding updates in round {round_num}"
        updates: dict[int, ObjectRef[list[ClientUpdate]]] = {}

        def submit(held: Held, batch: Batch) -> "ObjectRef[tuple[list[ClientReport], int]]":
            # num_returns=2: two references
            pair: Any = held.actor.train.remote(batch, round_num, cast(Any, broadcast))
            updates[batch[0]], reports = pair
            return cast("ObjectRef[tuple[list[ClientReport], int]]", reports)

        reports = []
        receiving: ObjectRef[None] | None = None
        for call, (done, at_once) in self.each_batch(f"training in round {round_num}", submit, cohort):
            reports += done
            self.say_parts(call, at_once)
            update = updates.pop(call.clients[0])
            if self.server is not None:
                if receiving is not None:
                    self.await_server(receiving, adding)  # so at most two wait there
                receiving = self.server.receive.remote(update)
        if receiving is not None:
            self.await_server(receiving, adding)
        return reports

    def _balance(self) -> None:
        """Move batches from actors that took long to others, by the seconds of the last rounds."""
        if self.rounds_since_balance < BALANCE_ROUNDS or len(self.measured) < len(self.clients):
            return  # with few measurements, noise would move them
        self.rounds_since_balance = 0
        seconds = {
            batch: sum(self.measured[client] for client in batch) for held in self.pool for batch in held.batches
        }
        for move in rebalance([held.batches for held in self.pool], seconds):
            self._move(move.batch, self.pool[move.source], self.pool[move.target])
            logger.info(
                "%s moved from %s to %s, %.3g s of a round",
                name_clients(move.batch),
                self.pool[move.source].name,
                self.pool[move.target].name,
                seconds[move.batch],
            )

    def _move(self, batch: Batch, source: Held, target: Held) -> None:
        """Let another actor hold a batch; its data and state go there from actor to actor."""
        what = f"moving to actor {target.name}"
        moved: list[ObjectRef[list[tuple[ClientData, Params]]]] = []

        def release(held: Held) -> "ObjectRef[int]":
            pair: Any = held.actor.release.remote(batch)
            clients, number = pair
            moved.append(clients)
            return cast("ObjectRef[int]", number)

        list(self.each_actor(what, release, [source]))
        list(self.each_actor(what, lambda held: held.actor.adopt.remote(moved[0]), [target]))
        source.batches = tuple(other for other in source.batches if other != batch)
        target.batches = (*target.batches, batch)

    def say_parts(self, call: Call[Any], at_once: int) -> None:
        """Say once per actor and size that a GPU's memory holds fewer clients at once than a batch has."""
        if at_once < min(len(call.clients), self.at_once.get(call.actor, len(call.clients))):
            self.at_once[call.actor] = at_once
            logger.warning(PARTS, call.actor, call.what, len(call.clients), at_once)

    def _await_actors(self) -> None:
        """Wait until all actors run, and learn their nodes."""
        what = "starting (waiting for free CPUs, GPUs and a process)"
        places = {call.actor: place for call, place in self.each_actor(what, lambda held: held.actor.start.remote())}
        for held in self.pool:
            held.node, held.node_id, held.pid, held.private_bytes = places[held.name]
        if self.server is not None:
            self.server_node, self.server_pid = self.await_server(self.server.start.remote(), what)

    def _hand_out(self, experiment: Experiment) -> None:
        """Give each client its data, make it known to the server, and send it the initial global model."""
        shared = shared_matrices(experiment.clients)
        matrices = self.matrices = [ray.put(matrix) for matrix in shared.values()]
        data_of = {data.client: without_matrices(data, shared) for data in experiment.clients}
        self.clients = list(data_of)
        owned = {client: torch.from_numpy(data.entity_ids) for client, data in data_of.items()}
        self.shared = ray.put(shared_entities(owned))

        def give(held: Held) -> "ObjectRef[None]":
            data = ray.put([data_of[client] for client in held.clients])
            given: ObjectRef[None] = held.actor.add_clients.remote(data, list(shared), *cast(Any, matrices))
            return given

        list(self.each_actor("start", give))
        server = self.server
        if server is not None:
            list(self.each_actor("hello", lambda held: server.register.remote(held.actor.hello.remote())))
            self.deliver(0)

    def deliver(self, round_num: int) -> None:
        """Give every client the server's model."""
        if self.server is not None:
            shape = self.await_server(self.server.sum_shape.remote(), "counting the clients")
            broadcast = self._begin_round(self.server, round_num)
            list(self.each_actor("taking the model", lambda held: held.actor.join.remote(broadcast, shape)))

    def _begin_round(self, server: "ActorProxy[_ServerActor]", round_num: int) -> "ObjectRef[Broadcast]":
        """Let the server publish its broadcast; the driver gets a reference."""
        return self.await_server(server.begin_round.remote(round_num), f"opening round {round_num}")[0]

    def each_batch(
        self, what: str, submit: "Callable[[Held, Batch], ObjectRef[T]]", cohort: Sequence[int] | None = None
    ) -> Iterator[tuple[Call[T], T]]:
        """Make a call for every batch (its members in the cohort), results in order of completion."""
        queues = [
            [
                Call(name_clients(batch), held.name, held.node, what, partial(submit, held, batch), batch)
                for batch in (held.batches if cohort is None else sampled(held.batches, cohort))
            ]
            for held in self.pool
        ]
        results = collect(queues, self.timeout, self.timeline)
        return results if self.metrics is None else self.metrics.queues(queues, results)

    def each_actor(
        self, what: str, submit: "Callable[[Held], ObjectRef[T]]", pool: Sequence[Held] | None = None
    ) -> Iterator[tuple[Call[T], T]]:
        """Make a call to every client actor (of those given), results in order of completion."""
        calls = [
            Call(name_clients(held.clients), held.name, held.node, what, partial(submit, held))
            for held in (self.pool if pool is None else pool)
        ]
        return collect([[call] for call in calls], self.timeout, self.timeline)

    def await_server(self, ref: "ObjectRef[T]", what: str) -> T:
        """Wait for the result of a call to the server."""
        call = Call("the server", self.server_name, self.server_node, what, lambda: ref)
        return result_of(call, self.timeout, self.timeline)

    def _tell_failed(self, actor: str) -> None:
        """Tell Ray's metrics how many clients the actor of a failed call holds."""
        if self.metrics is not None:
            self.metrics.failed(sum(len(held.clients) for held in self.pool if held.name == actor))
