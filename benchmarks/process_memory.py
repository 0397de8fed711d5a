"""What several processes hold of the machine's memory together, whatever else the machine runs.

The proportional set size (PSS) that Linux gives in /proc/<pid>/smaps_rollup counts a page that n processes share as
1/n in each. Of a page of a library those n are all processes of the machine: another program that has torch open
makes a run look smaller. So pages of files are counted here: one that any of the processes has mapped counts once,
1/m in each of the m of them that have it. The other pages, of processes' own memory and of the object store, have no
strangers among those who share them; for these PSS is taken as it is.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
SHARED_MEMORY = ("/dev/shm/", "/dev/zero", "/memfd:", "/SYSV")  # has names, and is no file
# Bits of an entry of /proc/<pid>/pagemap: the page is in memory; it is a file's, not the process' own copy of it.
IN_MEMORY, OF_FILE = np.uint64(1 << 63), np.uint64(1 << 61)
GONE = (FileNotFoundError, ProcessLookupError)

Pages = dict[tuple[str, int], npt.NDArray[np.int64]]
"""A file's device and inode -> the numbers of its pages that a process has mapped, each once."""


@dataclass(frozen=True)
class Held:
    """Memory of one process.

    Attributes:
        own_bytes: PSS without pages of files.
        file_bytes: pages of files, divided among those of the processes that have them.
        pss_bytes: PSS as Linux gives it, in which pages of files are divided among all processes of the machine.
    """

    own_bytes: int = 0
    file_bytes: int = 0
    pss_bytes: int = 0


def measure(pids: Sequence[int], *, files: bool = True) -> dict[int, Held]:
    """Measure processes, at one moment as nearly as it can be; one that has ended holds nothing.

    Args:
        pids: the processes.
        files: whether to count pages of files, which takes some 20 ms per process.
    """
    pages = {pid: file_pages(pid) for pid in pids} if files else {}
    sizes = {pid: _rollup(pid) for pid in pids}  # after the pages: one that has ended by now has its share of none
    shares = divide({pid: found for pid, found in pages.items() if sizes[pid] != (0, 0)})
    return {pid: Held(pss - of_files, round(shares.get(pid, 0.0)), pss) for pid, (pss, of_files) in sizes.items()}


def divide(pages: dict[int, Pages]) -> dict[int, float]:
    """Divide pages of files among the processes that have them; returns process -> bytes."""
    of_file: dict[tuple[str, int], list[int]] = defaultdict(list)
    for pid, found in pages.items():
        for file in found:
            of_file[file].append(pid)
    shares = dict.fromkeys(pages, 0.0)
    for file, pids in of_file.items():
        num_sharers = np.bincount(np.concatenate([pages[pid][file] for pid in pids]))
        for pid in pids:
            shares[pid] += PAGE_BYTES * float((1.0 / num_sharers[pages[pid][file]]).sum())
    return shares


def file_pages(pid: int) -> Pages:
    """Return the pages of files that a process has mapped and that are in memory; none if it has ended."""
    found: dict[tuple[str, int], list[npt.NDArray[np.int64]]] = defaultdict(list)
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
            for words in (line.split(maxsplit=5) for line in lines):
                if words[4] == "0" or words[-1].startswith(SHARED_MEMORY):
                    continue
                start, end = (int(address, 16) // PAGE_BYTES for address in words[0].split("-"))
                entries: npt.NDArray[Any] = np.frombuffer(
                    os.pread(pagemap.fileno(), 8 * (end - start), 8 * start), dtype=np.uint64
                )
                mapped = np.flatnonzero((entries & IN_MEMORY != 0) & (entries & OF_FILE != 0))
                if len(mapped):
                    found[words[3], int(words[4])].append(mapped + int(words[2], 16) // PAGE_BYTES)
    except GONE:
        return {}
    return {file: np.unique(np.concatenate(parts)) for file, parts in found.items()}


def _rollup(pid: int) -> tuple[int, int]:
    """Return a process' PSS, and the pages of files in it; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    except GONE:
        return 0, 0
    found = {words[0]: int(words[1]) * 1024 for words in map(str.split, lines)}
    return found.get("Pss:", 0), found.get("Pss_File:", 0)
