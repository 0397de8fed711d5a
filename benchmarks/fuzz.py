"""Broken inputs, by the million, to everything that reads what others may have written; counts what breaks.

    python benchmarks/fuzz.py --inputs 1000000                      # all targets, an hour or so on two slow cores
    python benchmarks/fuzz.py --inputs 20000 --target config        # one target
    python benchmarks/fuzz.py --again runs/fuzz/config-17           # a saved input once more, with its traceback

The rule (tests/fuzzing/engine.py): a reader works, or raises fedsim's own error. Another exception, the death of the
process, a hang, an allocation of more than 2 GiB, or a file that a refused import leaves behind is a crash; the first
input of each is saved. Inputs follow from the seed, target by target, and are the same on every machine with the same
versions.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import click

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from machine import describe_machine

from fuzzing.engine import Crash, Outcome, attempt, fuzz, limit_memory, save_crash
from fuzzing.mutation import Input
from fuzzing.targets import all_targets

MEMORY_BYTES = 2 << 30
IN_MEMORY = Path("/dev/shm")


@click.command(help=__doc__)
@click.option("--inputs", default=1_000_000, show_default=True, help="of all targets together")
@click.option("--seed", default=0, show_default=True)
@click.option("--target", "names", multiple=True, help="leave out the others; may be repeated")
@click.option("--jobs", default=1, show_default=True, help="targets at a time, a process each")
@click.option("--output", default=Path("runs/fuzz"), show_default=True, type=click.Path(path_type=Path))
@click.option("--again", type=click.Path(exists=True, path_type=Path), help="a saved crash to try again")
def main(inputs: int, seed: int, names: Sequence[str], jobs: int, output: Path, again: Path | None) -> None:
    """Fuzz."""
    if again is not None:
        try_again(again)
        return
    targets = all_targets()
    unknown = set(names) - targets.keys()
    if unknown:
        raise click.UsageError(f"no target {min(unknown)}; there are {', '.join(targets)}")
    chosen = [name for name in targets if not names or name in names]
    total = sum(targets[name].share for name in chosen)
    counts = {name: math.ceil(inputs * targets[name].share / total) for name in chosen}
    print(describe_machine())
    print(f"seed {seed}, {jobs} at a time\n")
    print(
        f"{'target':<22}{'inputs':>9}{'accepted':>10}{'kept':>6}{'seconds':>9}{'per s':>8}{'slowest':>9}{'crashes':>9}"
    )
    began, outcomes = time.perf_counter(), []
    with ThreadPoolExecutor(jobs) as threads:
        tasks = [threads.submit(fuzz_apart, name, count, seed, output) for name, count in counts.items()]
        for task in as_completed(tasks):
            outcomes.append(task.result())
            show(outcomes[-1])
    num_inputs, num_crashes = (sum(getattr(item, name) for item in outcomes) for name in ("num_inputs", "num_crashes"))
    seconds = time.perf_counter() - began
    print(
        f"\n{num_inputs:,} inputs, {num_crashes} crashes, {seconds:.0f} s, {num_inputs / seconds:.0f} inputs per second"
    )
    sys.exit(1 if num_crashes else 0)


def fuzz_apart(name: str, num_inputs: int, seed: int, output: Path) -> Outcome:
    """Fuzz one target in a process of its own; a reader that ends it, whatever the input, is a crash too."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as scratch:
        try:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                outcome = pool.submit(fuzz_one, name, num_inputs, seed, Path(scratch)).result()
        except BrokenProcessPool:
            crash = Crash("the process died", "the process died", read_input(Path(scratch) / "input"), None)
            outcome = Outcome(name, num_crashes=1, crashes={crash.key: crash})
        for crash in outcome.crashes.values():
            save_crash(crash, name, output)
    return outcome


def fuzz_one(name: str, num_inputs: int, seed: int, scratch: Path) -> Outcome:
    """Fuzz one target in this process: how many inputs, the seed, and where to work."""
    limit_memory(MEMORY_BYTES)
    return fuzz(all_targets()[name], num_inputs, seed, scratch)


def read_input(folder: Path) -> Input:
    """Read the files of an input."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def show(outcome: Outcome) -> None:
    """Print a target's line, and what broke it."""
    rate = outcome.num_inputs / max(outcome.seconds, 1e-9)
    print(
        f"{outcome.target:<22}{outcome.num_inputs:>9,}{outcome.num_accepted / max(outcome.num_inputs, 1):>10.1%}"
        f"{outcome.num_kept:>6}{outcome.seconds:>9.1f}{rate:>8.0f}{outcome.slowest:>8.2f}s{outcome.num_crashes:>9,}",
        flush=True,
    )
    for crash in outcome.crashes.values():
        last = crash.text.strip().splitlines()[-1][:150]
        which = "the last input" if crash.number is None else f"input {crash.number}"
        print(f"    {crash.key} ({which}): {last}", flush=True)


def try_again(folder: Path) -> None:
    """Try a saved input once more."""
    target = all_targets()[json.loads((folder / "crash.json").read_text())["target"]]
    with tempfile.TemporaryDirectory() as scratch:
        crash, place = attempt(target, read_input(folder / "input"), Path(scratch), 0)
    print(crash.text if crash is not None else f"no crash: {place}")


if __name__ == "__main__":
    main()
