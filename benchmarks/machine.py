"""The machine and the versions behind a benchmark's numbers."""

import os
import platform

from fedsim.run_folder import versions


def describe_machine() -> str:
    """Say in two lines what the benchmark runs on."""
    found = versions()
    packages = ", ".join(f"{name} {found['packages'][name]}" for name in ("fedsim", "torch", "numpy"))
    commit = str(found["git_commit"] or "no commit")
    return (
        f"{platform.machine()} {platform.system()}, {os.cpu_count()} CPUs\n"
        f"Python {found['python']}, {packages}, commit {commit[:12]}{'-dirty' if commit.endswith('-dirty') else ''}"
    )
