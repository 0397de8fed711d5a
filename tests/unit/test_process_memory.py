"""How the benchmarks count memory: a page of a file once, whoever else has it."""

import importlib.util
import mmap
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of the pages of a process")

ROOT = Path(__file__).parents[2]
NUM_PAGES = 512
# Maps the pages of a file from a first one on, and reads them.
HOLDER = """
import mmap, sys
start = int(sys.argv[2]) * mmap.PAGESIZE
with open(sys.argv[1], "rb") as file:
    pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, offset=start)
sum(pages[at] for at in range(0, len(pages), mmap.PAGESIZE))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def process_memory() -> ModuleType:
    spec = importlib.util.spec_from_file_location("process_memory", ROOT / "benchmarks/process_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["process_memory"] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


@contextmanager
def holder(file: Path, first_page: int = 0) -> Iterator[int]:
    """Run a process that has the pages of a file from a first one on; yields its process id."""
    command = [sys.executable, "-c", HOLDER, str(file), str(first_page)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.pid
        process.communicate()


def test_pages_of_a_file_count_once_and_strangers_do_not_matter(process_memory: ModuleType, tmp_path: Path) -> None:
    """A has pages 0 to 511, B 256 to 511, a stranger all: A holds 256 + 256 / 2 = 384 pages, B 128, together 512."""
    file = tmp_path / "pages"
    file.write_bytes(bytes(NUM_PAGES * mmap.PAGESIZE))
    inode = file.stat().st_ino
    with holder(file) as a, holder(file, NUM_PAGES // 2) as b, holder(file):
        found = {pid: process_memory.file_pages(pid) for pid in (a, b)}
    of_file = {pid: {key: numbers for key, numbers in pages.items() if key[1] == inode} for pid, pages in found.items()}
    assert [sum(map(len, of_file[pid].values())) for pid in (a, b)] == [NUM_PAGES, NUM_PAGES // 2]
    shares = process_memory.divide(of_file)
    assert [shares[a] / mmap.PAGESIZE, shares[b] / mmap.PAGESIZE] == pytest.approx([384, 128])


def test_pages_of_two_mappings_count_once(process_memory: ModuleType) -> None:
    """Of pages 3 and 4 of a file and 3 of another, shared by two and one: 1/2 + 1/2 + 1 and 1/2 + 1/2 pages."""
    one, other = ("08:01", 7), ("08:01", 8)
    pages = {1: {one: np.array([3, 4]), other: np.array([3])}, 2: {one: np.array([3, 4])}}
    assert process_memory.divide(pages) == {1: 2.0 * mmap.PAGESIZE, 2: 1.0 * mmap.PAGESIZE}


def test_memory_of_a_process(process_memory: ModuleType, tmp_path: Path) -> None:
    """What it holds is at least the pages that it alone has, and no less than its part by Linux's count."""
    file = tmp_path / "pages"
    file.write_bytes(bytes(NUM_PAGES * mmap.PAGESIZE))
    with holder(file) as pid:
        held = process_memory.measure([pid])[pid]
        alone = process_memory.measure([pid], files=False)[pid]
    assert held.own_bytes > 2e6  # an interpreter
    assert held.file_bytes > NUM_PAGES * mmap.PAGESIZE
    assert held.own_bytes + held.file_bytes >= held.pss_bytes
    assert alone.file_bytes == 0


def test_a_process_that_has_ended_holds_nothing(process_memory: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "pages"
    file.write_bytes(bytes(mmap.PAGESIZE))
    with holder(file) as pid:
        pass
    assert process_memory.measure([pid])[pid] == process_memory.Held()
