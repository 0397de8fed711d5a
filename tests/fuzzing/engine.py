"""Feeds broken inputs to a reader and holds it to one rule: it works, or it raises fedsim's own error.

Another exception is a crash, and so are a hang (CPU time), files that a failed writer leaves behind, and, with
`limit_memory`, a large allocation. Inputs that reach a place that no earlier one reached (the line of fedsim that
refused, and what it refused) are kept and changed further: the search is guided by what it gets to see, and is the same
for the same seed.
"""

import json
import random
import resource
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import click

from fedsim.errors import FedSimError
from fuzzing.mutation import Input, change

SECONDS = 10.0  # of CPU, for one input
MAX_KEPT = 400  # inputs that are changed further, per target
ALLOWED = (FedSimError, click.ClickException)


@dataclass(frozen=True)
class Target:
    """Something that reads what others wrote.

    Attributes:
        name: of the target.
        seeds: valid inputs.
        read: gets the folder in which an input's files stand; may write below `folder / "out"`.
        share: of all inputs; cheap readers get more.
        changed: breaks an input.
        made: files that stand beside every input and are not changed.
    """

    name: str
    seeds: Sequence[Input]
    read: Callable[[Path], Any]
    share: float = 1.0
    changed: Callable[[random.Random, Input, Sequence[Input]], Input] = change


@dataclass
class Crash:
    """An input that broke a reader; `key` is the same for the same fault, `number` None if the process died with it."""

    key: str
    text: str
    files: Input
    number: int | None


@dataclass
class Outcome:
    """What became of a target's inputs."""

    target: str
    num_inputs: int = 0
    num_accepted: int = 0
    num_kept: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    crashes: dict[str, Crash] = field(default_factory=dict)
    num_crashes: int = 0


class TooSlow(BaseException):
    """An input took too much CPU time; no reader's `except Exception` catches it."""


def fuzz(target: Target, num_inputs: int, seed: int, scratch: Path) -> Outcome:
    """Try a target's seeds, which must be accepted, and inputs made of them.

    Args:
        target: what is tried.
        num_inputs: how many inputs.
        seed: of all that is drawn.
        scratch: a folder to work in, best in memory.
    """
    outcome = Outcome(target.name)
    corpus = [dict(item) for item in target.seeds]
    seen: set[str] = set()
    began = time.perf_counter()
    with _quiet():
        for item in corpus:
            crash, place = attempt(target, item, scratch, 0)
            assert crash is None, f"{target.name}: a valid input is refused: {crash.text}"
            assert place == "accepted", f"{target.name}: a valid input is refused: {place}"
        for number in range(num_inputs):
            generator = random.Random(f"{seed}/{target.name}/{number}")
            given = target.changed(generator, generator.choice(corpus), corpus)
            before = time.process_time()
            crash, place = attempt(target, given, scratch, number)
            outcome.slowest = max(outcome.slowest, time.process_time() - before)
            outcome.num_inputs += 1
            outcome.num_accepted += place == "accepted"
            if crash is not None:
                outcome.num_crashes += 1
                outcome.crashes.setdefault(crash.key, crash)
            elif place not in seen and len(corpus) < MAX_KEPT:
                seen.add(place)
                corpus.append(given)
    outcome.num_kept = len(corpus) - len(target.seeds)
    outcome.seconds = time.perf_counter() - began
    return outcome


def attempt(target: Target, given: Input, scratch: Path, number: int) -> tuple[Crash | None, str]:
    """Try one input; returns the crash if there was one, and where the reader ended."""
    folder = scratch / "input"
    shutil.rmtree(folder, ignore_errors=True)
    write_input(given, folder)
    try:
        with _limited(SECONDS):
            target.read(folder)
    except ALLOWED as err:
        left = next((folder / "out").rglob("*"), None)
        if left is not None:
            text = f"refused with {err}, but left {left}"
            return Crash(f"left {left.name} at {_place(err)}", text, given, number), "crash"
        return None, _place(err)
    except (Exception, TooSlow, SystemExit) as err:  # noqa: BLE001 (that is what is looked for)
        text = "".join(traceback.format_exception(err))
        return Crash(f"{type(err).__name__} at {_place(err)}", text, given, number), "crash"
    return None, "accepted"


def write_input(given: Input, folder: Path) -> None:
    """Write an input as files."""
    folder.mkdir(parents=True)
    for name, content in given.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def save_crash(crash: Crash, target: str, folder: Path) -> Path:
    """Keep what broke a reader, so that `benchmarks/fuzz.py --again` can try it again."""
    place = folder / f"{target}-{'died' if crash.number is None else crash.number}"
    shutil.rmtree(place, ignore_errors=True)
    write_input(crash.files, place / "input")
    (place / "crash.txt").write_text(crash.text, encoding="utf-8", errors="backslashreplace")
    (place / "crash.json").write_text(json.dumps({"target": target, "key": crash.key}) + "\n")
    return place


def limit_memory(num_bytes: int) -> None:
    """Let this process allocate that much more, so that a large allocation is a MemoryError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, resource.RLIM_INFINITY))


def _place(err: BaseException) -> str:
    """Say where in our own code an error was raised, and what caused it."""
    frames = [frame for frame in traceback.extract_tb(err.__traceback__) if "site-packages" not in frame.filename]
    own = [frame for frame in frames if any(f"/{name}/" in frame.filename for name in ("fedsim", "actors", "tune"))]
    last = (own or frames)[-1]
    cause = type(err.__cause__).__name__ if err.__cause__ is not None else ""
    return f"{Path(last.filename).name}:{last.lineno} {cause}".strip()


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise TooSlow(f"more than {seconds:g} s of CPU")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Readers may warn (of a checkpoint that is damaged, of numbers that overflow); that is no crash."""
    import logging

    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
