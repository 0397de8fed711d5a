"""`fedsim benchmark` from the command line, in this process, on small runs: tables, going on, failures, tuning."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders import write_tiny_dataset
from fedsim import cli, simulation
from fedsim.benchmark import methods
from fedsim.config import Config
from fedsim.errors import RunError
from runs import SMALL

METHODS = ("local", "mmfede-zero", "mmfede-mean")
Command = Callable[..., int]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Make a recipe of a tiny graph; returns the command on it, in this process."""
    write_tiny_dataset(tmp_path / "tiny")
    settings = SMALL | {"data.path": "tiny", "data.num_clients": 2, "federation.num_rounds": 2}
    recipe = {"title": "tiny", "settings": settings, "rates": ["0.5"], "recipes": {"tiny": {}}}
    recipe["tuning"] = {"num_rounds": 1, "trials": [{"model.dropout": 0.1}, {"model.dropout": 0.2}]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> int:
        methods = [word for name in METHODS for word in ("--method", name)]
        return cli.main(["benchmark", *methods, "--data", "tiny.yaml", "--runtime", "in-process", *args])

    return run


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note which runs are started and which go on; returns the list."""
    calls: list[str] = []
    run, resume = simulation.run, simulation.resume

    def noted_run(config: Config) -> Any:
        calls.append(f"run {_short(Path(str(config.output)))}")
        return run(config)

    def noted_resume(path: Path) -> Any:
        calls.append(f"resume {_short(path)}")
        return resume(path)

    monkeypatch.setattr(simulation, "run", noted_run)
    monkeypatch.setattr(simulation, "resume", noted_resume)
    return calls


def _short(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def _rows(folder: str) -> list[dict[str, str]]:
    with (Path(folder) / "table.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_benchmark_ends_with_its_tables_and_is_not_done_again(
    command: Command, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--rates", "0.5,client", "--seeds", "2", "--output", "out") == 0
    shown = capsys.readouterr().out
    assert "10 runs, 0 of them finished already; folder out" in shown
    assert "10/10" in shown
    assert "tiny: filtered test metrics, 2 seeds" in shown
    assert "Written: table.md, table.csv, table.tex and runs.md in out" in shown
    rows = _rows("out")
    assert len(rows) == 3 * 2 * 2
    for row in rows:
        result = json.loads((Path(row["run"]) / "result.json").read_text())
        assert float(row["test_mrr"]) == result["test"]["mrr"]
        assert row["run"] in (Path("out") / "runs.md").read_text()
        assert not (Path(row["run"]) / "checkpoints").exists()
        assert not (Path(row["run"]) / "models").exists()
    assert (Path("out") / "table.md").read_text().count("| `mmfede-") == 2 * 2  # at a glance, and all metrics
    assert "\\bottomrule" in (Path("out") / "table.tex").read_text()
    first = (Path("out") / "table.csv").read_text()
    assert len(started) == 10
    assert command("--rates", "0.5,client", "--seeds", "2", "--output", "out") == 0
    assert "10 runs, 10 of them finished already" in capsys.readouterr().out
    assert len(started) == 10
    assert (Path("out") / "table.csv").read_text() == first


def test_the_command_of_a_cell_gives_its_numbers_again(command: Command) -> None:
    assert command("--seeds", "1", "--output", "out", "--model.dim", "8", "--keep-models") == 0
    row = _rows("out")[1]
    program, *words = row["command"].split()
    assert program == "fedsim"
    assert cli.main(words) == 0
    again = json.loads((Path(f"{row['run']}-again") / "result.json").read_text())
    assert again["test"]["mrr"] == float(row["test_mrr"])
    assert "dim: 8" in (Path(row["run"]) / "config.yaml").read_text()
    assert cli.main(["evaluate", row["run"]]) == 0


def test_a_failing_run_stops_no_other_and_is_done_again(
    command: Command, started: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noted = simulation.run

    def fail(config: Config) -> Any:
        if config.model.imputer == "mean":
            raise RunError("client 1 failed in round 2")
        if config.federation.strategy == "local":
            raise ZeroDivisionError("of our own")
        return noted(config)

    with monkeypatch.context() as patch:
        patch.setattr(simulation, "run", fail)
        assert command("--seeds", "1", "--output", "out") == 1
    shown = capsys.readouterr()
    assert "mmfede-mean seed0: failed: client 1 failed in round 2" in shown.out
    assert "Missing: tiny/0.5/mmfede-mean/seed0: client 1 failed in round 2" in shown.out
    assert "local seed0: failed: ZeroDivisionError: of our own (traceback in" in shown.out
    assert "Traceback" not in shown.out + shown.err
    assert "ZeroDivisionError" in (Path("out") / "tiny" / "any" / "local" / "seed0.failed.txt").read_text()
    assert [row["status"] for row in _rows("out")] == ["failed", "done", "failed"]
    started.clear()
    assert command("--seeds", "1", "--output", "out") == 0
    assert started == ["run local/seed0", "run mmfede-mean/seed0"]
    assert [row["status"] for row in _rows("out")] == ["done", "done", "done"]
    assert not list(Path("out").rglob("*.failed.txt"))


def test_ctrl_c_says_how_to_go_on_and_the_stopped_run_goes_on(
    command: Command, started: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--seeds", "1", "--output", "whole") == 0
    finish = simulation._finish

    def interrupt(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(simulation, "_finish", interrupt)
        assert command("--seeds", "1", "--output", "out") == 130
    assert "interrupted; the same command goes on in out" in capsys.readouterr().err
    assert simulation._finish is finish
    started.clear()
    assert command("--seeds", "1", "--output", "out") == 0
    assert started == ["resume local/seed0", "run mmfede-zero/seed0", "run mmfede-mean/seed0"]
    assert [row["test_mrr"] for row in _rows("out")] == [row["test_mrr"] for row in _rows("whole")]


def test_a_run_folder_that_was_never_begun_or_belongs_to_another_config(command: Command, started: list[str]) -> None:
    cell = Path("out") / "tiny" / "any" / "local" / "seed0"
    assert command("--seeds", "1", "--output", "out") == 0
    (cell / "result.json").unlink()
    (cell / "metrics.jsonl").unlink()
    started.clear()
    assert command("--seeds", "1", "--output", "out") == 0
    assert started == ["run local/seed0"]
    text = (cell / "config.yaml").read_text()
    (cell / "config.yaml").write_text(text.replace("num_rounds: 2", "num_rounds: 3"))
    assert command("--seeds", "1", "--output", "out") == 1
    assert "was run with another config" in _rows("out")[0]["message"]


def test_more_seeds_are_added_and_fewer_refused(
    command: Command, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--seeds", "1", "--output", "out") == 0
    assert command("--seeds", "2", "--output", "out") == 0
    assert [call for call in started if call.endswith("seed0")] == started[:3]
    assert len(started) == 6
    capsys.readouterr()
    assert command("--seeds", "1", "--output", "out") == 2
    assert "error: " in (error := capsys.readouterr().err)
    assert "holds another benchmark: it has the seeds 1 too" in error


def test_tuning_tries_the_same_on_every_method_and_its_file_is_used(
    command: Command, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--tune", "--method", "mmfed3-zero-none", "--output", "tuning") == 0  # a variant, not tuned itself
    assert len(started) == 3 * 4
    assert "use it with --tuned tuning/tuned.yaml" in capsys.readouterr().out
    chosen = yaml.safe_load((Path("tuning") / "tuned.yaml").read_text())["tiny"]
    assert set(chosen) == set(METHODS)
    for name, settings in chosen.items():
        valid = []
        for trial in range(4):
            (result,) = Path("tuning").glob(f"tiny/*/{name}/trial{trial}-seed100/result.json")
            valid.append(json.loads(result.read_text())["valid_mrr"])
        shared = [{"model.dropout": 0.1}, {"model.dropout": 0.2}]
        best = shared[valid[1] > valid[0]]
        trials = [*shared, *({**best, **own} for own in methods.METHODS[name].trials)]
        assert settings == trials[valid.index(max(valid))]
    assert command("--seeds", "1", "--output", "out", "--tuned", "tuning/tuned.yaml") == 0
    for row in _rows("out"):
        config = yaml.safe_load((Path(row["run"]) / "config.yaml").read_text())
        for path, value in chosen[row["method"]].items():
            section, _, field = path.partition(".")
            assert config[section][field] == value
        assert row["tuned"] == "yes"
    assert "not tuned" not in (Path("out") / "table.md").read_text()
    assert command("--seeds", "1", "--output", "plain") == 0
    assert "† not tuned on this data" in (Path("plain") / "table.md").read_text()


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ([], "give --output"),
        (["--output", "out", "--method", "mmfed3-hid"], "unknown method 'mmfed3-hid'; the nearest is 'mmfed3-hide'"),
        (["--output", "out", "--group", "d"], "unknown group 'd'"),
        (["--output", "out", "--data", "fb15k237"], "unknown recipe 'fb15k237'; the nearest is 'fb15k237-"),
        (["--output", "out", "--data", "mkgw-3"], "fedsim data import DOWNLOAD/MKG-W $FEDSIM_DATA/MKG-W"),
        (["--output", "out", "--rates", "0.3,1.5"], "missing rate '1.5'"),
        (["--output", "out", "--seeds", "0"], "--seeds"),
        (["--output", "out", "--rounds", "0"], "--rounds"),
        (["--output", "out", "--gpus-per-run", "2"], "--gpus-per-run"),
        (["--output", "out", "--tuned", "nowhere.yaml"], "tuned values nowhere.yaml cannot be read"),
        (["--output", "out", "--tune", "--rates", "0.5"], "leave --rates out"),
        (["--output", "out", "--tune", "--seeds", "3"], "leave --seeds out"),
        (
            ["--output", "out", "--tune", "--model.dropout", "0.2"],
            "--model.dropout is what the trials of local on wn_noto",
        ),
        (
            ["--output", "out", "--tune", "--method", "mmfed3-zero-none"],
            "mmfed3-zero-none runs with what is tuned for mmfed3-zero",
        ),
        (["--output", "out", "--tune", "--tuned", "no/such.yaml"], "tuned values no/such.yaml: there is no folder"),
        (["--output", "out", "--tune", "--tuned", "full/thesis.tex"], "full/thesis.tex: the file must hold recipes"),
        (["--output", "out", "--tuned", "numbers.yaml"], "unknown method '3'"),
        (["--output", "out", "--tuned", "other.yaml"], "for these methods on wn_noto, only what is tuned for wn_nto"),
        (["--output", "out", "--method", "nope"], "unknown method 'nope'; fedsim benchmark --list shows all"),
        (["--output", "out", "--model.imputer", "mean"], "--model.imputer is what the benchmark varies"),
        (["--output", "out", "--model.scorer", "convx"], "'convx': unknown name"),
        (["--output", "out", "--seed", "3"], "No such option"),
        (["--output", "full"], "holds files but no benchmark"),
    ],
)
def test_what_a_user_gets_wrong_is_one_message_and_exit_code_2(
    args: list[str],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("[a chapter]")
    (tmp_path / "numbers.yaml").write_text("wn_noto: {3: {model.dropout: 0.4}}")
    (tmp_path / "other.yaml").write_text("wn_nto: {fede: {model.dropout: 0.4}}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    assert cli.main(["benchmark", "--runtime", "in-process", *args]) == 2
    shown = capsys.readouterr()
    assert part in " ".join(shown.err.split())
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("option", [("--model.dropout", "0.3"), ("--model.scorer", "distmult")])
def test_an_option_that_changes_the_task_of_tuned_values_is_marked(command: Command, option: tuple[str, str]) -> None:
    Path("tuned.yaml").write_text(yaml.safe_dump({"tiny": {name: {"model.dropout": 0.1} for name in METHODS}}))
    assert command("--seeds", "1", "--output", "out", "--tuned", "tuned.yaml", *option) == 0
    assert {row["tuned"] for row in _rows("out")} == {"no"}
    assert "† not tuned on this data" in (Path("out") / "table.md").read_text()


def test_runs_of_several_commits_are_named_in_the_table(command: Command) -> None:
    """Code that changed between two calls makes methods that do not compare."""
    assert command("--seeds", "1", "--output", "out") == 0
    assert "SEVERAL" not in (Path("out") / "table.md").read_text()
    one, other, *_ = sorted(Path("out").glob("tiny/*/*/*/versions.json"))
    for file, commit in ((one, "a" * 40), (other, "b" * 40 + "-dirty")):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"git_commit": commit}))
    assert command("--seeds", "1", "--output", "out") == 0
    footer = (Path("out") / "table.md").read_text()
    assert "at SEVERAL commits, so methods may not compare" in footer
    assert "aaaaaaaaaaaa, " in footer
    assert "bbbbbbbbbbbb with changes" in footer


def test_the_lists_name_methods_groups_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["benchmark", "--list"]) == 0
    shown = capsys.readouterr().out
    for name in ("references", "mmfed3-hide", "fb15k237-fede10", "MoSE", "7 x 6 rounds", "3 x 6", "3 x 3 rounds"):
        assert name in shown
