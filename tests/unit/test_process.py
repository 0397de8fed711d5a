"""Settings of a training process."""

import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from fedsim.process import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(10):  # small blocks may end up behind a big one, so it takes some until the next finds its place
    torch.ones(16, 1 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(16, 1 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(setting: str) -> int:
    command = [sys.executable, "-c", PROGRAM, setting]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has the setting")
def test_big_tensors_reuse_memory() -> None:
    fresh = 5 * 16 * (1 << 22) // resource.getpagesize()  # pages that five tensors of 64 MB touch
    assert page_faults("keep") < fresh / 100


def output_of(program: str, setting: str = "") -> int:
    return int(
        subprocess.run([sys.executable, "-c", program, setting], capture_output=True, text=True, check=True).stdout
    )


def test_returning_memory_leaves_no_garbage() -> None:
    """It is done each round: a cycle of objects that it left would add up."""
    program = """
import gc
from fedsim.process import return_freed_memory
return_freed_memory()
gc.collect()
gc.disable()
return_freed_memory()
print(gc.collect())
"""
    assert output_of(program) == 0


def test_cycles_are_found_beside_many_old_objects() -> None:
    """Python looks through everything once new objects are a quarter of the old ones, here 100,000 of a million."""
    program = """
import gc, sys
from fedsim.process import set_aside_imports
old = [[] for _ in range(1_000_000)]
if sys.argv[1] == "aside":
    set_aside_imports()
before = gc.get_stats()[2]["collections"]
kept = [[] for _ in range(100_000)]
print(gc.get_stats()[2]["collections"] - before)
"""
    assert output_of(program, "aside") > output_of(program, "not")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has the setting")
def test_threads_share_a_heap() -> None:
    """Counts the heaps that glibc tells of when three threads have memory of their own."""
    program = """
import ctypes, sys, tempfile, threading
from fedsim.process import share_one_heap
if sys.argv[1] == "share":
    share_one_heap()
library = ctypes.CDLL(None)
library.fopen.restype = ctypes.c_void_p
there, seen = threading.Barrier(4), threading.Event()
def hold():
    library.malloc(100)
    there.wait()
    seen.wait()
threads = [threading.Thread(target=hold) for _ in range(3)]
for thread in threads:
    thread.start()
there.wait()
with tempfile.NamedTemporaryFile() as file:
    stream = ctypes.c_void_p(library.fopen(file.name.encode(), b"w"))
    library.malloc_info(0, stream)
    library.fclose(stream)
    print(file.read().count(b"<heap "))
seen.set()
"""
    assert output_of(program, "share") < output_of(program, "not")
