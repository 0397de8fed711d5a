"""Settings of a process that trains: its threads and its memory."""

import ctypes
import gc
import sys
from functools import cache
from typing import Any

import threadpoolctl
import torch

# Parameters of glibc's mallopt, as in malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_KEPT_BYTES = 1 << 27
_GROWTH_BYTES = 1 << 24


def settle_process(num_threads: int) -> None:
    """Prepare this process for training, with so many threads."""
    pin_threads(num_threads)
    keep_freed_memory()


def pin_threads(num_threads: int) -> None:
    """Give torch, and the linear algebra of numpy and scikit-learn, this many threads in this process.

    How a sum is divided among threads decides its last digits, so every process of every runtime does this.
    """
    torch.set_num_threads(num_threads)
    threadpoolctl.threadpool_limits(num_threads)


def keep_freed_memory() -> bool:
    """Keep big blocks of freed memory for the next tensor instead of handing them back to the system.

    A tensor of more than 32 MB is otherwise fresh memory at each step, and the page faults of its first use can cost
    more than the arithmetic on it. Up to 128 MB at the end of the heap stay with the process.

    Returns:
        Whether the C library took the settings; others than glibc have none.
    """
    mallopt = _of_c_library("mallopt")
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _KEPT_BYTES), (_M_TOP_PAD, _GROWTH_BYTES))
    taken = [mallopt(parameter, value) == 1 for parameter, value in settings]
    return all(taken)


def share_one_heap() -> None:
    """Let the threads that begin from now on share one heap, in a process that starts many and computes little.

    Ray starts some 20 threads in a driver, and glibc gives each of the first 8 per CPU a heap with its own free memory.
    """
    mallopt = _of_c_library("mallopt")
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Hand the freed memory within the heap back to the system, where the C library can; costs milliseconds."""
    trim = _of_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def set_aside_imports() -> None:
    """Take what exists now out of the garbage collector's sight, in a process that keeps it to the end.

    Python looks through all objects only once new ones are a quarter of those that it has seen before. Beside the
    600,000 objects that torch and Ray bring, the cycles that torch.func leaves in each round would lie for hundreds of
    rounds, which looks like a leak of memory.
    """
    gc.freeze()
    gc.collect()  # of what is left: makes it count anew what it has seen


def collect_garbage() -> None:
    """Free what lies in cycles; cheap after `set_aside_imports`.

    Left to itself Python looks for cycles every few hundred rounds, and some of them hold on to messages in Ray's
    object store.
    """
    gc.collect()


@cache
def _of_c_library(name: str) -> Any:
    """Return a function of the C library, None where it has none; kept, since each look-up leaves cycles of objects."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
