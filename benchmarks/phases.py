"""Where a round of MMFeD3-HidE goes with hundreds of clients, and what HidE costs beside the zero imputer.

    FEDSIM_DATA=data python benchmarks/phases.py --output runs/phases.md
    python benchmarks/phases.py --part hide                  # only HidE against zeros, on wn_noto

Phases: FB15k-237 with texts, dirichlet split, on Ray in a pool of two actors; every process is sampled a hundred times
a second (`stack_sampler.py`), and each instant of the rounds' wall time goes to what the client actors do, each by its
share; where one of them waits while others work, to imbalance; where all of them wait, to what the server does, and
else to orchestration. Model arithmetic is local training (draws, diffusion sampling, forward, backward, optimiser),
what the strategy computes for its messages, the server's distillation, and ranking.

HidE: the main job with its defaults (`wn_noto`, three clients) and with the zero imputer, in one process, in turns;
seconds are those that the clients report of their local training, CPU seconds those of the whole round. Rounds before
the distillation terms switch on, and the last one, which is validated, do not count.
"""

import importlib
import inspect
import json
import logging
import os
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import ray
import stack_sampler
from process_tree import PYTHON
from tables import Sheet

import fedsim
from actors.runtime import ray_runtime
from fedsim.results import RoundSummary, RunInfo

# Phase -> functions, the first phase whose function is on the stack; `module:*` is any function of the module.
RULES: dict[str, tuple[str, ...]] = {
    "evaluation": ("fedsim.federated.client_batch:evaluate_clients",),
    "checkpoint": ("fedsim.checkpoint:*", "fedsim.federated.client:state", "fedsim.federated.server:state"),
    "distillation at the server": ("fedsim.federated.server_distillation:*",),
    "aggregation": ("fedsim.federated.aggregation:*", "fedsim.federated.server:finish_round"),
    "backward": ("torch.autograd:grad",),
    "optimiser": ("fedsim.models.optimizers:*", "fedsim.models.training:update_ema"),
    "diffusion sampling": ("fedsim.models.client_stack:impute",),
    "forward": ("fedsim.models.training:forward_view", "fedsim.federated.mmfed3:couple"),
    "entities in use": ("fedsim.models.used_rows:*",),
    "draws": ("fedsim.models.training:_draw_batch", "fedsim.models.training:_start_epoch"),
    "soft queries and tokens sent": ("fedsim.federated.mmfed3:extras",),
    "stacking of clients": ("fedsim.models.client_stack:*", "fedsim.models.stacking:*"),
    "rest of local training": ("fedsim.models.training:*",),
    "messages": ("fedsim.federated.messages:*", "fedsim.federated.client:*", "ray._private.serialization:*"),
    "rest of the actors": ("fedsim.federated.client_batch:*", "actors.client:*", "actors.server:*"),
}
ARITHMETIC = (
    "evaluation",
    "distillation at the server",
    "backward",
    "optimiser",
    "diffusion sampling",
    "forward",
    "entities in use",
    "draws",
    "soft queries and tokens sent",
)
IDLE, IMBALANCE, ORCHESTRATION = "idle", "waiting for the other actor", "orchestration"
NUM_ACTORS = 2
MANY: dict[str, Any] = {
    "data.split": "dirichlet",
    "data.modalities": ["text"],
    "runtime.placement": "pooled",
    "runtime.num_actors": NUM_ACTORS,
    "checkpoint.keep": 1,
}


@dataclass
class Windows:
    """An observer that keeps when each round began and ended."""

    sheet: Sheet
    rounds: list[tuple[float, float]] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of this process
    summaries: list[RoundSummary] = field(default_factory=list)
    started: float = 0.0
    cpu_started: float = 0.0

    def run_started(self, info: RunInfo) -> None:
        """Say where it runs."""
        self.sheet.progress("; ".join(info.placement))

    def round_started(self, round_num: int) -> None:
        """Keep the time."""
        self.started, self.cpu_started = time.time(), time.process_time()

    def round_finished(self, summary: RoundSummary) -> None:
        """Keep the time."""
        self.rounds.append((self.started, time.time()))
        self.cpu_seconds.append(time.process_time() - self.cpu_started)
        self.summaries.append(summary)
        self.sheet.progress(f"round {summary.round_num}: {time.time() - self.started:.1f} s")

    def message(self, text: str) -> None:
        """Show what the run has to say."""
        self.sheet.progress(text)


def check_rules() -> None:
    """Refuse rules that name what is not there any more."""
    for names in RULES.values():
        for name in names:
            module, function = name.split(":")
            source = inspect.getsource(importlib.import_module(module))
            if function != "*" and f"def {function}(" not in source:
                raise click.ClickException(f"benchmarks/phases.py names {name}, which is not there; mend RULES")


def phase_of(stack: stack_sampler.Stack) -> str:
    """Name the phase of a stack."""
    frames = set(stack) | {f"{frame.partition(':')[0]}:*" for frame in stack}
    for phase, names in RULES.items():
        if not frames.isdisjoint(names):
            return phase
    return IDLE


def split_time(
    samples: Mapping[int, stack_sampler.Samples], rounds: list[tuple[float, float]]
) -> tuple[dict[str, float], Counter[tuple[str, str]]]:
    """Divide the rounds' wall time; returns seconds by phase, and samples by (phase, innermost own function)."""
    width = stack_sampler.BUCKET_SECONDS
    pool = [pid for pid in samples if _role(samples[pid]) == "client"]
    server = [pid for pid in samples if _role(samples[pid]) == "server"]
    if len(pool) != NUM_ACTORS or len(server) != 1:
        raise click.ClickException(f"samples of {len(pool)} client and {len(server)} server actors, need 2 and 1")
    seconds: defaultdict[str, float] = defaultdict(float)
    leaves: Counter[tuple[str, str]] = Counter()
    for start, end in rounds:
        for bucket in range(int(start / width), int(end / width) + 1):
            inside = min(end, (bucket + 1) * width) - max(start, bucket * width)
            shares = {pid: _shares(samples[pid].get(bucket, Counter())) for pid in (*pool, *server)}
            work = max(1 - shares[pid].get(IDLE, 0.0) for pid in pool)
            for pid in pool:
                for phase, share in shares[pid].items():
                    if phase != IDLE:
                        seconds[phase] += inside * share / len(pool)
                seconds[IMBALANCE] += inside * (shares[pid].get(IDLE, 0.0) - (1 - work)) / len(pool)
                for stack, count in samples[pid].get(bucket, Counter()).items():
                    leaves[phase_of(stack), _own(stack)] += count
            for phase, share in shares[server[0]].items():
                seconds[ORCHESTRATION if phase == IDLE else phase] += inside * share * (1 - work)
    return dict(seconds), leaves


def _role(found: stack_sampler.Samples) -> str:
    modules = {frame.partition(":")[0] for counts in found.values() for stack in counts for frame in stack}
    if "fedsim.models.training" in modules and "actors.client" in modules:
        return "client"
    return "server" if "actors.server" in modules and "actors.runtime" not in modules else "other"


def _shares(counts: Counter[stack_sampler.Stack]) -> dict[str, float]:
    total = sum(counts.values())
    if total == 0:
        return {IDLE: 1.0}
    shares: Counter[str] = Counter()
    for stack, count in counts.items():
        shares[phase_of(stack)] += count
    return {phase: count / total for phase, count in shares.items()}


def _own(stack: stack_sampler.Stack) -> str:
    """Return the innermost function of fedsim or actors."""
    return next((frame for frame in stack if frame.startswith(("fedsim.", "actors."))), stack[0])


def measure_phases(data: str, num_clients: int, num_rounds: int, sheet: Sheet) -> None:
    """Run MMFeD3-HidE on Ray and divide the time of its rounds."""
    check_rules()
    with tempfile.TemporaryDirectory(prefix="fedsim-phases-") as name:
        folder = Path(name) / "samples"
        folder.mkdir()
        os.environ[stack_sampler.FOLDER_VARIABLE] = str(folder)
        os.environ["PYTHONPATH"] = str(Path(__file__).parent)
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
        hook = {"worker_process_setup_hook": "stack_sampler.start"}
        ray.init(address="local", runtime_env=hook, log_to_driver=False, logging_level=logging.ERROR)
        changes = {"data.path": data, "data.num_clients": num_clients, "federation.num_rounds": num_rounds}
        windows = Windows(sheet)
        try:
            config = fedsim.load_config(overrides=MANY | changes | {"output": str(Path(name) / "run")})
            fedsim.run(config, ray_runtime, windows)
        except fedsim.FedSimError as err:
            raise click.ClickException(str(err)) from err
        finally:
            ray.shutdown()
        seconds, leaves = split_time(stack_sampler.read(folder), windows.rounds)
        wall = sum(end - start for start, end in windows.rounds) / num_rounds
        busy = [row["seconds"] for row in _rows(Path(name) / "run") if row["client"] is not None and "seconds" in row]
    title = f"MMFeD3-HidE, {num_clients} clients of {data} with texts: {wall:.1f} s per round, mean of {num_rounds}"
    show_phases(title, seconds, leaves, num_rounds, sheet)
    by_driver = Counter[str]()
    for summary in windows.summaries:
        by_driver.update(summary.seconds)
    shown = ", ".join(f"{phase} {value / num_rounds:.2f}" for phase, value in by_driver.items())
    sheet.say(
        f"As the run itself reports: {shown} s per round; the clients' own seconds of a round are "
        f"{sum(busy) / num_rounds:.1f}, over {NUM_ACTORS} actors {sum(busy) / num_rounds / NUM_ACTORS:.1f}."
    )


def show_phases(
    title: str, seconds: Mapping[str, float], leaves: Counter[tuple[str, str]], num_rounds: int, sheet: Sheet
) -> None:
    """Print seconds by phase, the share of arithmetic, and what the rest is."""
    rows = []
    total = sum(seconds.values())
    arithmetic = sum(value for phase, value in seconds.items() if phase in ARITHMETIC)
    for phase, value in sorted(seconds.items(), key=lambda item: -item[1]):
        kind = "arithmetic" if phase in ARITHMETIC else ""
        rows.append([phase, kind, f"{value / num_rounds:.2f}", f"{value / total:.1%}"])
    sheet.table(title, ("phase", "", "s/round", "share"), rows)
    rest = [(key, count) for key, count in leaves.most_common() if key[0] not in (*ARITHMETIC, IDLE)][:12]
    seen = sum(leaves.values())
    cells = [(phase, where, f"{count / seen:.2%}") for (phase, where), count in rest]
    sheet.table("Client actors, outside of arithmetic", ("phase", "innermost own function", "of all samples"), cells)
    share = arithmetic / total
    sheet.verdicts([("share of model arithmetic in a round", ">= 85 %", f"{share:.1%}", share >= 0.85)])


def measure_hide(num_rounds: int, repetitions: int, sheet: Sheet) -> None:
    """Run the main job with HidE and with zeros, in turns."""
    found: dict[str, list[float]] = {"zero": [], "diffusion": []}
    cpu: dict[str, list[float]] = {"zero": [], "diffusion": []}
    fixed = {"runtime.kind": "in_process", "evaluation.every": 1000, "checkpoint.every": 1000}
    with tempfile.TemporaryDirectory(prefix="fedsim-hide-") as name:
        for repetition in range(repetitions):
            for imputer in found:
                folder = Path(name) / f"{imputer}-{repetition}"
                changes = {"model.imputer": imputer, "federation.num_rounds": num_rounds, "output": str(folder)}
                config = fedsim.load_config(overrides=fixed | changes)
                windows = Windows(sheet)
                fedsim.run(config, observer=windows)
                # Before the distillation terms switch on a round is cheaper; the last one is also validated.
                steady = slice(config.distillation.warmup_rounds, num_rounds - 1)
                seconds: Counter[int] = Counter()
                for row in _rows(folder):
                    if row["client"] is not None:
                        seconds[row["round"]] += row["seconds"]
                num_epochs = config.training.local_epochs
                found[imputer] += [value / num_epochs for value in list(seconds.values())[steady]]
                cpu[imputer] += [value / num_epochs for value in windows.cpu_seconds[steady]]
    if not found["zero"]:
        raise click.ClickException("too few rounds: the first ones and the last one do not count; give more")
    cells = [
        (name, *(f"{value:.3f}" for value in (min(found[name]), statistics.median(found[name]), min(cpu[name]))))
        for name in found
    ]
    sheet.table(
        "wn_noto, all clients", ("imputer", "local training, s/epoch min", "median", "round, CPU s/epoch"), cells
    )
    low = min(found["diffusion"]) / min(found["zero"])
    by_cpu = min(cpu["diffusion"]) / min(cpu["zero"])
    text = f"{low:.2f} of seconds, {by_cpu:.2f} of CPU seconds"
    sheet.verdicts([("HidE's epoch / zero's", "<= 1.5", text, max(low, by_cpu) <= 1.5)])


def _rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@click.command()
@click.option("--part", type=click.Choice(["phases", "hide"]), help="this alone [default: both]")
@click.option("--data", default="FB15k-237", show_default=True, help="of the phases; a data set with texts")
@click.option("--clients", default=300, show_default=True, help="of the phases")
@click.option("--rounds", default=2, show_default=True, help="of the phases")
@click.option("--hide-rounds", default=5, show_default=True, help="per run of HidE and of zeros")
@click.option("--repetitions", default=2, show_default=True, help="runs of HidE and of zeros")
@click.option("--output", type=click.Path(path_type=Path), help="write the tables as markdown")
def main(
    part: str | None,
    data: str,
    clients: int,
    rounds: int,
    hide_rounds: int,
    repetitions: int,
    output: Path | None,
) -> None:
    """Divide a round's time, and compare the imputers."""
    os.environ.update({"OMP_NUM_THREADS": "1", **PYTHON})
    sheet = Sheet("Where a round goes", output)
    if part != "hide":
        measure_phases(data, clients, rounds, sheet)
    if part != "phases":
        measure_hide(hide_rounds, repetitions, sheet)
    sheet.close()


if __name__ == "__main__":
    main()
