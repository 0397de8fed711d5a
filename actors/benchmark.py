"""Runs of a benchmark as Ray tasks: one CPU each, as many at a time as the cluster has room for."""

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ray
from ray import ObjectRef
from ray.exceptions import RayError

from actors.cluster import connect
from fedsim.benchmark.execution import Outcome, Outcomes, run_cell
from fedsim.benchmark.plan import Cell
from fedsim.errors import RunError

_NOTICE_SECONDS = 600.0  # without an outcome, until the log says for whom it waits

logger = logging.getLogger(__name__)


class _Run(NamedTuple):
    """A task that is under way; by the monotonic clock."""

    cell: Cell
    started: float
    deadline: float


@ray.remote(max_retries=0)
def _run_cell(cell: Cell, keep_models: bool) -> Outcome:
    return run_cell(cell, keep_models)


def run_on_ray(
    cells: Sequence[Cell],
    *,
    keep_models: bool,
    gpus_per_run: float = 0.0,
    hours_per_run: float = 24.0,
    address: str | None = None,
) -> Outcomes:
    """Run cells as tasks and yield their outcomes as they come; the benchmark's folder must be on shared storage.

    A run whose worker dies is an outcome with a message, like one that fails. Closing the iterator ends the tasks.

    Args:
        cells: what to run.
        keep_models: keep the checkpoints and models of finished runs.
        gpus_per_run: share of a GPU that a run reserves.
        hours_per_run: a run that takes longer, its wait for a free CPU included, is ended and an outcome with a
            message.
        address: cluster to join, if no Ray is connected yet; None starts one on this machine.

    Raises:
        RunError: if the cluster cannot be reached, or has no room for a run.
    """
    started_here = not ray.is_initialized()
    if started_here:
        connect(address, dashboard=cells[0].config.runtime.dashboard)
    running: dict[ObjectRef[Outcome], _Run] = {}
    try:
        num_slots = _num_slots(cells, gpus_per_run)
        waiting = deque(cells)
        while waiting or running:
            while waiting and len(running) < num_slots:
                cell = waiting.popleft()
                num_cpus = cell.config.runtime.torch_threads
                task = _run_cell.options(num_cpus=num_cpus, num_gpus=gpus_per_run, name=f"fedsim/{cell.name}")
                now = time.monotonic()
                running[task.remote(cell, keep_models)] = _Run(cell, now, now + hours_per_run * 3600)
            for ref in _await(running):
                yield _outcome(ref, running.pop(ref).cell)
            for ref in [ref for ref, run in running.items() if run.deadline <= time.monotonic()]:
                ray.cancel(ref, force=True)
                message = f"not done after {hours_per_run:g} hours; raise --hours-per-run to let it go on"
                yield Outcome(running.pop(ref).cell.folder, error=message)
    finally:
        for ref in running:
            ray.cancel(ref, force=True)
        if started_here:
            ray.shutdown()


def _num_slots(cells: Sequence[Cell], gpus_per_run: float) -> int:
    """Count the runs that the cluster has room for, and one more per node that is there when one ends."""
    num_cpus = max((cell.config.runtime.torch_threads for cell in cells), default=1)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = [int(node.get("CPU", 0.0) / num_cpus) for node in nodes]
    if gpus_per_run > 0:  # a little more than the quotient: 1 / 0.1 is no whole number in binary
        on_gpu = [int(node.get("GPU", 0.0) / gpus_per_run + 1e-9) for node in nodes]
        room = [min(slots) for slots in zip(room, on_gpu, strict=True)]
    if not sum(room):
        need = f"{num_cpus} CPUs" + (f" and {gpus_per_run:g} GPUs" if gpus_per_run > 0 else "")
        raise RunError(f"no node of the Ray cluster has {need} for a run; lower --gpus-per-run or the torch threads")
    return sum(room) + len(nodes)


def _await(running: Mapping["ObjectRef[Outcome]", _Run]) -> "list[ObjectRef[Outcome]]":
    """Wait until a run has ended, or the first one's time is over; says now and then for whom it waits."""
    deadline = min(run.deadline for run in running.values())
    while True:
        seconds = min(max(deadline - time.monotonic(), 0.0), _NOTICE_SECONDS)
        ready, _ = ray.wait(list(running), num_returns=1, timeout=seconds)
        now = time.monotonic()
        if ready or now >= deadline:
            return ready
        names = (f"{run.cell.name} for {(now - run.started) / 60:.0f} min" for run in running.values())
        logger.info("waiting for runs: %s", ", ".join(names))


def _outcome(ref: "ObjectRef[Outcome]", cell: Cell) -> Outcome:
    try:
        return ray.get(ref)
    except RayError as err:  # run_cell turns all else into an outcome: this is the worker's own end
        return Outcome(cell.folder, error=f"its Ray task ended: {' '.join(str(err).split())}")
