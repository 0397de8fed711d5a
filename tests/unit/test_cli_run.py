"""`fedsim run`, `resume`, `evaluate` and `predict` around a stand-in for the simulation: output, logs, exit codes."""

import errno
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import fedsim
from fedsim import cli, simulation
from fedsim.config import Config, dump_config, make_config
from fedsim.errors import RunError
from fedsim.evaluation.ranking import RankingMetrics
from fedsim.report.console import ConsoleObserver, format_bytes, show_result
from fedsim.results import ClientResult, Observer, RoundSummary, RunInfo, RunResult

METRICS = RankingMetrics(mrr=0.25, hits={1: 0.125, 3: 0.5, 10: 0.75}, num_queries=1200)


def _result(folder: Path) -> RunResult:
    clients = [ClientResult(client=c, test=METRICS, valid_mrr=0.3, combination=0.5) for c in range(3)]
    return RunResult(
        folder=folder,
        best_round=2,
        num_rounds_to_95=1,
        valid_mrr=0.375,
        test=METRICS,
        clients=clients,
        seconds={"train": 3.0, "evaluate": 1.5},
        bytes_up=1500,
        bytes_down=2_000_000,
        imputation={"image, HidE": {"cosine": 0.5}, "image, mean": {"cosine": float("nan")}},
        consistency={"image": 0.875},
    )


def _info(folder: Path, start_round: int = 1) -> RunInfo:
    return RunInfo(
        folder=folder,
        config=make_config({}, {"report.html": False}),
        placement=["3 client actors, dedicated", "3 fit into 2 CPUs at 0.5 each"],
        num_rounds=2,
        start_round=start_round,
        clients=[(client, 2000, 9, 5000, 300, 301) for client in range(3)],
    )


def _summary(round_num: int, valid_mrr: float | None) -> RoundSummary:
    return RoundSummary(
        round_num=round_num,
        loss=4.5 / round_num,
        valid_mrr=valid_mrr,
        best_mrr=valid_mrr,
        seconds={"train": 1.0, "evaluate": 0.5},
        bytes_up=10,
        bytes_down=20_000,
    )


class FakeSimulation:
    """Shows two rounds to the observer, then does what `end` does."""

    def __init__(self, folder: Path, end: Callable[[], None]) -> None:
        self.folder = folder
        self.end = end
        self.config: Config | None = None

    def run(self, config: Config, runtime_factory: object, observer: Observer) -> RunResult:
        self.config = config
        return self._play(observer, 1)

    def resume(self, folder: Path, runtime_factory: object, observer: Observer) -> RunResult:
        assert folder == self.folder
        return self._play(observer, 2)

    def _play(self, observer: Observer, start_round: int) -> RunResult:
        self.folder.mkdir(exist_ok=True)
        observer.run_started(_info(self.folder, start_round))
        for round_num in range(start_round, 3):
            observer.round_started(round_num)
            observer.round_finished(_summary(round_num, 0.125 * round_num))
        self.end()
        return _result(self.folder)


@pytest.fixture(autouse=True)
def _keep_log_handlers() -> Iterator[None]:
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
        handler.close()
    logging.captureWarnings(False)


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., FakeSimulation]:
    def install(end: Callable[[], None] = lambda: None) -> FakeSimulation:
        fake = FakeSimulation(tmp_path / "run", end)
        monkeypatch.setattr(simulation, "run", fake.run)
        monkeypatch.setattr(simulation, "resume", fake.resume)
        monkeypatch.setattr(simulation, "evaluate", _result)
        monkeypatch.setattr(cli, "_runtime_factory", lambda config: None)
        return fake

    return install


def _raise(error: BaseException) -> Callable[[], None]:
    def end() -> None:
        raise error

    return end


def test_run_shows_clients_placement_rounds_and_results(
    simulate: Callable[..., FakeSimulation], capsys: pytest.CaptureFixture[str]
) -> None:
    fake = simulate()
    assert cli.main(["run", "--federation.num_rounds", "2"]) == 0
    assert fake.config == make_config({"federation": {"num_rounds": 2}})
    shown = capsys.readouterr().out
    assert "3 client actors, dedicated" in shown
    assert "round 1/2  loss 4.5000  valid MRR 0.1250  best 0.1250  1.5 s  up 10 B  down 20.0 kB" in shown
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "client queries MRR Hits@1 Hits@3 Hits@10 valid MRR combination" in lines
    assert "weighted 1,200 0.2500 0.1250 0.5000 0.7500 0.3750" in lines
    assert "2 1,200 0.2500 0.1250 0.5000 0.7500 0.3000 0.50" in lines
    assert "image, mean -" in lines
    assert "together 4.5" in lines
    assert "Bytes: 1.5 kB up, 2.0 MB down" in lines
    log = (fake.folder / "run.log").read_text()
    assert "round 2: loss 2.2500, valid MRR 0.2500; train 1.00 s, evaluate 0.50 s" in log
    assert "finished; test MRR 0.2500 with the models of round 2" in log
    assert max(map(len, shown.splitlines())) < 160


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; continue with: fedsim resume {folder}"),
        (RunError("client 1 failed in round 2"), 2, "error: client 1 failed in round 2"),
        (OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"), 2, "metrics.jsonl: no space left"),
        (PermissionError(errno.EACCES, "Permission denied", "metrics.jsonl"), 2, "metrics.jsonl: Permission denied"),
    ],
)
def test_what_stops_a_run_is_one_message_and_is_kept_in_its_log(
    error: BaseException,
    code: int,
    message: str,
    simulate: Callable[..., FakeSimulation],
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = simulate(_raise(error))
    assert cli.main(["run"]) == code
    shown = capsys.readouterr().err
    assert message.format(folder=fake.folder) in shown
    assert "Traceback" not in shown
    log = (fake.folder / "run.log").read_text()
    assert ("interrupted" in log) if code == 130 else ("Traceback" in log and str(error) in log)


def test_a_defect_of_our_own_keeps_its_traceback(simulate: Callable[..., FakeSimulation]) -> None:
    simulate(_raise(AssertionError("broken invariant")))
    with pytest.raises(AssertionError, match="broken invariant"):
        cli.main(["run"])


def test_warnings_go_to_stderr_and_to_the_log(
    simulate: Callable[..., FakeSimulation], capsys: pytest.CaptureFixture[str]
) -> None:
    fake = simulate(lambda: logging.getLogger("fedsim.data").warning("7 triples moved"))
    assert cli.main(["run"]) == 0
    assert capsys.readouterr().err == "warning: 7 triples moved\n"
    assert "WARNING fedsim.data: 7 triples moved" in (fake.folder / "run.log").read_text()


def test_resume_and_evaluate_take_a_run_folder(
    simulate: Callable[..., FakeSimulation], capsys: pytest.CaptureFixture[str]
) -> None:
    fake = simulate()
    fake.folder.mkdir()
    (fake.folder / "config.yaml").write_text(dump_config(make_config()))
    assert cli.main(["resume", str(fake.folder)]) == 0
    assert "continuing with round 2 of 2" in capsys.readouterr().out
    assert cli.main(["evaluate", str(fake.folder)]) == 0
    assert "weighted" in capsys.readouterr().out


def test_predict_asks_for_tails_or_heads(
    simulate: Callable[..., FakeSimulation], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = simulate().folder
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(make_config()))
    asked = []

    def predict(*question: Any) -> Any:
        asked.append(question)
        return [SimpleNamespace(label="drum [x]", key="n1", score=-1.25, known=True)]

    prediction = ModuleType("fedsim.prediction")
    prediction.predict = predict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fedsim.prediction", prediction)
    monkeypatch.setattr(fedsim, "prediction", prediction, raising=False)
    assert cli.main(["predict", str(folder), "--client", "2", "--head", "guitar", "--relation", "hypernym"]) == 0
    assert cli.main(["predict", str(folder), "--tail", "guitar", "--relation", "hypernym", "--top", "3"]) == 0
    assert asked == [
        (folder, 2, "guitar", "hypernym", "tail", 10),
        (folder, 0, "guitar", "hypernym", "head", 3),
    ]
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "1 drum [x] n1 -1.250 yes" in lines
    assert "client 0 answers (?, hypernym, guitar)" in lines


def test_a_terminal_gets_a_bar_instead_of_lines(tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w+") as screen:
        console = Console(file=screen, force_terminal=True, width=100)
        observer = ConsoleObserver(console)
        observer.run_started(_info(tmp_path))
        observer.round_finished(_summary(1, None))
        observer.message("client 1 restarted [x]")
        observer.close()
        observer.close()
        show_result(_result(tmp_path), console)
        screen.seek(0)
        shown = screen.read()
    assert "loss 4.5000  valid MRR -" in shown
    assert "up 10 B" not in shown
    assert "client 1 restarted [x]" in shown


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_000_000, "2.0 MB"), (5e12, "5.0 TB")]
)
def test_sizes_have_units(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text
