"""A benchmark as Ray tasks: the numbers of one process, a worker that dies, a benchmark that is killed and goes on."""

import csv
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.benchmark import run_on_ray
from builders import write_tiny_dataset
from fedsim import cli
from fedsim.benchmark.execution import Outcome, run_in_process
from fedsim.benchmark.methods import METHODS
from fedsim.benchmark.plan import Plan, parse_missing
from fedsim.benchmark.recipes import Recipe, TuningBudget
from fedsim.benchmark.tuned import Tuned
from fedsim.errors import RunError
from processes import descendants, end, fedsim, wait_until
from runs import SMALL, num_rounds_done

NUM_ROUNDS = 12


def _plan(output: Path, data: Path) -> Plan:
    settings = SMALL | {"data.path": str(data), "data.num_clients": 2, "federation.num_rounds": 2}
    recipe = Recipe("tiny", "tiny", "tiny", "", settings, ("0.5",), TuningBudget())
    methods = [METHODS[name] for name in ("local", "mmfede-mean")]
    return Plan(output, [recipe], methods, {"tiny": [parse_missing("0.5")]}, 2, Tuned({}), {})


def _test_metrics(outcomes: list[Outcome], output: Path) -> dict[str, Any]:
    return {
        outcome.folder.relative_to(output).as_posix(): outcome.result["test"] if outcome.result else outcome.error
        for outcome in outcomes
    }


class _Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_give_the_numbers_of_one_process_and_a_dead_worker_stops_no_other(tmp_path: Path) -> None:
    write_tiny_dataset(tmp_path / "tiny")
    here, there = tmp_path / "here", tmp_path / "there"
    expected = _test_metrics(list(run_in_process(_plan(here, tmp_path / "tiny").cells(), keep_models=False)), here)
    cells = _plan(there, tmp_path / "tiny").cells()
    deadly: Any = _Deadly()
    cells[1] = replace(cells[1], recipe=deadly)
    found = _test_metrics(list(run_on_ray(cells, keep_models=False)), there)
    failed = found.pop(cells[1].folder.relative_to(there).as_posix())
    assert failed.startswith("its Ray task ended: ")
    assert found == {name: metrics for name, metrics in expected.items() if name in found}
    assert len(found) == 3


@pytest.mark.usefixtures("ray_cluster")
def test_runs_that_the_cluster_has_no_room_for_are_refused(tmp_path: Path) -> None:
    write_tiny_dataset(tmp_path / "tiny")
    cells = _plan(tmp_path / "out", tmp_path / "tiny").cells()
    with pytest.raises(RunError, match="no node of the Ray cluster has 1 CPUs and 0.5 GPUs for a run"):
        list(run_on_ray(cells, keep_models=False, gpus_per_run=0.5))


@pytest.mark.usefixtures("ray_cluster")
def test_runs_that_take_too_long_are_ended_and_said(tmp_path: Path) -> None:
    write_tiny_dataset(tmp_path / "tiny")
    cells = _plan(tmp_path / "out", tmp_path / "tiny").cells()
    outcomes = list(run_on_ray(cells, keep_models=False, hours_per_run=1e-9))
    assert {outcome.folder for outcome in outcomes} == {cell.folder for cell in cells}
    assert {outcome.error for outcome in outcomes} == {
        "not done after 1e-09 hours; raise --hours-per-run to let it go on"
    }


def test_a_killed_benchmark_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_dataset(tmp_path / "tiny")
    settings = SMALL | {"data.path": "tiny", "data.num_clients": 2, "federation.num_rounds": NUM_ROUNDS}
    recipe = {"title": "tiny", "settings": settings, "rates": ["0.5"], "recipes": {"tiny": {}}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    options = ["benchmark", "--data", "tiny.yaml", "--method", "local", "--method", "mmfede-mean", "--seeds", "2"]
    cells = [tmp_path / "out" / "tiny" / name / f"seed{k}" for k in (0, 1) for name in ("any/local", "0.5/mmfede-mean")]

    def in_the_middle() -> bool:
        finished = [cell for cell in cells if (cell / "result.json").is_file()]
        begun = [cell for cell in cells if cell not in finished and num_rounds_done(cell) >= 2]
        return bool(finished and begun)

    with fedsim(*options, "--output", "out", cwd=tmp_path) as process:
        assert wait_until(lambda: in_the_middle() or process.poll() is not None)
        left = descendants(process.pid)
        process.kill()
        output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    end(left)
    finished = {cell: (cell / "result.json").read_bytes() for cell in cells if (cell / "result.json").is_file()}
    assert 0 < len(finished) < len(cells)

    with fedsim(*options, "--output", "out", cwd=tmp_path) as process:
        output, _ = process.communicate(timeout=290)
    assert process.returncode == 0, output
    assert f"4 runs, {len(finished)} of them finished already" in output
    assert {cell: (cell / "result.json").read_bytes() for cell in finished} == finished
    monkeypatch.chdir(tmp_path)
    assert cli.main([*options, "--runtime", "in-process", "--output", "unbroken"]) == 0
    assert _mrrs("out") == _mrrs("unbroken")


def _mrrs(folder: str) -> list[tuple[str, str, str]]:
    with (Path(folder) / "table.csv").open() as file:
        return [(row["method"], row["seed"], row["test_mrr"]) for row in csv.DictReader(file)]
