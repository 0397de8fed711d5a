"""Runs that are killed or interrupted in mid-round, and what `fedsim resume` makes of them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import kill_points
from builders import write_tiny_dataset
from fedsim import cli, simulation
from kill_points import POINTS
from processes import alive, descendants, end, fedsim, titles, wait_until
from runs import num_rounds_done, outcome, small_config, small_options

NUM_ROUNDS = 40
KINDS = ("in_process", "ray")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def unbroken(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Run to the end without a break, in this process."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    simulation.run(small_config(dataset, folder, NUM_ROUNDS))
    return outcome(folder)


def _options(dataset: Path, kind: str) -> list[str]:
    return [*small_options(dataset, Path("run"), NUM_ROUNDS), f"--runtime.kind={kind}"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_to_the_bits_of_an_unbroken_one(
    kind: str, dataset: Path, unbroken: dict[str, object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with fedsim("run", *_options(dataset, kind), cwd=tmp_path) as process:
        assert wait_until(lambda: num_rounds_done(run) >= 2 or process.poll() is not None)
        started = titles(descendants(process.pid))
        process.kill()
        output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    assert not (run / "result.json").exists()
    actors = [pid for pid, title in started.items() if "Actor" in title]
    assert len(actors) == (4 if kind == "ray" else 0)
    assert wait_until(lambda: not any(alive(pid) for pid in actors)), "actors are left"
    end(started)  # Ray's own agents notice only after a minute that their node is gone

    with fedsim("resume", "run", cwd=tmp_path) as process:
        output, _ = process.communicate(timeout=290)
    assert process.returncode == 0, output
    assert "Test, filtered" in output
    assert outcome(run) == unbroken


def test_ctrl_c_on_ray_leaves_no_process_and_the_run_can_go_on(
    dataset: Path, unbroken: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with fedsim("run", *_options(dataset, "ray"), cwd=tmp_path) as process:
        assert wait_until(lambda: num_rounds_done(run) >= 2 or process.poll() is not None)
        started = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output, _ = process.communicate(timeout=290)
    assert process.returncode == 130, output
    assert output.splitlines()[-1] == "interrupted; continue with: fedsim resume run"
    assert "Traceback" not in output
    assert wait_until(lambda: not any(alive(pid) for pid in started)), "processes are left"
    assert not list(run.rglob("*.tmp*"))

    # Where a run goes on makes no difference to its numbers.
    monkeypatch.chdir(tmp_path)
    simulation.resume(run)
    assert outcome(run) == unbroken
    assert cli.main(["resume", "run"]) == 2


def test_ctrl_c_while_ray_starts_leaves_no_process(dataset: Path, tmp_path: Path) -> None:
    with fedsim("run", *_options(dataset, "ray"), cwd=tmp_path) as process:
        assert wait_until(lambda: len(descendants(process.pid)) >= 4 or process.poll() is not None)
        started = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=290)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert wait_until(lambda: not any(alive(pid) for pid in started)), "processes are left"
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def killed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kill a run of three rounds at each point of its second one."""
    folder = tmp_path_factory.mktemp("points")
    program = Path(kill_points.__file__)
    paths = os.pathsep.join([str(program.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(program), str(dataset), str(folder)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict.fromkeys(POINTS, -signal.SIGKILL)
    return folder


@pytest.fixture(scope="module")
def unbroken_three(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("unbroken") / "three"
    simulation.run(small_config(dataset, folder))
    return outcome(folder)


@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_at_any_point_of_a_round_resumes_to_the_same_bits(
    point: str, killed: Path, unbroken_three: dict[str, object]
) -> None:
    run = killed / point
    whole = [path.name for path in sorted((run / "checkpoints").glob("round-*"))]
    assert whole == ["round-00001"]
    assert bool(list((run / "checkpoints").glob(".*"))) == (point == "during the checkpoint")
    simulation.resume(run)
    assert outcome(run) == unbroken_three
    assert not list(run.rglob("*.tmp*"))
