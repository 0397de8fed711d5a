"""Event files for TensorBoard: what is in them, what a resumed run does to them, and what goes wrong."""

import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from builders import write_tiny_dataset
from fedsim import cli, simulation
from fedsim.report.tensorboard import EventFile, scalars
from fedsim.results import RoundSummary, SilentObserver
from fedsim.run_folder import RunFolder
from runs import small_config

ROUND = {
    "round": 4,
    "client": None,
    "bytes_up": 1500,
    "bytes_down": 3000,
    "phase_seconds": {"train": 2.0, "evaluate": 0.5},
    "server_losses": {"features": 0.25},
    "loss": 6.5,
    "num_trained": 2,
    "unix_seconds": 1_000_000.5,
    "valid": {"mrr": 0.5, "hits_at_10": 0.75, "num_queries": 80},
    "imputation": {"image/diffusion": {"cosine": 0.5, "hits_at_10": 0.25}},
    "consistency": {"global/total": 0.875},
}
CLIENT = {"round": 4, "client": 7, "losses": {"total": 6.0, "kgc": 5.0}, "seconds": 1.5, "valid": {"mrr": 0.25}}


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


class Killer(SilentObserver):
    def __init__(self, after: int) -> None:
        self.after = after

    def round_finished(self, summary: RoundSummary) -> None:
        if summary.round_num == self.after:
            raise Killed


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


def _events(run_folder: Path) -> list[Event]:
    """Read all event files of a run, each record with its two checksums, as TensorBoard does."""
    found = []
    for path in sorted((run_folder / "tensorboard").iterdir()):
        assert "tfevents" in path.name, "TensorBoard looks for this word"
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            header, body = data[:8], data[12 : 12 + length]
            assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(header)
            assert struct.unpack("<I", data[12 + length : 16 + length])[0] == masked_crc32c(body)
            found.append(Event.FromString(body))
            data = data[16 + length :]
    return found


def _points(run_folder: Path) -> list[tuple[str, int, float]]:
    return [
        (value.tag, event.step, value.simple_value) for event in _events(run_folder) for value in event.summary.value
    ]


def test_scalars_of_a_round() -> None:
    """Every number of the row but its counts, under a tag whose first part names its group."""
    assert dict(scalars(ROUND)) == {
        "round/loss": 6.5,
        "valid/mrr": 0.5,
        "valid/hits_at_10": 0.75,
        "seconds/train": 2.0,
        "seconds/evaluate": 0.5,
        "bytes/up": 1500,
        "bytes/down": 3000,
        "server_loss/features": 0.25,
        "imputation/image/diffusion/cosine": 0.5,
        "imputation/image/diffusion/hits_at_10": 0.25,
        "consistency/global/total": 0.875,
    }


def test_scalars_of_a_client_and_of_rounds_without_validation_or_clients() -> None:
    assert dict(scalars(CLIENT)) == {
        "client_00007/loss": 6.0,
        "client_00007/train_seconds": 1.5,
        "client_00007/valid_mrr": 0.25,
    }
    skipped = {name: value for name, value in ROUND.items() if name not in ("valid", "imputation", "consistency")}
    assert dict(scalars(skipped | {"loss": None, "phase_seconds": {}, "server_losses": {}})) == {
        "bytes/up": 1500,
        "bytes/down": 3000,
    }


def test_a_file_begins_as_tensorboard_wants_and_keeps_the_time_of_each_round(tmp_path: Path) -> None:
    with EventFile(tmp_path) as events:
        events.add([CLIENT, ROUND])
    first, start, client, total = _events(tmp_path)
    assert first.file_version == "brain.Event:2"
    assert start.session_log.status == start.session_log.START
    assert (client.step, client.wall_time) == (4, 1_000_000.5)
    assert (total.step, total.wall_time) == (4, 1_000_000.5)


def test_clients_are_left_out_if_asked(tmp_path: Path) -> None:
    with EventFile(tmp_path, [CLIENT, ROUND], per_client=False):
        pass
    assert {tag for tag, _, _ in _points(tmp_path)} == dict(scalars(ROUND)).keys()


def test_opening_again_replaces_what_is_there(tmp_path: Path) -> None:
    with EventFile(tmp_path, [ROUND, ROUND | {"round": 5}]):
        pass
    with EventFile(tmp_path, [ROUND]) as events:
        events.add([ROUND | {"round": 5}])
    steps = [step for tag, step, _ in _points(tmp_path) if tag == "valid/mrr"]
    assert steps == [4, 5]


def test_a_run_writes_its_metrics(dataset: Path, tmp_path: Path) -> None:
    config = small_config(dataset, tmp_path / "run", watching__tensorboard=True, evaluation__measure_every=2)
    simulation.run(config)
    rows = RunFolder(tmp_path / "run").read_metrics()
    expected = [(tag, row["round"], pytest.approx(value)) for row in rows for tag, value in scalars(row)]
    found = _points(tmp_path / "run")
    assert found == expected
    assert {step for tag, step, _ in found if tag.startswith("consistency/")} == {2}
    assert {step for tag, step, _ in found if tag == "client_00002/loss"} == {1, 2, 3}


def test_a_run_writes_nothing_unless_asked_and_no_clients_of_many(dataset: Path, tmp_path: Path) -> None:
    simulation.run(small_config(dataset, tmp_path / "off", 1, watching__tensorboard=False))
    assert not (tmp_path / "off" / "tensorboard").exists()
    many = {"watching__tensorboard": True, "watching__per_client_below": 3}
    simulation.run(small_config(dataset, tmp_path / "many", 1, **many))
    assert not [tag for tag, _, _ in _points(tmp_path / "many") if tag.startswith("client_")]


def test_a_resumed_run_has_every_point_once_and_those_of_an_unbroken_run(dataset: Path, tmp_path: Path) -> None:
    """Checkpoints stand after rounds 2 and 4, the kill comes after round 3: round 3 is done and told again."""
    settings: dict[str, Any] = {"watching__tensorboard": True, "checkpoint__every": 2, "evaluation__every": 2}
    simulation.run(small_config(dataset, tmp_path / "unbroken", 4, **settings))
    with pytest.raises(Killed):
        simulation.run(small_config(dataset, tmp_path / "broken", 4, **settings), observer=Killer(after=3))
    assert {step for _, step, _ in _points(tmp_path / "broken")} == {1, 2, 3}
    simulation.resume(tmp_path / "broken")
    one, other = (
        [point for point in _points(tmp_path / name) if "seconds" not in point[0]] for name in ("broken", "unbroken")
    )
    assert one == other
    assert len({(tag, step) for tag, step, _ in one}) == len(one)


def test_measuring_each_round_changes_no_number(dataset: Path, tmp_path: Path) -> None:
    """The instruments draw from generators of their own and put everything back."""
    plain = simulation.run(small_config(dataset, tmp_path / "plain"))
    measured = simulation.run(small_config(dataset, tmp_path / "measured", evaluation__measure_every=1))
    assert measured.test == plain.test
    assert (measured.imputation, measured.consistency) == (plain.imputation, plain.consistency)
    rows = [row for row in RunFolder(tmp_path / "measured").read_metrics() if row["client"] is None]
    (best,) = [row for row in rows if row["round"] == measured.best_round]
    assert (best["imputation"], best["consistency"]) == (measured.imputation, measured.consistency)


def test_a_folder_that_cannot_be_written_is_one_message(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(dataset, tmp_path / "run", 2, watching__tensorboard=True, runtime__kind="in_process")
    with pytest.raises(Killed):
        simulation.run(config, observer=Killer(after=1))
    events = tmp_path / "run" / "tensorboard"
    for path in events.iterdir():
        path.unlink()
    events.rmdir()
    events.write_text("a file where the folder was")
    assert cli.main(["resume", str(tmp_path / "run")]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "tensorboard cannot be written: File exists; check the folder's permissions, then continue with" in shown
