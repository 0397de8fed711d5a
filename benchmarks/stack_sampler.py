"""Samples what a process does: the stack of its main thread, a hundred times a second, into a file.

It sees Python frames of the main thread; what a kernel does shows as the function that called it. `start` is also the
setup hook by which Ray starts it in every worker.
"""

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

FOLDER_VARIABLE = "BENCHMARK_SAMPLES"  # folder for the samples of all processes
INTERVAL_SECONDS = 0.01
BUCKET_SECONDS = 0.1  # samples are counted per bucket of wall time

Stack = tuple[str, ...]  # module:function, the innermost first
Samples = dict[int, Counter[Stack]]  # bucket -> how often each stack was seen


def start() -> None:
    """Sample this process until it ends."""
    sys.setswitchinterval(0.0005)  # else a sample waits until Python gives way, and sees kernels too often
    file = Path(os.environ[FOLDER_VARIABLE]) / f"{os.getpid()}.jsonl"
    threading.Thread(target=_run, args=(file,), daemon=True).start()


def read(folder: Path) -> dict[int, Samples]:
    """Return the samples by process id."""
    return {int(file.stem): dict(_read(file)) for file in sorted(folder.glob("*.jsonl"))}


def _run(file: Path) -> None:
    thread = threading.main_thread().ident
    bucket, seen = _bucket(), Counter[Stack]()
    with file.open("a", encoding="utf-8") as out:
        while True:
            time.sleep(INTERVAL_SECONDS)
            frame = sys._current_frames().get(thread or 0)
            if frame is None:
                return
            if _bucket() != bucket:
                out.write(json.dumps([bucket, [[*item] for item in seen.items()]]) + "\n")
                out.flush()
                bucket, seen = _bucket(), Counter()
            seen[_stack(frame)] += 1


def _stack(frame: FrameType | None) -> Stack:
    found = []
    while frame is not None:
        found.append(f"{frame.f_globals.get('__name__', '?')}:{frame.f_code.co_name}")
        frame = frame.f_back
    return tuple(found)


def _bucket() -> int:
    return int(time.time() / BUCKET_SECONDS)


def _read(file: Path) -> Iterator[tuple[int, Counter[Stack]]]:
    for line in file.read_text(encoding="utf-8").splitlines():
        bucket, items = json.loads(line)
        yield bucket, Counter({tuple(stack): count for stack, count in items})
