"""Memory of all processes of a run together: hundreds of pooled clients.

    FEDSIM_DATA=data python benchmarks/memory.py --output runs/memory.md
    python benchmarks/memory.py --job no-op                  # needs no data set

Memory is that of the command and all that it started, Ray's own processes and object store included, sampled twice a
second from the command to its end; the table shows the highest sample. Each page counts once, whatever else the machine
runs (`process_memory` says how); beside it stands the sum of the proportional set sizes (PSS) of the same sample, which
is less while other programs have the same libraries open.

Measure in the environment that `make run` installs. Tools beside it can cost every process memory: Ray's processes load
`rfc3987-syntax`, 17 MB each, where it is installed (`.[audit]` brings it, and so does JupyterLab).
"""

import secrets
import shlex
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from job_data import make_data
from process_tree import fedsim_run, watch
from tables import Sheet, megabytes

import fedsim
from fedsim.config import dump_config

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
POOLED: dict[str, Any] = {
    "runtime.kind": "ray",
    "runtime.placement": "pooled",
    "runtime.num_actors": 2,
    "checkpoint.keep": 1,
}
FB15K: dict[str, Any] = POOLED | {"data.path": "FB15k-237", "data.split": "dirichlet", "data.num_clients": 300}
MMFED3: dict[str, Any] = FB15K | {"data.modalities": ["text"], "training.local_epochs": 1}
LEAN: dict[str, Any] = {"runtime.dashboard": False}
LEANEST: dict[str, Any] = LEAN | {"runtime.num_actors": 1}


@dataclass(frozen=True)
class MemoryJob:
    """A run and the memory it may take.

    Attributes:
        title: of the job.
        settings: beside those of the data.
        limit_bytes: for all processes together.
        num_clients: with 300 triples each, that do not train; None for the data that the settings name.
        shelved: whether clients that are not at work keep their state in a file.
        node: options of `ray start` for a node that is started beforehand; None lets the run start its own.
    """

    title: str
    settings: Mapping[str, Any]
    limit_bytes: float
    num_clients: int | None = None
    shelved: bool = False
    node: Sequence[str] | None = None


JOBS = {
    "fede": MemoryJob(
        "300 clients of FB15k-237, FedE on structure",
        # As FedE does, Adam starts anew each round: its two means of each row are not kept between rounds.
        FB15K
        | {"federation.strategy": "fede", "model.fusion": "none", "data.modalities": []}
        | {"training.reset_optimizer": "always"},
        3e9,
    ),
    "mmfed3": MemoryJob("300 clients of FB15k-237 with texts, MMFeD3-HidE", MMFED3, 3e9),
    "mmfed3-lean": MemoryJob("the same, state on a shelf, no dashboard", MMFED3 | LEAN, 3e9, shelved=True),
    "mmfed3-leanest": MemoryJob("the same, in one client actor", MMFED3 | LEANEST, 3e9, shelved=True),
    "no-op": MemoryJob("1000 no-op clients of 300 triples", {}, 1.2e9, 1000),
    "no-op-lean": MemoryJob("the same, state on a shelf, no dashboard", LEAN, 1.2e9, 1000, shelved=True),
    "no-op-leanest": MemoryJob(
        "the same, in one client actor, on a node without Ray's log monitor and autoscaler",
        LEANEST,
        1.2e9,
        1000,
        shelved=True,
        node=("--include-dashboard=false", "--include-log-monitor=false", "--no-monitor"),
    ),
}


def run_job(job: MemoryJob, num_rounds: int, sheet: Sheet) -> tuple[list[str], list[tuple[str, int]], bool]:
    """Run a job; returns its row, its processes by kind, and whether it stays within its limit."""
    with tempfile.TemporaryDirectory(prefix="fedsim-memory-") as name:
        settings = dict(job.settings)
        if job.num_clients is not None:
            data = make_data(Path(name) / "job", job.num_clients, 300)
            settings = {**data.settings(), "training.local_epochs": 0, **settings}
        if job.shelved:
            settings["runtime.scratch"] = name
        config = fedsim.load_config(overrides=settings | {"federation.num_rounds": num_rounds})
        file = Path(name) / "config.yaml"
        file.write_text(dump_config(config), encoding="utf-8")
        sheet.progress(f"{job.title} ...")
        command, environment = fedsim_run(file, Path(name) / "run"), ENVIRONMENT
        if job.node is not None:
            command, environment = on_own_node(command, job.node), ENVIRONMENT | with_token()
        seen = watch(command, environment, memory=True, timeout_seconds=3600)
    assert seen.peak is not None, "memory was sampled"
    peak = seen.peak.total_bytes
    row = [job.title, megabytes(peak), megabytes(job.limit_bytes), megabytes(seen.peak.pss_bytes)]
    row.append(str(seen.peak.num_processes))
    parts = sorted(seen.peak.parts.items(), key=lambda part: -part[1])
    return [*row, f"{seen.round_ends[-1]:.0f}"], parts, peak <= job.limit_bytes


def on_own_node(command: Sequence[str], options: Sequence[str]) -> list[str]:
    """Let a node of Ray be started with options before a run joins it; both belong to the command."""
    port = free_port()
    ray_command = Path(sys.executable).with_name("ray")
    start = [str(ray_command), "start", "--head", "--disable-usage-stats", f"--port={port}", *options]
    join = [*command, "--runtime.address", f"127.0.0.1:{port}"]
    return ["sh", "-c", f"{shlex.join(start)} && exec {shlex.join(join)}"]


def with_token() -> dict[str, str]:
    """Return the environment of a cluster and of those who join it: nobody else has the token."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex()}


def free_port() -> int:
    """Return a port that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@click.command()
@click.option("--job", "names", multiple=True, type=click.Choice(list(JOBS)), help="these alone [default: all]")
@click.option("--rounds", default=2, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="write the tables as markdown")
def main(names: tuple[str, ...], rounds: int, output: Path | None) -> None:
    """Measure the peak of each job."""
    sheet = Sheet("Memory of hundreds of clients", output)
    rows, kinds, verdicts = [], [], []
    for job in [JOBS[name] for name in names or JOBS]:
        try:
            row, parts, met = run_job(job, rounds, sheet)
        except fedsim.FedSimError as err:
            raise click.ClickException(f"{job.title}: {err}") from err
        rows.append(row)
        verdicts.append((job.title, f"<= {megabytes(job.limit_bytes)} MB", f"{row[1]} MB", met))
        kinds += [(job.title, kind, megabytes(size)) for kind, size in parts if size > 5e6]
    sheet.table(
        "Peak of all processes together", ("job", "peak MB", "limit MB", "its PSS MB", "processes", "seconds"), rows
    )
    sheet.table("Where it is at the peak", ("job", "process", "MB"), kinds)
    sheet.verdicts(verdicts)
    sheet.close()


if __name__ == "__main__":
    main()
