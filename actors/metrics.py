"""What Prometheus and Ray's dashboard are told of a run, by the driver and by every actor (docs/watching.md).

Ray forgets a gauge about 20 seconds after it was set, and a round may take longer: each process that has something to
tell says it again every few seconds, as long as it lives. So a series ends when its process does.
"""

import math
import os
import threading
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, TypeVar

import torch
from ray.util.metrics import Counter, Gauge, Histogram

from actors.calls import Call
from fedsim.federated.timeline import Timeline

T = TypeVar("T")

REFRESH_SECONDS = 2.0
BOUNDARIES = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]  # seconds
PAGES = Path("/proc/self/statm")  # of this process; a few microseconds, unlike the exact count of its smaps


@dataclass(frozen=True)
class Metric:
    """A metric: its kind, what it means, and its labels beside `run`."""

    kind: Literal["gauge", "counter", "histogram"]
    meaning: str
    labels: tuple[str, ...] = ()


METRICS = {
    "fedsim_round": Metric("gauge", "last finished round"),
    "fedsim_rounds": Metric("gauge", "rounds that the run is to have"),
    "fedsim_loss": Metric("gauge", "training loss of the last round, mean over its clients"),
    "fedsim_valid_mrr": Metric("gauge", "validation MRR (filtered, realistic), weighted by triples"),
    "fedsim_phase_seconds": Metric("gauge", "wall time of each phase of the last round", ("phase",)),
    "fedsim_bytes_up": Metric("counter", "bytes that clients sent"),
    "fedsim_bytes_down": Metric("counter", "bytes that clients were sent"),
    "fedsim_clients_trained": Metric("gauge", "clients that took part in the last round"),
    "fedsim_clients_late": Metric("gauge", "clients of the last round that missed its deadline, virtual or real"),
    "fedsim_clients_failed": Metric("gauge", "clients that the last round went on without, or of an actor that fails"),
    "fedsim_clients_alive": Metric("gauge", "clients that a living actor holds", ("actor",)),
    "fedsim_actor_restarted": Metric("gauge", "times that the actor died and was replaced", ("actor",)),
    "fedsim_queue_length": Metric("gauge", "batches of clients that wait for the actor or are with it", ("actor",)),
    "fedsim_call_seconds": Metric("histogram", "seconds that actors took for a batch of clients", ("phase",)),
    "fedsim_host_memory_bytes": Metric("gauge", "memory of the process that it shares with no other", ("actor",)),
    "fedsim_gpu_memory_bytes": Metric("gauge", "GPU memory that the process has reserved", ("actor",)),
    "fedsim_imputation_cosine": Metric("gauge", "imputed and true features: `<modality>/<imputer>`", ("part",)),
    "fedsim_consistency_cosine": Metric("gauge", "shared entities between clients: `<view>/<modality>`", ("part",)),
    "fedsim_client_loss": Metric("gauge", "training loss of the client's last round", ("client",)),
    "fedsim_client_valid_mrr": Metric("gauge", "validation MRR of the client", ("client",)),
    "fedsim_client_seconds": Metric("gauge", "local training of the client's last round", ("client",)),
}
"""All metrics by name; Ray puts ``ray_`` before a name, and ``_total`` behind that of a counter."""


class Watch:
    """The series of one process.

    Args:
        run: the run's name.
        sample: values of gauges that are asked for again and again, from a thread of its own: name -> value.
        labels: of these gauges, and of this process.
    """

    def __init__(self, run: str, sample: Callable[[], Mapping[str, float]], **labels: str) -> None:
        self._run, self._sample, self._labels = run, sample, labels
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="fedsim-metrics", daemon=True)
        self._thread.start()

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge; it is told again until the watch is closed. What is not a number is not told."""
        if math.isnan(value):
            return
        tags = {"run": self._run, **labels}
        self._values[name, tuple(tags.items())] = value
        _instrument(name).set(value, tags)

    def add(self, name: str, value: float, **labels: str) -> None:
        """Add to a counter."""
        if value > 0:  # Ray refuses an increment of nothing
            _instrument(name).inc(value, {"run": self._run, **labels})

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Observe how long a call takes."""
        started = perf_counter()
        yield
        _instrument("fedsim_call_seconds").observe(perf_counter() - started, {"run": self._run, "phase": phase})

    def close(self) -> None:
        """End the series of this process."""
        self._closed.set()
        self._thread.join()

    def _repeat(self) -> None:
        while True:
            for name, value in self._sample().items():
                self.set(name, value, **self._labels)
            if self._closed.wait(REFRESH_SECONDS):
                return
            for (name, tags), value in self._values.copy().items():
                _instrument(name).set(value, dict(tags))


class RunMetrics:
    """What the driver tells: the rounds, and how its actors are doing.

    Args:
        name: of the run's actors, without their own part: ``fedsim/<run>``.
        num_rounds: that the run is to have.
        per_client: whether there are few enough clients for series of their own.
    """

    def __init__(self, name: str, num_rounds: int, *, per_client: bool) -> None:
        self.per_client = per_client
        self.watch = Watch(run_label(name), process_memory, actor="driver")
        self.watch.set("fedsim_rounds", num_rounds)
        self.watch.set("fedsim_clients_failed", 0)

    def record(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Tell of a finished round; rows as `fedsim.results.metric_rows` makes them."""
        for row in rows:
            if row["client"] is None:
                self._round(row)
            elif self.per_client:
                self._client(row)

    def phase(self, name: str, seconds: float) -> None:
        """Tell how long a phase of the round took."""
        self.watch.set("fedsim_phase_seconds", seconds, phase=name)

    def queues(
        self, queues: Sequence[Sequence[Call[T]]], results: Iterator[tuple[Call[T], T]]
    ) -> Iterator[tuple[Call[T], T]]:
        """Pass on results as they come, and tell how many batches of clients each actor still has before it."""
        left = Counts(call.actor for queue in queues for call in queue)
        for actor, number in left.items():
            self.watch.set("fedsim_queue_length", number, actor=actor_label(actor))
        for call, result in results:
            left[call.actor] -= 1
            self.watch.set("fedsim_queue_length", left[call.actor], actor=actor_label(call.actor))
            yield call, result

    def failed(self, num_clients: int) -> None:
        """Tell that a call to an actor with so many clients failed."""
        self.watch.set("fedsim_clients_failed", num_clients)

    def measured(self, imputation: Mapping[str, Mapping[str, float]], consistency: Mapping[str, float]) -> None:
        """Tell what the instruments saw."""
        for part, metrics in imputation.items():
            self.watch.set("fedsim_imputation_cosine", metrics["cosine"], part=part)
        for part, value in consistency.items():
            self.watch.set("fedsim_consistency_cosine", value, part=part)

    def close(self) -> None:
        """End the driver's series."""
        self.watch.close()

    def _round(self, row: Mapping[str, Any]) -> None:
        watch, taking_part = self.watch, row.get("participation", {})
        watch.set("fedsim_round", row["round"])
        if row["loss"] is not None:
            watch.set("fedsim_loss", row["loss"])
        if "valid" in row:
            watch.set("fedsim_valid_mrr", row["valid"]["mrr"])
        for phase, seconds in row["phase_seconds"].items():
            self.phase(phase, seconds)
        watch.add("fedsim_bytes_up", row["bytes_up"])
        watch.add("fedsim_bytes_down", row["bytes_down"])
        watch.set("fedsim_clients_trained", row["num_trained"])
        failed = row.get("failed", ())
        late = [failure for failure in failed if failure["reason"] == "late"]
        watch.set("fedsim_clients_failed", len(failed))
        watch.set("fedsim_clients_late", len(taking_part.get("late", ())) + len(late))
        self.measured(row.get("imputation", {}), row.get("consistency", {}))

    def _client(self, row: Mapping[str, Any]) -> None:
        client = str(row["client"])
        if "losses" in row:
            self.watch.set("fedsim_client_loss", row["losses"]["total"], client=client)
            self.watch.set("fedsim_client_seconds", row["seconds"], client=client)
        if "valid" in row:
            self.watch.set("fedsim_client_valid_mrr", row["valid"]["mrr"], client=client)


class WatchedTimeline(Timeline):
    """A timeline that also tells someone at once whose work failed.

    Args:
        failed: is given the actor's name.
    """

    def __init__(self, failed: Callable[[str], None]) -> None:
        super().__init__()
        self._failed = failed

    def ended(self, actor: str, what: str, seconds: float, *, failed: bool = False) -> None:
        """Note work that ended just now."""
        super().ended(actor, what, seconds, failed=failed)
        if failed:
            self._failed(actor)


def watch_actor(name: str, num_restarts: int, num_clients: Callable[[], int] | None = None) -> Watch:
    """Tell of the actor that calls this: how often it died before and, of a client actor, how many clients it holds."""

    def sample() -> dict[str, float]:
        clients = {"fedsim_clients_alive": num_clients()} if num_clients is not None else {}
        return {"fedsim_actor_restarted": num_restarts, **clients, **process_memory()}

    return Watch(run_label(name), sample, actor=actor_label(name))


def run_label(name: str) -> str:
    """Take the run out of an actor's or a run's name: ``fedsim/<run>/<actor>``."""
    return name.split("/")[1]


def actor_label(name: str) -> str:
    """Take the actor's own part out of its name."""
    return name.rpartition("/")[2]


def process_memory() -> dict[str, float]:
    """Measure what this process takes of the host's memory, where the system says so, and of the GPU's."""
    # Only a process that has a CUDA context can hold memory there; asking would make one.
    found: dict[str, float] = {
        "fedsim_gpu_memory_bytes": torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0
    }
    if PAGES.is_file():
        resident, shared = (int(word) for word in PAGES.read_text().split()[1:3])
        found["fedsim_host_memory_bytes"] = (resident - shared) * os.sysconf("SC_PAGE_SIZE")
    return found


@cache
def _instrument(name: str) -> Any:
    metric = METRICS[name]
    keys = ("run", *metric.labels)
    if metric.kind == "histogram":
        return Histogram(name, metric.meaning, BOUNDARIES, keys)
    return (Counter if metric.kind == "counter" else Gauge)(name, metric.meaning, keys)
