"""Runs a command and watches it: when its rounds end, and the memory of all its processes together.

How memory is counted, and why it does not depend on what else the machine runs, is said in `process_memory`.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import click
from process_memory import GONE, measure

ROUND_LINE = re.compile(r"^round\s+(\d+)/\d+\b")  # as `fedsim run` and the peers' scripts write it

# Compiled modules are kept, as Python does by default: without them every process of a run compiles torch and Ray anew.
PYTHON = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": ""}


@dataclass(frozen=True)
class Memory:
    """Memory of a process tree at one moment.

    Attributes:
        total_bytes: of all processes, each page once.
        parts: kind of process -> its part of the total.
        pss_bytes: the sum of the proportional set sizes, which is less if strangers have the same libraries open.
        own_bytes: of the total, what is not pages of files.
        own_parts: kind of process -> of its part, what is not pages of files.
        num_processes: how many there are.
    """

    total_bytes: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)
    pss_bytes: int = 0
    own_bytes: int = 0
    own_parts: Mapping[str, int] = field(default_factory=dict)
    num_processes: int = 0


@dataclass(frozen=True)
class Watched:
    """What was seen of a command.

    Attributes:
        round_ends: seconds from the command to the end of each round.
        cpu_ends: processor seconds that all processes together had taken by then.
        peak: memory at its highest sample; None if it was not measured.
    """

    round_ends: list[float]
    cpu_ends: list[float]
    peak: Memory | None

    @property
    def round_seconds(self) -> list[float]:
        """Seconds of each round but the first, whose start is not seen."""
        return [end - start for start, end in pairwise(self.round_ends)]

    @property
    def round_cpu_seconds(self) -> list[float]:
        """Processor seconds of each round but the first: they depend less on what else the machine does."""
        return [end - start for start, end in pairwise(self.cpu_ends)]


def fedsim_run(config: Path, output: Path) -> list[str]:
    """Write the command of a run that ends without a report, which is not what is measured."""
    command = str(Path(sys.executable).with_name("fedsim"))
    return [command, "run", str(config), "--output", str(output), "--report.html", "false"]


class ProcessTree:
    """A process and all that it started, also those whose parent has ended since."""

    def __init__(self, root: int) -> None:
        self.pids = {root}

    def refresh(self) -> list[int]:
        """Look for new children, forget those that ended; returns process ids."""
        parents = {pid: fields.parent for pid, fields in _processes().items()}
        before = -1
        while len(self.pids) != before:
            before = len(self.pids)
            self.pids |= {pid for pid, parent in parents.items() if parent in self.pids}
        self.pids &= parents.keys()
        return sorted(self.pids)

    def memory(self, *, files: bool = True) -> Memory:
        """Sum up the memory of all processes, with pages of files or without."""
        held = measure(self.refresh(), files=files)
        parts: Counter[str] = Counter()
        own: Counter[str] = Counter()
        for pid, part in held.items():
            kind = _kind(pid)
            parts[kind] += part.own_bytes + part.file_bytes
            own[kind] += part.own_bytes
        pss = sum(part.pss_bytes for part in held.values())
        return Memory(parts.total(), parts, pss, own.total(), own, len(held))

    def cpu_seconds(self) -> float:
        """Sum the processor time of all processes, and of their children that have ended."""
        self.refresh()
        return sum(fields.cpu_seconds for pid, fields in _processes().items() if pid in self.pids)

    def num_open_files(self) -> int:
        """Count the open file handles of all processes."""
        return sum(_count(f"/proc/{pid}/fd") for pid in self.refresh())

    def end(self) -> None:
        """Kill what is left."""
        for pid in self.refresh():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


class MemoryWatch:
    """Samples the memory of a process tree in a thread and keeps the highest sample."""

    def __init__(self, tree: ProcessTree, interval_seconds: float = 0.5) -> None:
        self.tree, self.interval_seconds = tree, interval_seconds
        self.peak = Memory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self.interval_seconds):
            self.peak = max(self.peak, self.tree.memory(), key=lambda memory: memory.total_bytes)


def watch(
    command: Sequence[str], environment: Mapping[str, str], *, memory: bool = False, timeout_seconds: float = 900.0
) -> Watched:
    """Run a command to its end.

    Args:
        command: program and arguments; it prints a line ``round 3/5`` at the end of each round.
        environment: variables to set, beside those of this process.
        memory: sample memory (which costs the command some time: measure speed without).
        timeout_seconds: after which it is ended.

    Raises:
        click.ClickException: if it fails or takes too long, with the last lines that it wrote.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        env={**os.environ, **PYTHON, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    tree = ProcessTree(process.pid)
    sampler = MemoryWatch(tree)
    late = threading.Timer(timeout_seconds, tree.end)
    late.start()
    ends: list[float] = []
    cpu_ends: list[float] = []
    last: deque[str] = deque(maxlen=25)
    try:
        if memory:
            sampler.__enter__()
        assert process.stdout is not None, "stdout is a pipe"
        for line in process.stdout:
            if ROUND_LINE.match(line):
                ends.append(time.perf_counter() - started)
                cpu_ends.append(tree.cpu_seconds())
            last.append(line.rstrip())
        code = process.wait()
    finally:
        late.cancel()
        if memory:
            sampler.__exit__()
        tree.end()
        process.wait()
    if code != 0 or not ends:
        after = f"after {time.perf_counter() - started:.0f} s: exit code {code}, {len(ends)} rounds"
        raise click.ClickException(f"{' '.join(command[:4])} ... failed {after}; its last lines:\n" + "\n".join(last))
    return Watched(ends, cpu_ends, sampler.peak if memory else None)


class _Fields(NamedTuple):
    """What /proc/<pid>/stat says of a process."""

    parent: int
    cpu_seconds: float


def _processes() -> dict[int, _Fields]:
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                text = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8", errors="replace")
            except GONE:
                continue
            fields = text.rpartition(")")[2].split()  # the name before it may hold spaces
            found[int(entry)] = _Fields(int(fields[1]), sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK"))
    return found


def _kind(pid: int) -> str:
    """Say what a process is: an actor by its class, one of Ray's own by its program, or Python."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " ").split()
    except GONE:
        return "ended"
    if not words:
        return "ended"
    if words[0].startswith("ray::"):
        return words[0].partition(".")[0]
    for name in ("gcs_server", "raylet", "dashboard", "log_monitor", "runtime_env", "default_worker"):
        if any(name in word for word in words[:3]):
            return name
    return Path(words[0]).name


def _count(folder: str) -> int:
    try:
        return len(os.listdir(folder))
    except GONE:
        return 0
