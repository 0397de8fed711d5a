"""A sweep that is killed: `fedsim tune` with ASHA, SIGKILL in the middle, `--resume`, and the best config run again.

    python benchmarks/sweep.py --folder runs/sweep --output runs/sweep.md
    python benchmarks/sweep.py --folder runs/quick --trials 4 --rounds 2 --kill-after 1

The space is `overview`: diffusion steps x logit weight x feature weight x 3, 5 or 10 clients on wn_noto. It fails
unless the killed sweep ends with every trial, those that had ended before the kill untouched, and `fedsim run` of its
best.yaml gives the validation MRR of the sweep to the last bit.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
from process_tree import ProcessTree
from tables import Sheet

POLL_SECONDS = 0.5
MINUTES = 30.0  # the target for the whole sweep
ENDED = ("finished", "stopped", "failed")


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="Folder of the sweep; must not exist.")
@click.option("--output", type=click.Path(path_type=Path), help="Markdown file.")
@click.option("--trials", default=16, show_default=True)
@click.option("--rounds", default=9, show_default=True, help="Rounds of a trial that is not stopped early.")
@click.option("--kill-after", default=5, show_default=True, help="Trials that have ended when the sweep is killed.")
@click.option("--space", default="overview", show_default=True)
@click.option("--scheduler", default="asha", show_default=True)
def main(
    folder: Path, output: Path | None, trials: int, rounds: int, kill_after: int, space: str, scheduler: str
) -> None:
    """Run, kill, resume, and run the best again."""
    sheet = Sheet("A sweep that is killed", output)
    options = [space, "--output", str(folder), "--trials", str(trials), "--scheduler", scheduler]
    options += [f"--federation.num_rounds={rounds}", "--runtime.dashboard=false"]
    first = run_and_kill(["tune", *options], folder, kill_after, sheet)
    before = results(folder)
    sheet.progress(f"killed after {first:.0f} s with {len(before)} trials ended")
    second = run(["tune", "--resume", str(folder)])
    sweep = read(folder)
    after = results(folder)
    again = folder / "again"
    third = run(["run", str(folder / "best.yaml"), "--output", str(again)])
    mrr = json.loads((again / "result.json").read_text())["valid_mrr"]
    best = next(trial for trial in sweep["trials"] if trial["id"] == sweep["best"])
    rows = [
        [trial["id"], trial["status"], str(trial["rounds"]), number(trial["valid_mrr"]), f"{trial['seconds']:.0f}"]
        + [str(value) for value in trial["params"].values()]
        for trial in sorted(sweep["trials"], key=lambda trial: -(trial["valid_mrr"] or 0))
    ]
    sheet.table("Trials", ["trial", "status", "rounds", "valid MRR", "seconds", *sweep["space"]], rows)
    minutes = (first + second) / 60
    seconds = [f"{name} {value / 60:.1f} min" for name, value in (("until the kill", first), ("resumed", second))]
    sheet.say(f"Sweep: {', '.join(seconds)}; best config again: {third / 60:.1f} min.")
    statuses = [trial["status"] for trial in sweep["trials"]]
    untouched = all(after.get(path) == text for path, text in before.items())
    sheet.verdicts(
        [
            ("minutes of the sweep", f"<= {MINUTES:g}", f"{minutes:.1f}", minutes <= MINUTES),
            (
                "trials that ended well",
                str(trials),
                str(len(statuses) - statuses.count("failed")),
                "failed" not in statuses,
            ),
            ("trials that ended before the kill, untouched", "all", str(len(before)), untouched and len(before) > 0),
            ("validation MRR of best.yaml", repr(best["valid_mrr"]), repr(mrr), mrr == best["valid_mrr"]),
        ]
    )
    sheet.close()
    if mrr != best["valid_mrr"] or "failed" in statuses or len(statuses) != trials or not untouched:
        sys.exit(1)


def run_and_kill(command: list[str], folder: Path, kill_after: int, sheet: Sheet) -> float:
    """Run a command, and kill it once so many trials have ended; returns its seconds."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "fedsim.cli", *command])
    tree = ProcessTree(process.pid)
    num_ended = 0
    while process.poll() is None and num_ended < kill_after:
        time.sleep(POLL_SECONDS)
        found = sum(trial["status"] in ENDED for trial in read(folder)["trials"])
        if found > num_ended:
            num_ended = found
            sheet.progress(f"{time.monotonic() - started:5.0f} s: {num_ended} trials ended")
    if process.poll() is not None:
        raise click.ClickException("the sweep ended before it could be killed; lower --kill-after")
    tree.refresh()
    process.send_signal(signal.SIGKILL)
    process.wait()
    seconds = time.monotonic() - started
    time.sleep(5)  # Ray's processes end by themselves; its agents would wait for a minute
    tree.end()
    return seconds


def run(command: list[str]) -> float:
    """Run a command to its end; returns its seconds."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "fedsim.cli", *command], check=False)
    if done.returncode != 0:
        raise click.ClickException(f"fedsim {' '.join(command)} ended with {done.returncode}")
    return time.monotonic() - started


def read(folder: Path) -> dict[str, Any]:
    """Read sweep.json; no trials before it is there."""
    path = folder / "sweep.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"trials": []}
    return found


def results(folder: Path) -> dict[str, str]:
    """Read the metrics of the trials that ended."""
    ended = [trial["folder"] for trial in read(folder)["trials"] if trial["status"] in ENDED]
    return {name: (folder / name / "metrics.jsonl").read_text() for name in ended}


def number(value: float | None) -> str:
    """Write an MRR."""
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
