"""The federation on Ray behind the `Runtime` protocol of `fedsim`.

The driver moves references: updates and broadcasts go from actor to actor through Ray's object store. It sees
reports, metrics and what the evaluation instruments sampled.
"""

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
from ray import ObjectRef
from ray.actor import ActorProxy

from actors.calls import name_clients
from actors.cluster import connect
from actors.crew import Crew, end
from actors.placement import Batch, rebalance
from actors.pool import Held
from actors.recovery import Recovery
from actors.scaling import await_nodes
from actors.server import _ServerActor
from actors.state_files import keep_clients, keep_server, marked
from actors.summing import train_and_sum, train_masked
from fedsim.checkpoint import load_clients, load_tensors, server_file
from fedsim.config import Config
from fedsim.errors import LostActorError
from fedsim.evaluation.consistency import merge_sums, semantic_consistency
from fedsim.federated.messages import Broadcast, ClientUpdate
from fedsim.federated.reports import ClientEvaluation, ClientReport
from fedsim.federated.runtime import Experiment, Measurements, RoundResult, Runtime, phase_seconds, sampled
from fedsim.process import pin_threads, return_freed_memory, share_one_heap

logger = logging.getLogger(__name__)

BALANCE_ROUNDS = 5  # between two looks at how evenly the actors are busy


def ray_runtime(experiment: Experiment) -> Runtime:
    """Make the runtime on Ray; joins or starts the cluster that the config names if no Ray is connected yet.

    Raises:
        RunError: if the cluster cannot be reached or is too small, or an actor does not start.
    """
    started_here = not ray.is_initialized()
    if started_here:
        share_one_heap()
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
        self.config, self.shut_down = config, shut_down
        self.crew = Crew(config)
        self.recovery = Recovery(self.crew, self._load, lambda: self.deliver(0))
        self.timeline = self.crew.timeline
        self.placement: list[str] = []
        self.measured: dict[int, deque[float]] = {}  # client -> seconds of its last trainings
        self.rounds_since_balance = 0

    @property
    def pool(self) -> list[Held]:
        """Return the client actors."""
        return self.crew.pool

    @property
    def server(self) -> "ActorProxy[_ServerActor] | None":
        """Return the server actor, if the clients are federated."""
        return self.crew.server

    def start(self, experiment: Experiment) -> None:
        """Start the actors, and send each client the first model; keep no data here."""
        pin_threads(self.config.runtime.torch_threads)  # the instruments' sums run here
        self.crew.start(experiment)
        self.placement = self.crew.placement
        self.recovery.begin(None, 0)
        self.deliver(0)
        self.crew.guard = self.recovery.mend

    def train(self, round_num: int, cohort: Sequence[int]) -> RoundResult:
        """Train the cohort; what the clients send goes to the server, one by one or as sums."""
        started = time.perf_counter()
        deadline = time.monotonic() + (self.config.faults.round_deadline_seconds or math.inf)
        self._balance()
        recovery, server = self.recovery, self.server
        recovery.begin_round(round_num)
        broadcast = self._begin_round(server, round_num) if server is not None else None
        if server is not None and self.config.secure_aggregation.enabled:
            recovery.forget()  # an actor that is gone has taken its clients' keys of the round with it
            reports = train_masked(self.crew, server, round_num, cohort, broadcast, deadline)
        elif server is not None and self.crew.sums_at_nodes:
            reports = train_and_sum(self.crew, server, round_num, cohort, broadcast, deadline, recovery)
        else:
            reports = self._train_and_send(round_num, cohort, broadcast, deadline)
        reports.sort(key=lambda report: report.client)
        for report in reports:
            self.measured.setdefault(report.client, deque(maxlen=BALANCE_ROUNDS)).append(report.seconds)
        self.rounds_since_balance += 1
        elapsed = time.perf_counter() - started
        failures = tuple(sorted(recovery.failures, key=lambda failure: failure.client))
        if server is None:
            return RoundResult(reports, None, {"train": elapsed}, failures)
        report_of_server = self.crew.await_server(server.finish_round.remote(), f"distilling in round {round_num}")
        return RoundResult(reports, report_of_server, phase_seconds(elapsed, report_of_server), failures)

    def deliver(self, round_num: int) -> None:
        """Give every client the server's model."""
        if self.server is None:
            return
        broadcast, shape = self._begin_round(self.server, round_num), self.crew.shape
        assert shape is not None, "the clients are known"
        list(self.crew.each_actor("taking the model", lambda held: held.actor.join.remote(broadcast, shape)))
        self.recovery.note(lambda held: [held.actor.join.remote(broadcast, shape)])

    def evaluate(self, split: str, round_num: int, *, choose: bool) -> list[ClientEvaluation]:
        """Rank every client's triples of a split."""
        what = f"evaluation on {split} in round {round_num}"

        def submit(held: Held, batch: Batch) -> "ObjectRef[list[list[ClientEvaluation]]]":
            return held.actor.evaluate.remote(batch, split, round_num, choose)

        calls = self.crew.each_batch(what, submit)
        parts = {client: part for call, done in calls for client, part in zip(call.clients, done, strict=True)}
        if choose:
            self.recovery.note(lambda held: [submit(held, batch) for batch in held.batches])
        return [item for client in self.crew.clients for item in parts[client]]

    def measure(self, round_num: int) -> Measurements:
        """Measure imputation where the data is, and semantic consistency on sums of tokens from the actors."""
        what, shared = f"measurement in round {round_num}", cast(Any, self.crew.shared)

        def submit(held: Held, batch: Batch) -> "ObjectRef[list[dict[str, float]]]":
            return held.actor.measure.remote(batch, shared, round_num)

        calls = self.crew.each_batch(what, submit)
        found = {client: metrics for call, done in calls for client, metrics in zip(call.clients, done, strict=True)}
        with self.recovery.noted(lambda held: [submit(held, batch) for batch in held.batches]):
            sums = [part for _, part in self.crew.each_actor(what, lambda held: held.actor.sum_tokens.remote())]
        imputation = {client: found[client] for client in self.crew.clients}
        return Measurements(imputation, semantic_consistency(merge_sums(sums)))

    def record(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Tell Ray's metrics of a finished round, and hand back the memory that its reports came in."""
        if self.crew.metrics is not None:
            self.crew.metrics.record(rows)
        return_freed_memory()

    def save(self, folder: Path) -> None:
        """Let each actor write its own files; what one cannot write where it is comes here."""
        started = time.perf_counter()
        with marked(folder) as mark:
            if self.server is not None:
                keep_server(self.crew.await_server(self.server.save.remote(mark), "saving"), folder)
            for _, states in self.crew.each_batch("saving", lambda held, batch: held.actor.save.remote(batch, mark)):
                keep_clients(states, folder)
        if self.crew.metrics is not None:
            self.crew.metrics.phase("checkpoint", time.perf_counter() - started)

    def kept(self, folder: Path, round_num: int) -> None:
        """Repeat lost work from this checkpoint on; what came before it is not needed any more."""
        self.recovery.begin(folder, round_num)

    def load(self, folder: Path) -> None:
        """Let each actor read its own files, or what this process reads for it."""
        self.recovery.forget()
        self._load(folder, None)
        self.recovery.begin(folder, None)

    def recover(self, error: LostActorError, folder: Path | None, round_num: int) -> None:
        """Replace what is gone, and bring everything to a checkpoint, or to the start."""
        self.recovery.roll_back(error, folder, round_num)

    def close(self) -> None:
        """End the actors, and the cluster if it was started for this run."""
        self.crew.close()
        if self.shut_down:
            ray.shutdown()

    def _load(self, folder: Path, pool: Sequence[Held] | None) -> None:
        """Let client actors read their files; if none are given all of them, and the server."""
        crew, server = self.crew, self.server if pool is None else None
        with marked(folder) as mark:
            if server is not None and not crew.await_server(server.load.remote(mark), "loading"):
                crew.await_server(server.take.remote(load_tensors(server_file(folder))), "loading")
            calls = crew.each_batch("loading", lambda held, batch: held.actor.load.remote(batch, mark), pool=pool)
            absent = [client for call, found in calls if not found for client in call.clients]
        read = partial(load_clients, folder=folder)
        list(crew.each_batch("loading", lambda held, batch: held.actor.take.remote(read(batch)), absent, pool=pool))

    def _begin_round(self, server: "ActorProxy[_ServerActor]", round_num: int) -> "ObjectRef[Broadcast]":
        """Let the server publish its broadcast; the driver gets a reference."""
        return self.crew.await_server(server.begin_round.remote(round_num), f"opening round {round_num}")[0]

    def _train_and_send(
        self, round_num: int, cohort: Sequence[int], broadcast: "ObjectRef[Broadcast] | None", deadline: float
    ) -> list[ClientReport]:
        """Train the cohort; each update goes from its client's actor to the server as it comes."""
        crew, adding = self.crew, f"adding updates in round {round_num}"
        updates: dict[int, ObjectRef[list[ClientUpdate]]] = {}
        trained: set[int] = set()

        def submit(held: Held, batch: Batch) -> "ObjectRef[tuple[list[ClientReport], int]]":
            # num_returns=2: two references
            update, reports = cast(Any, held.actor.train.remote(batch, round_num, cast(Any, broadcast)))
            if trained.isdisjoint(batch):  # else its update is on its way: an actor that took the place of another
                updates[batch[0]] = update
            return cast("ObjectRef[tuple[list[ClientReport], int]]", reports)

        reports = []
        receiving: ObjectRef[None] | None = None
        what = f"training in round {round_num}"
        for call, (done, at_once) in crew.each_batch(what, submit, cohort, optional=True, deadline=deadline):
            reports += done
            trained.update(call.clients)
            crew.say_parts(call, at_once)
            update = updates.pop(call.clients[0])
            if self.server is not None:
                if receiving is not None:
                    crew.await_server(receiving, adding)  # so at most two wait there
                receiving = self.server.receive.remote(update)
        if receiving is not None:
            crew.await_server(receiving, adding)
        self.recovery.note(lambda held: [submit(held, batch) for batch in sampled(held.batches, trained)])
        return reports

    def _balance(self) -> None:
        """Move batches from actors that take long to others; one slow round moves nothing."""
        if self.rounds_since_balance < BALANCE_ROUNDS or len(self.measured) < len(self.crew.clients):
            return  # with few measurements, noise would move them
        self.rounds_since_balance = 0
        usual = {client: statistics.median(seconds) for client, seconds in self.measured.items()}
        seconds = {batch: sum(usual[client] for client in batch) for held in self.pool for batch in held.batches}
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
        moved: list[ObjectRef[Any]] = []  # data and states

        def release(held: Held) -> "ObjectRef[int]":
            refs: Any = held.actor.release.remote(batch)
            data, states, number = refs
            moved[:] = data, states
            return cast("ObjectRef[int]", number)

        try:
            with self.recovery.off():
                list(self.crew.each_actor(what, release, [source]))
                list(self.crew.each_actor(what, lambda held: held.actor.adopt.remote(*moved), [target]))
        except LostActorError:
            for held in (source, target):  # nobody knows who of them holds the batch now
                end(held.actor)
            raise
        source.batches = tuple(other for other in source.batches if other != batch)
        target.batches = (*target.batches, batch)
