"""Joining a Ray cluster, or starting one on this machine."""

import logging
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.placement import NodeResources
from fedsim.errors import RunError

PROBE_SECONDS = 60.0  # for a process that imports Ray and joins; Ray itself would try for minutes
PORT_SECONDS = 5.0
MEASURE_SECONDS = 120.0
KEPT_TASKS = 2000
FREED_MILLISECONDS = 100
MEND = (
    "check runtime.address, that the cluster runs (`ray status`) and that this process has its token "
    "(RAY_AUTH_MODE=token with ~/.ray/auth_token or RAY_AUTH_TOKEN), or leave the address null to start one on this "
    "machine"
)
PROBE = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='error')"


def connect(address: str | None, *, dashboard: bool = True) -> None:
    """Join the cluster at an address, or start one on this machine if it is None, with Ray's dashboard or without.

    Token authentication stays as Ray has it, and the dashboard on the loopback address.

    Raises:
        RunError: if the cluster cannot be reached or started, in bounded time.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray announces a later default for processes without a GPU by a warning; this is that default.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray keeps the events of its last 100,000 tasks for the dashboard, which a long run would see as growing memory.
    os.environ.setdefault("RAY_task_events_max_num_task_in_gcs", str(KEPT_TASKS))
    # Of the others it keeps the ids alone, of a million of them unless told otherwise.
    os.environ.setdefault("RAY_task_events_max_dropped_task_attempts_tracked_per_job_in_gcs", str(KEPT_TASKS))
    # Ray frees what nobody holds any more once a second, by when a fast run has made ten rounds of messages.
    os.environ.setdefault("RAY_free_objects_period_milliseconds", str(FREED_MILLISECONDS))
    if address is not None and address != "local":
        _probe(address)
    # An explicit address: without one Ray joins whatever cluster it finds on the machine.
    try:
        if address in (None, "local"):
            included = None if dashboard else False  # None: where its packages are installed
            ray.init("local", include_dashboard=included, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as err:
        ray.shutdown()
        if address not in (None, "local"):
            raise RunError(f"the Ray cluster at {address} cannot be joined: {_line(str(err))}; {MEND}") from err
        # Ray says by a bare Exception that its node was not up in time, half a minute.
        mend = "; the machine may be too busy: try again when less is running on it" if type(err) is Exception else ""
        raise RunError(f"Ray does not start on this machine: {_line(str(err))}{mend}") from err


def _probe(address: str) -> None:
    """Try an address in another process: Ray's own attempts take minutes and cannot be cut short."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        try:
            socket.create_connection((host, int(port)), timeout=PORT_SECONDS).close()
        except (OSError, ValueError, OverflowError) as err:
            raise RunError(f"the Ray cluster at {address} cannot be reached: {_line(str(err))}; {MEND}") from err
    command = [sys.executable, "-c", PROBE, address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired as err:
        text = f"no answer in {PROBE_SECONDS:g} seconds"
        raise RunError(f"the Ray cluster at {address} cannot be reached: {text}; {MEND}") from err
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RunError(
            f"the Ray cluster at {address} cannot be joined: {_line(lines[-1] if lines else 'no message')}; {MEND}"
        )


def cluster_resources() -> tuple[list[NodeResources], NodeResources]:
    """Return what each node of the cluster has, and what all of them together have free."""
    nodes = [_resources(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    return nodes, _resources(ray.available_resources())


def with_measured_memory(nodes: list[NodeResources]) -> list[NodeResources]:
    """Put the memory that is free now in place of what Ray counts, node by node, where it can be measured."""
    ids = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    here = ray.get_runtime_context().get_node_id()
    measure = ray.remote(num_cpus=0)(available_memory)
    found = {
        node_id: available_memory()
        if node_id == here
        else measure.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote()
        for node_id in ids
    }
    try:
        measured = [
            ray.get(value, timeout=MEASURE_SECONDS) if isinstance(value, ray.ObjectRef) else value
            for value in found.values()
        ]
    except RayError as err:
        raise RunError(f"a node of the Ray cluster does not answer: {_line(str(err))}; {MEND}") from err
    return [
        node if free is None else replace(node, memory_bytes=min(node.memory_bytes, free))
        for node, free in zip(nodes, measured, strict=True)
    ]


def available_memory() -> float | None:
    """Measure the memory that new processes of this machine, or of its container, can take; None if it does not say."""
    free: list[float] = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free.append(float(lines["MemAvailable"].split()[0]) * 1024)
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free.append(float(limit.read_text()) - float(used.read_text()))
    return min(free, default=None)


def private_memory() -> float:
    """Measure the memory of this process that it shares with no other; 0 if the system does not say."""
    found = Path("/proc/self/smaps_rollup")
    if not found.is_file():
        return 0.0
    lines = [line.split() for line in found.read_text().splitlines()]
    return 1024.0 * sum(float(words[1]) for words in lines if words[0] in ("Private_Clean:", "Private_Dirty:"))


def settled_resources(num_seconds: float = 10.0) -> tuple[list[NodeResources], NodeResources]:
    """As `cluster_resources`, but give actors that are ending some time to return their CPUs."""
    deadline = time.monotonic() + num_seconds
    while True:
        nodes, free = cluster_resources()
        if free.cpus >= sum(node.cpus for node in nodes) - 1e-6 or time.monotonic() > deadline:
            return nodes, free
        time.sleep(0.1)


def _resources(found: dict[str, float]) -> NodeResources:
    return NodeResources(found.get("CPU", 0.0), found.get("GPU", 0.0), found.get("memory", 0.0))


def _line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
