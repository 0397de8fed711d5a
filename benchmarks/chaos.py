"""Does anything get lost? Runs whose actors, server, nodes or driver are killed, against one that nobody disturbs.

    python benchmarks/chaos.py --schedules 100 --output runs/chaos.md

Each schedule is drawn from its number: one to three kills, each of a client actor, the server, a node of a cluster of
three, or the driver (SIGKILL, then `resume`), at a random phase of a random round. Its run must end with the numbers
and the model files of the undisturbed run, to the bit. Schedules whose outcome is in the log beside the output are not
run again. Recovery is the time from a kill to the line that says who was replaced.
"""

import json
import logging
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from job_data import make_data
from process_tree import PYTHON, ProcessTree
from tables import Sheet

VICTIMS = ("client", "client", "server", "node", "driver")
PHASES = ("before the broadcast", "in mid-collection", "after the aggregation", "during the distillation", "checkpoint")
SETTINGS: dict[str, Any] = {
    "federation.strategy": "mmfed3",
    "model.dim": 16,
    "training.batch_size": 32,
    "training.num_negatives": 8,
    "distillation.warmup_rounds": 1,
    "distillation.num_soft_queries": 8,
    "distillation.num_candidates": 4,
    "distillation.server_steps": 5,
    "evaluation.every": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 2,
    "runtime.num_actors": 4,
    "runtime.dashboard": False,
    "faults.restart_seconds": 60.0,
    "report.html": False,
}
REPLACED = re.compile(r"; replaced .* in ([0-9.]+) s, of which ([0-9.]+) s for")
RUN_SECONDS = 1800.0
CLUSTER_ATTEMPTS = 10


@dataclass(frozen=True)
class Kill:
    """One kill: who, in which round and phase, and a number that chooses among several and delays it."""

    victim: str
    round_num: int
    phase: str
    chance: float


@dataclass
class Outcome:
    """What became of a schedule; `recoveries` has (seconds, of which for processes to start)."""

    number: int
    kills: list[Kill]
    same: bool = False
    lost: int = 0
    seconds: float = 0.0
    recoveries: list[tuple[float, float]] = field(default_factory=list)
    error: str = ""


def draw_schedule(seed: int, number: int, num_rounds: int) -> list[Kill]:
    """Draw the kills of a schedule, in the order of their rounds and phases."""
    draw = random.Random(f"{seed}/{number}")
    kills = [
        Kill(draw.choice(VICTIMS), draw.randint(1, num_rounds), draw.choice(PHASES), draw.random())
        for _ in range(draw.randint(1, 3))
    ]
    return sorted(kills, key=lambda kill: (kill.round_num, PHASES.index(kill.phase)))


class Chaos:
    """Kills what the schedule says, in the process that drives a run.

    Args:
        kills: those that are left.
        folder: where it notes how many are done, for the process that goes on after the driver was killed.
        cluster: of which nodes can be removed; its first one is the driver's.
    """

    def __init__(self, kills: Sequence[Kill], folder: Path, cluster: Any) -> None:
        self.kills, self.folder, self.cluster = list(kills), folder, cluster
        self.round_num = 0
        self.runtime: Any = None
        self.killed = 0.0

    def watch(self, runtime: Any) -> Any:
        """Hang in at the phases of a runtime's rounds."""
        self.runtime = runtime
        train, save = runtime.train, runtime.save
        await_server, ended = runtime.crew.await_server, runtime.timeline.ended

        def watched_train(round_num: int, cohort: Sequence[int]) -> Any:
            self.round_num = round_num
            self.at("before the broadcast")
            return train(round_num, cohort)

        def watched_save(folder: Path) -> None:
            self.at("checkpoint", later=True)
            save(folder)

        def watched_server(ref: Any, what: str) -> Any:
            if what.startswith("distilling"):
                self.at("after the aggregation")
                self.at("during the distillation", later=True)
            return await_server(ref, what)

        def watched_end(actor: str, what: str, seconds: float, *, failed: bool = False) -> None:
            ended(actor, what, seconds, failed=failed)
            if what.startswith("training in round") and not failed:
                self.at("in mid-collection", later=True)

        runtime.train, runtime.save = watched_train, watched_save
        runtime.crew.await_server, runtime.timeline.ended = watched_server, watched_end
        return runtime

    def at(self, phase: str, *, later: bool = False) -> None:
        """Kill whoever is due in this phase, at once or within a fifth of a second."""
        while self.kills and (self.kills[0].round_num, self.kills[0].phase) == (self.round_num, phase):
            kill = self.kills.pop(0)
            (self.folder / "left.json").write_text(json.dumps([asdict(item) for item in self.kills]))
            if later:
                threading.Timer(0.2 * kill.chance, self.strike, [kill]).start()
            else:
                self.strike(kill)
        while self.kills and self.kills[0].round_num < self.round_num:
            self.kills.pop(0)  # its phase is over, as the round was repeated without it

    def strike(self, kill: Kill) -> None:
        """Kill."""
        self.killed = time.monotonic()
        pool = self.runtime.pool
        if kill.victim == "driver":
            os.kill(os.getpid(), 9)
        elif kill.victim == "node" and len(self.cluster.worker_nodes) > 0:
            nodes = sorted(self.cluster.worker_nodes, key=lambda node: node.node_id)
            self.cluster.remove_node(nodes[int(kill.chance * len(nodes))], allow_graceful=False)
        elif pool:
            pid = self.runtime.crew.server_pid if kill.victim == "server" else pool[int(kill.chance * len(pool))].pid
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                return  # it is being replaced just now


class Recoveries(logging.Handler):
    """Writes a line of JSON for each recovery."""

    def __init__(self, chaos: Chaos) -> None:
        super().__init__(logging.WARNING)
        self.chaos = chaos

    def emit(self, record: logging.LogRecord) -> None:
        """Write how long it took."""
        found = REPLACED.search(record.getMessage())
        if found:
            took = time.monotonic() - self.chaos.killed
            print(json.dumps({"recovery": [took, float(found[2])]}), flush=True)
        print(record.getMessage(), file=sys.stderr, flush=True)


def start_cluster() -> Any:
    """Start three nodes; on a busy machine Ray itself may give up on one, which is no fault of the run's."""
    import ray
    from ray.cluster_utils import Cluster

    for attempt in range(CLUSTER_ATTEMPTS):
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=2, include_dashboard=False)
            for _ in range(2):
                cluster.add_node(num_cpus=2)
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
            cluster.wait_for_nodes()
        except Exception as err:
            ray.shutdown()
            cluster.shutdown()
            if attempt == CLUSTER_ATTEMPTS - 1:
                raise click.ClickException(f"no cluster starts on this machine: {err}") from err
        else:
            return cluster
    raise AssertionError("the last attempt returns or raises")


def drive(task: Mapping[str, Any]) -> None:
    """Run (or resume) on a cluster of three nodes, under a schedule."""
    import ray

    import fedsim
    from actors.runtime import ray_runtime
    from fedsim import simulation

    folder = Path(task["folder"])
    cluster = start_cluster()
    chaos = Chaos([Kill(**kill) for kill in task["kills"]], folder, cluster)
    logging.getLogger().addHandler(Recoveries(chaos))

    def factory(experiment: Any) -> Any:
        return chaos.watch(ray_runtime(experiment))

    try:
        if (folder / "run" / "config.yaml").is_file():
            simulation.resume(folder / "run", factory)
        else:
            config = fedsim.load_config(overrides={**task["settings"], "output": str(folder / "run")})
            simulation.run(config, factory)
    finally:
        ray.shutdown()
        cluster.shutdown()


def result_of(run: Path) -> tuple[list[Any], dict[str, bytes]]:
    """Return the rows of a run's metrics without wall times, and its model files."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    models = {path.name: path.read_bytes() for path in sorted((run / "models").glob("*.safetensors"))}
    return [_without_seconds(row) for row in rows], models


def _without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_seconds(item) for name, item in value.items() if "seconds" not in name}
    return [_without_seconds(item) for item in value] if isinstance(value, list) else value


def run_schedule(outcome: Outcome, folder: Path, settings: Mapping[str, Any], expected: Any) -> None:
    """Run a schedule to its end, with as many drivers as it takes, and compare."""
    folder.mkdir()
    started = time.perf_counter()
    kills = [asdict(kill) for kill in outcome.kills]
    for _ in range(len(kills) + 1):
        task = json.dumps({"folder": str(folder), "settings": dict(settings), "kills": kills})
        command = [sys.executable, __file__, "--drive", task]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            tree = ProcessTree(process.pid)
            code, lines = _follow(process, tree)
            errors.seek(0)
            text = errors.read()
        outcome.recoveries += [tuple(json.loads(line)["recovery"]) for line in lines if line.startswith("{")]
        if code != -9:
            break
        kills = json.loads((folder / "left.json").read_text())
    outcome.seconds = time.perf_counter() - started
    if code != 0:
        outcome.error = f"exit code {code}: {text[-2000:]}"
        return
    rows, models = result_of(folder / "run")
    outcome.lost = sum(row not in rows for row in expected[0])
    outcome.same = (rows, models) == expected


def _follow(process: "subprocess.Popen[str]", tree: ProcessTree) -> tuple[int, list[str]]:
    """Wait for a driver, and end what it leaves behind."""
    deadline = time.monotonic() + RUN_SECONDS
    lines: list[str] = []
    assert process.stdout is not None, "stdout is a pipe"
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
    reader.start()
    while process.poll() is None and time.monotonic() < deadline:
        tree.refresh()
        time.sleep(0.2)
    tree.end()
    code = process.wait()
    reader.join(5)
    return code if time.monotonic() < deadline else 124, lines


def import_seconds() -> float:
    """Measure what a process of an actor imports before it can work."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import actors.client"], check=True)
    return time.perf_counter() - started


def report(outcomes: Sequence[Outcome], sheet: Sheet, imports: float) -> None:
    """Print what happened."""
    ok = sum(outcome.same for outcome in outcomes)
    took = [seconds for outcome in outcomes for seconds, _ in outcome.recoveries]
    own = [seconds - starting for outcome in outcomes for seconds, starting in outcome.recoveries]
    rows = [
        [victim, str(sum(kill.victim == victim for item in outcomes for kill in item.kills))]
        for victim in sorted(set(VICTIMS))
    ]
    sheet.table("Kills", ("victim", "number"), rows)
    figures = [["all", f"{statistics.median(took):.2f}", f"{max(took):.2f}"]] if took else []
    figures += [["without starting processes", f"{statistics.median(own):.2f}", f"{max(own):.2f}"]] if own else []
    sheet.table("Seconds from a kill to recovery", ("", "median", "largest"), figures)
    sheet.say(f"An actor's imports take {imports:.2f} s in a process of their own.")
    lost = sum(outcome.lost for outcome in outcomes)
    sheet.verdicts(
        [
            ("schedules with the bits of the undisturbed run", "all", f"{ok} of {len(outcomes)}", ok == len(outcomes)),
            ("rows of results lost", "0", str(lost), lost == 0),
        ]
    )


@click.command()
@click.option("--schedules", default=100, show_default=True)
@click.option("--first", default=0, show_default=True, help="number of the first schedule")
@click.option("--clients", default=50, show_default=True)
@click.option("--rounds", default=4, show_default=True)
@click.option("--triples", default=40, show_default=True, help="per client")
@click.option("--seed", default=0, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="write the tables as markdown")
@click.option("--drive", "task", hidden=True)
def main(
    schedules: int,
    first: int,
    clients: int,
    rounds: int,
    triples: int,
    seed: int,
    output: Path | None,
    task: str | None,
) -> None:
    """Run the schedules and compare."""
    os.environ.update({"OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", **PYTHON})
    if task is not None:
        drive(json.loads(task))
        return
    import fedsim

    sheet = Sheet(f"Chaos: {schedules} schedules, {clients} clients, {rounds} rounds", output)
    log = output.with_suffix(f".{clients}-{rounds}-{triples}-{seed}.jsonl") if output is not None else None
    known = _read(log)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="fedsim-chaos-") as name:
        data = make_data(Path(name) / "job", clients, triples)
        settings = {**data.settings(), **SETTINGS, "federation.num_rounds": rounds}
        undisturbed = settings | {"output": str(Path(name) / "undisturbed"), "runtime.kind": "in_process"}
        fedsim.run(fedsim.load_config(overrides=undisturbed))
        expected = result_of(Path(name) / "undisturbed")
        for number in range(first, first + schedules):
            outcome = known.get(number) or Outcome(number, draw_schedule(seed, number, rounds))
            if number not in known:
                run_schedule(outcome, Path(name) / f"schedule-{number}", settings, expected)
                if log is not None:
                    with log.open("a") as file:
                        file.write(json.dumps(asdict(outcome)) + "\n")
            outcomes.append(outcome)
            what = ", ".join(f"{kill.victim} {kill.phase} of round {kill.round_num}" for kill in outcome.kills)
            state = "same bits" if outcome.same else f"DIFFERENT, {outcome.lost} rows lost {outcome.error}"
            recovered = " ".join(f"{seconds:.1f}" for seconds, _ in outcome.recoveries)
            took = f"{outcome.seconds:.0f} s, recoveries {recovered or 'none'}"
            sheet.progress(f"schedule {number}: {state}; {what}; {took}")
    report(outcomes, sheet, import_seconds())
    sheet.close()


def _read(log: Path | None) -> dict[int, Outcome]:
    """Return the outcomes that a log has; those of schedules that failed are left out, to be tried again."""
    if log is None or not log.is_file():
        return {}
    found = [Outcome(**json.loads(line)) for line in log.read_text().splitlines()]
    for outcome in found:
        outcome.kills = [Kill(**kill) for kill in outcome.kills]  # type: ignore[arg-type]
    return {outcome.number: outcome for outcome in found if outcome.same}


if __name__ == "__main__":
    main()
