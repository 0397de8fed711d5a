"""What a person sees of runs, benchmarks and sweeps: the console, and `report.html`.

The functions here import what they need when they are called: neither a run's start nor its actors pay for them.
"""

from pathlib import Path

REPORT = "report.html"

__all__ = ["REPORT", "write_benchmark_report", "write_report", "write_run_report", "write_sweep_report"]


def write_run_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of a run, finished or not; returns its file, by default FOLDER/report.html.

    Raises:
        RunError: if the folder is not a run, or the file cannot be written.
    """
    from fedsim.report.html_page import write_page
    from fedsim.report.html_run import run_page

    return write_page(run_page(folder), output or folder / REPORT)


def write_benchmark_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of a benchmark, finished or not; returns its file, by default FOLDER/report.html.

    Raises:
        RunError: if the folder is not a benchmark, or the file cannot be written.
    """
    from fedsim.report.html_benchmark import benchmark_page
    from fedsim.report.html_page import write_page

    target = output or folder / REPORT
    return write_page(benchmark_page(folder, target), target)


def write_sweep_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of a sweep, finished or not; returns its file, by default FOLDER/report.html.

    Raises:
        RunError: if the folder is not a sweep, or the file cannot be written.
    """
    from fedsim.report.html_page import write_page
    from fedsim.report.html_sweep import sweep_page

    target = output or folder / REPORT
    return write_page(sweep_page(folder, target), target)


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of whatever the folder holds: a sweep, a benchmark or a run.

    Raises:
        RunError: if it is none of them, or the file cannot be written.
    """
    if (folder / "sweep.json").is_file():
        return write_sweep_report(folder, output)
    if (folder / "benchmark.json").is_file():
        return write_benchmark_report(folder, output)
    return write_run_report(folder, output)
