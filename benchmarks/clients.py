"""What a round of many small clients costs: fedsim, Flower's simulation, hand-written Ray, a plain loop.

    python benchmarks/clients.py --output runs/clients.md
    python benchmarks/clients.py --quick                     # 10 and 50 clients, one repetition

The job: TransE, 2000 entities x 128 (a model of 1 MB), 300 triples per client, one local epoch of 3 steps with 32
negatives, Adam, all clients in every round, federated averaging, 2 workers of 1 thread. The peers share their
arithmetic (`transe_job.py`); fedsim runs by its command line. All are run one after the other, again and again, so
that a busy machine is busy for all, and once before, unmeasured, so that files are read and Python's modules compiled.
CPU s are processor seconds of all processes together, of the cheapest round and until the first round ends: they tell
more than seconds do on a busy machine. The seconds of a round are those between its line of output and the one before:
the first round shows in the time from the command to its end.

Two kinds of rows: Flower, and Ray and the loop in their plain form, train and send the whole table of each client, as
one does who has a model and an averaging strategy. fedsim, as FedE, gives a client the rows of its own entities (about
520 of 2000). So the loop and hand-written Ray are shown with own rows too, and a last table compares clients that
own every row, where all do the same work.

Flower pins another Ray, so it lives in a virtual environment of its own, which is made on demand (pip must find the
CPU build of torch, or it fetches gigabytes: see PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS).
"""

import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
from job_data import JobData, make_data
from process_tree import Memory, fedsim_run, watch
from tables import Sheet, megabytes
from transe_job import Job

import fedsim
from fedsim.config import dump_config

HERE = Path(__file__).parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
FLOWER = "flwr[simulation]>=1.41"
TRIPLES, ALL_ROWS = 300, 1000  # per client; with 1000 it owns all entities


@dataclass(frozen=True)
class Contestant:
    """A program and its kind of job."""

    name: str
    program: str  # fedsim, flower, ray or loop
    own_rows: bool = False
    no_op: bool = False
    num_triples: int = TRIPLES


@dataclass
class Found:
    """What was measured of a contestant at one number of clients."""

    round_seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    first_cpu_seconds: list[float] = field(default_factory=list)
    peak: Memory | None = None
    failure: str | None = None


TRAIN = (
    Contestant("fedsim", "fedsim", own_rows=True),
    Contestant("plain loop", "loop"),
    Contestant("plain loop, own rows", "loop", own_rows=True),
    Contestant("hand-written Ray", "ray"),
    Contestant("hand-written Ray, own rows", "ray", own_rows=True),
    Contestant("Flower", "flower"),
)
NO_OP = (
    Contestant("fedsim no-op", "fedsim", own_rows=True, no_op=True),
    Contestant("fedsim no-op, all rows", "fedsim", no_op=True, num_triples=ALL_ROWS),
    Contestant("hand-written Ray no-op", "ray", no_op=True),
    Contestant("hand-written Ray no-op, own rows", "ray", own_rows=True, no_op=True),
    Contestant("Flower no-op", "flower", no_op=True),
)
SAME_WORK = (
    Contestant("fedsim, all rows", "fedsim", num_triples=ALL_ROWS),
    Contestant("plain loop, all rows", "loop", num_triples=ALL_ROWS),
    Contestant("hand-written Ray, all rows", "ray", num_triples=ALL_ROWS),
)
Results = dict[tuple[Contestant, int], Found]


def ensure_flower(folder: Path, sheet: Sheet) -> str | None:
    """Make Flower's virtual environment unless it is there; returns why there is none, or None."""
    python = folder / "bin" / "python"
    try:
        if not python.exists():
            sheet.progress(f"installing {FLOWER} into {folder}")
            venv.create(folder, with_pip=True)
            same = [f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "numpy")]
            subprocess.run([python, "-m", "pip", "install", "--quiet", *same, FLOWER], check=True)
        code = "import importlib.metadata as m; print(*[f'{n} {m.version(n)}' for n in ('flwr', 'ray', 'torch')])"
        found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as err:
        return f"its virtual environment {folder} could not be made or read: {err}"
    sheet.say(f"Flower's environment: {found}; ours: ray {importlib.metadata.version('ray')}.")
    return None


def command(contestant: Contestant, data: JobData, num_rounds: int, flower: Path, folder: Path) -> list[str]:
    """Write the command that runs a contestant."""
    epochs = 0 if contestant.no_op else 1
    if contestant.program == "fedsim":
        # One round more: the last one also validates and writes a checkpoint, and is left out.
        changes = {"training.local_epochs": epochs, "federation.num_rounds": num_rounds + 1}
        config = fedsim.load_config(overrides={**data.settings(), **changes})
        file = folder / "config.yaml"
        file.write_text(dump_config(config), encoding="utf-8")
        return fedsim_run(file, folder / "run")
    job = Job(str(data.array), num_rounds=num_rounds, num_epochs=epochs, own_rows=contestant.own_rows)
    programs = {
        "loop": [sys.executable, str(HERE / "transe_job.py")],
        "ray": [sys.executable, str(HERE / "ray_job.py")],
        "flower": [str(flower / "bin" / "python"), str(HERE / "flower_job.py")],
    }
    return [*programs[contestant.program], json.dumps(asdict(job))]


def measure(
    contestants: Sequence[Contestant],
    num_clients: int,
    repetitions: int,
    num_rounds: int,
    flower: Path,
    sheet: Sheet,
) -> Results:
    """Run all contestants one after the other, several times, and once more to sample their memory."""
    found: Results = {(contestant, num_clients): Found() for contestant in contestants}
    with tempfile.TemporaryDirectory(prefix="fedsim-clients-") as name:
        sizes = {contestant.num_triples for contestant in contestants}
        data = {size: make_data(Path(name) / str(size), num_clients, size) for size in sizes}
        for repetition in range(repetitions + 1):
            sampling = repetition == repetitions
            for contestant in contestants:
                entry = found[contestant, num_clients]
                if entry.failure is not None:
                    continue
                try:
                    with tempfile.TemporaryDirectory(dir=name) as folder:
                        rounds = 2 if sampling else num_rounds
                        words = command(contestant, data[contestant.num_triples], rounds, flower, Path(folder))
                        seen = watch(words, ENVIRONMENT, memory=sampling)
                except (click.ClickException, fedsim.FedSimError) as err:
                    entry.failure = str(getattr(err, "message", err))
                    sheet.say(f"{contestant.name} with {num_clients} clients FAILED: {entry.failure}")
                    continue
                if sampling:
                    entry.peak = seen.peak
                    continue
                last = -1 if contestant.program == "fedsim" else None
                seconds = seen.round_seconds[:last]
                entry.round_seconds += seconds
                entry.cpu_seconds += seen.round_cpu_seconds[:last]
                entry.first_cpu_seconds.append(seen.cpu_ends[0])
                entry.first_seconds.append(seen.round_ends[0])
                sheet.progress(
                    f"{num_clients} clients, {contestant.name}: {', '.join(f'{value:.2f}' for value in seconds)} s, "
                    f"first round after {seen.round_ends[0]:.1f} s ({seen.cpu_ends[0]:.1f} CPU s)"
                )
    return found


def show(title: str, table: Results, sheet: Sheet) -> None:
    """Print seconds per round, per client, until the first round ends, and memory."""
    columns = ("job", "clients", "s/round min", "median", "CPU s", "ms/client", "first round, s", "CPU s", "peak MB")
    rows = []
    for (contestant, num_clients), found in table.items():
        if found.failure is not None or not found.round_seconds:
            rows.append([contestant.name, str(num_clients), *["-"] * 7])
            continue
        seconds, cpu = found.round_seconds, min(found.cpu_seconds)
        times = [f"{min(seconds):.3f}", f"{statistics.median(seconds):.3f}", f"{cpu:.2f}"]
        times += [f"{1e3 * min(seconds) / num_clients:.2f}"]
        first = [f"{min(found.first_seconds):.1f}", f"{min(found.first_cpu_seconds):.1f}"]
        memory = megabytes(found.peak.total_bytes) if found.peak else "-"
        rows.append([contestant.name, str(num_clients), *times, *first, memory])
    sheet.table(title, columns, rows)


def judge(table: Results, sheet: Sheet) -> None:
    """Hold what was measured to the targets; ratios are of the fastest rounds of the same run."""
    best = {
        (contestant.name, num_clients): min(found.round_seconds)
        for (contestant, num_clients), found in table.items()
        if found.round_seconds
    }
    first = {key[1]: found.first_seconds for key, found in table.items() if key[0].name == "fedsim"}
    rows = []

    def ratio(name: str, of: tuple[str, int], to: tuple[str, int], limit: float) -> None:
        if of in best and to in best:
            value = best[of] / best[to]
            rows.append((name, f"<= {limit:g}", f"{value:.2f}", value <= limit))

    sizes = sorted({num_clients for _, num_clients in table})
    for size in sizes:
        ratio(f"{size} clients: fedsim / plain loop", ("fedsim", size), ("plain loop", size), 0.6)
        ratio(f"{size} clients: fedsim / plain loop, own rows", ("fedsim", size), ("plain loop, own rows", size), 0.6)
        ratio(f"{size} clients: fedsim / Flower", ("fedsim", size), ("Flower", size), 0.25)
        ratio(f"{size} clients: fedsim / hand-written Ray", ("fedsim", size), ("hand-written Ray", size), 1.0)
    for name in ("fedsim no-op", "fedsim no-op, all rows"):
        for size in sizes:
            if (name, size) in best:
                value = 1e3 * best[name, size] / size
                rows.append((f"{name}: ms per client at {size}", "<= 2", f"{value:.2f}", value <= 2))
        if (name, 100) in best and (name, 1000) in best:
            value = best[name, 1000] / best[name, 100] / 10
            rows.append((f"{name}: per client, 1000 / 100", "<= 1.2", f"{value:.2f}", value <= 1.2))
    for size, seconds in first.items():
        if seconds:
            met = statistics.median(seconds) <= 15
            rows.append((f"{size} clients: first round ends, s", "<= 15", f"{statistics.median(seconds):.1f}", met))
    sheet.verdicts(rows)


@click.command()
@click.option("--clients", "sizes", multiple=True, type=int, help="numbers of clients [default: 10 50 100 300 1000]")
@click.option("--rounds", default=5, show_default=True, help="rounds per run; the first is not a time per round")
@click.option("--repetitions", default=2, show_default=True, help="runs of each, interleaved")
@click.option("--program", "programs", multiple=True, type=click.Choice(["fedsim", "loop", "ray", "flower"]))
@click.option("--flower-venv", default="runs/flower-venv", show_default=True, type=click.Path(path_type=Path))
@click.option("--quick", is_flag=True, help="10 and 50 clients, one repetition of 3 rounds")
@click.option("--output", type=click.Path(path_type=Path), help="write the tables as markdown")
def main(
    sizes: tuple[int, ...],
    rounds: int,
    repetitions: int,
    programs: tuple[str, ...],
    flower_venv: Path,
    quick: bool,
    output: Path | None,
) -> None:
    """Measure all contestants at several numbers of clients."""
    if quick:
        sizes, rounds, repetitions = sizes or (10, 50), 3, 1
    sheet = Sheet("Many small clients", output)
    chosen = set(programs) or {"fedsim", "loop", "ray", "flower"}
    if "flower" in chosen:
        reason = ensure_flower(flower_venv.absolute(), sheet)
        if reason is not None:
            sheet.say(f"Flower is left out: {reason}")
            chosen.remove("flower")
    sheet.progress("once each, unmeasured")
    first = [next(job for job in TRAIN if job.program == program) for program in sorted(chosen)]
    measure(first, 10, 0, 1, flower_venv, sheet)
    table: Results = {}
    for size in sizes or (10, 50, 100, 300, 1000):
        jobs = [job for job in (*TRAIN, *NO_OP) if job.program in chosen and (job.no_op or size < 1000)]
        table |= measure(jobs, size, repetitions, min(rounds, 3) if size >= 1000 else rounds, flower_venv, sheet)
    show("2000 entities x 128, 300 triples per client", table, sheet)
    same = [job for job in SAME_WORK if job.program in chosen]
    size = 100 if not quick else 10
    if same:
        show("The same work for all", measure(same, size, repetitions, rounds, flower_venv, sheet), sheet)
    judge(table, sheet)
    sheet.close()


if __name__ == "__main__":
    main()
