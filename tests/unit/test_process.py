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
for _ in range(2):
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
