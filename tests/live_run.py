"""A run in another process that goes on while tests look at it."""

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from builders import write_tiny_dataset
from processes import descendants, end, wait_until
from runs import small_options

SESSION = re.compile(r"(/[^\s\0,]*/session_[0-9_-]+)")


@dataclass(frozen=True)
class LiveRun:
    """A run in another process, on a Ray cluster of its own.

    Attributes:
        folder: the run's folder.
        targets: Ray's file for Prometheus: where the metrics of each node are.
        address: of the metrics of the one node.
    """

    folder: Path
    targets: Path
    address: str

    def scrape(self) -> str:
        """Return what the node shows at the moment."""
        with urllib.request.urlopen(f"http://{self.address}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
        return text

    def scrape_until(self, condition: Callable[[str], bool], seconds: float = 60) -> str:
        """Scrape until the text is as wanted; returns the last one."""
        deadline = time.monotonic() + seconds
        while not condition(text := self.scrape()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return text


@contextmanager
def live_run(folder: Path) -> Iterator[LiveRun]:
    """Start a run of three clients in one actor that lasts longer than the tests, with Ray's dashboard and tokens."""
    options = small_options(write_tiny_dataset(folder / "tiny"), folder / "watched", 100_000)
    options += ["--runtime.placement=pooled", "--runtime.num_actors=1", "--evaluation.measure_every=1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_metrics_report_interval_ms": "2000", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", "-m", "fedsim.cli", "run", *options]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        metrics = folder / "watched" / "metrics.jsonl"
        started = wait_until(lambda: process.poll() is not None or (metrics.is_file() and metrics.stat().st_size > 0))
        assert started, (folder / "output.txt").read_text()
        assert process.poll() is None, (folder / "output.txt").read_text()
        targets = _session(process.pid) / "prom_metrics_service_discovery.json"
        assert wait_until(targets.is_file, 60), "the dashboard writes it"
        assert wait_until(lambda: _node(targets) is not None, 60), "the node shows its metrics"
        yield LiveRun(folder / "watched", targets, str(_node(targets)))
    finally:
        left = descendants(process.pid)
        process.kill()
        process.wait()
        end(left)


def _session(pid: int) -> Path:
    """Find the folder of the Ray session that a process started."""
    for child in descendants(pid):
        found = SESSION.search((Path("/proc") / str(child) / "cmdline").read_text())
        if found:
            return Path(found[1])
    raise AssertionError("no process of a Ray session")


def _node(targets: Path) -> str | None:
    """Find the address behind which the metrics of actors are, beside those of Ray's own services."""
    for address in re.findall(r'"([0-9.]+:\d+)"', targets.read_text()):
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            if "ray_object_store_memory" in answer.read().decode():
                return str(address)
    return None
