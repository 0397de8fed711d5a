"""Commands in processes of their own, and the processes that those start (from /proc)."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def fedsim(*args: str, cwd: Path) -> Iterator["subprocess.Popen[str]"]:
    """Run a `fedsim` command as the leader of a process group, as a shell does; nothing is left of it afterwards."""
    command = [sys.executable, "-u", "-m", "fedsim.cli", *args]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=hear_interrupts,
    )
    with process:
        try:
            yield process
        finally:
            left = descendants(process.pid)
            if process.poll() is None:
                process.kill()
            end(left)


def end(pids: Iterable[int]) -> None:
    """Kill those of the processes that still run."""
    for pid in pids:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def hear_interrupts() -> None:
    """Let a child hear Ctrl-C: tests that run as a shell's background job inherit that it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(condition: Callable[[], bool], seconds: float = 280) -> bool:
    """Poll a condition; returns whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def descendants(pid: int) -> set[int]:
    """Return the processes that a process started, and those that they started."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            found.add(child)
            waiting.append(child)
    return found


def titles(pids: Iterable[int]) -> dict[int, str]:
    """Return the command lines of processes that run; Ray's say what they do."""
    return {pid: (Path("/proc") / str(pid) / "cmdline").read_text().split("\0")[0] for pid in pids if alive(pid)}


def alive(pid: int) -> bool:
    """Return whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
