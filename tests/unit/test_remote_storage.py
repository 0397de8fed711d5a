"""The stored copy of a run: any machine goes on from it with the same numbers, and no half of anything is taken.

The S3 server is moto's, in a thread of this process; what needs no S3 is tested with folders as storage.
"""

import logging
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builders import write_tiny_dataset
from experiments import small_config as config_of_nothing
from fedsim import cli, simulation
from fedsim.checkpoint import newest_checkpoint
from fedsim.config import Config, load_config
from fedsim.errors import ConfigError, RunError
from fedsim.results import SilentObserver
from fedsim.run_folder import RunFolder
from fedsim.run_storage import RunStorage, fetch_run, local_folder
from runs import outcome, small_config

NUM_ROUNDS = 3


class _StoppedError(Exception):
    """The machine of a run is gone."""


class _StopsBefore(SilentObserver):
    """Ends a run as it is about to begin a round."""

    def __init__(self, round_num: int) -> None:
        self.round_num = round_num

    def round_started(self, round_num: int) -> None:
        if round_num == self.round_num:
            raise _StoppedError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def unbroken(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what an unbroken run without storage ends with."""
    config = _config(dataset, tmp_path_factory.mktemp("unbroken") / "run")
    return outcome(simulation.run(config).folder)


@pytest.fixture(scope="module")
def stored(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a copy of two of three rounds; not to be changed."""
    folder = tmp_path_factory.mktemp("stored")
    _stopped_run(dataset, folder / "run", (folder / "copy").as_uri())
    return folder / "copy"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Serve S3 on this machine; returns its address."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Point the file system at the server, with an empty bucket; returns the server's address."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    _ask(f"{server}/moto-api/reset", "POST")
    _ask(f"{server}/bucket", "PUT")
    yield server
    _ask(f"{server}/moto-api/reset-auth", "POST", b"inf")


@pytest.fixture(params=["s3", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return a URI under which runs may be stored."""
    if request.param == "file":
        return (tmp_path / "shared").as_uri()
    request.getfixturevalue("s3")
    return "s3://bucket/runs"


def _ask(url: str, method: str, data: bytes | None = None) -> None:
    headers = {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method)).close()


def _config(dataset: Path, output: Path, **changes: Any) -> Config:
    return small_config(dataset, output, NUM_ROUNDS, runtime__kind="in_process", **changes)


def _stopped_run(dataset: Path, output: Path, uri: str, before: int = NUM_ROUNDS) -> Path:
    """Run with storage, and stop before a round."""
    with pytest.raises(_StoppedError):
        simulation.run(_config(dataset, output, storage=uri), observer=_StopsBefore(before))
    return output


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _rounds(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_run_goes_on_elsewhere_with_the_same_numbers(
    place: str,
    dataset: Path,
    unbroken: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri = f"{place}/trial"
    shutil.rmtree(_stopped_run(dataset, tmp_path / "first", uri))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(["resume", uri]) == 0, capsys.readouterr()
    assert f"fetched {uri} into runs/trial" in capsys.readouterr().out
    assert outcome(Path("runs/trial")) == unbroken

    # The copy is whole again, for a third machine.
    assert cli.main(["resume", uri, "--output", "again"]) == 2
    assert f"the run at {uri} is finished; get it with `fedsim fetch {uri}`" in capsys.readouterr().err
    assert cli.main(["fetch", uri, "--output", "again"]) == 0
    assert outcome(Path("again")) == unbroken
    mine, stored = _files(Path("runs/trial")), _files(Path("again"))
    assert mine.pop("run.log").startswith(stored.pop("run.log"))  # its last lines come after the last copy
    assert mine == stored


def test_what_fsspec_knows_is_storage_too(dataset: Path, unbroken: dict[str, Any], tmp_path: Path) -> None:
    uri = "memory://runs/trial"
    _stopped_run(dataset, tmp_path / "first", uri, before=2)
    folder = fetch_run(uri, tmp_path / "second", unfinished=True)
    assert outcome(simulation.resume(folder).folder) == unbroken


@pytest.mark.parametrize("harm", ["no manifest", "cut short", "one bit", "a file is gone"])
def test_a_newest_checkpoint_that_is_not_whole_is_not_taken(
    harm: str, stored: Path, unbroken: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = Path(shutil.copytree(stored, tmp_path / "shared" / "trial"))
    newest = shared / "checkpoints" / "round-00002"
    state = newest / "server.safetensors"
    content = state.read_bytes()
    if harm == "no manifest":
        (newest / "manifest.json").unlink()
    elif harm == "cut short":
        state.write_bytes(content[:-5])
    elif harm == "one bit":
        state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        state.unlink()
    folder = fetch_run(shared.as_uri(), tmp_path / "second")
    assert newest_checkpoint(folder / "checkpoints")[0].name == "round-00001"
    assert ("half-written" if harm == "no manifest" else "is not used") in caplog.text
    assert outcome(simulation.resume(folder).folder) == unbroken


def test_wherever_a_push_is_cut_off_the_copy_can_be_resumed(
    dataset: Path, unbroken: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off before each change of the storage in turn: after round 1 is stored, while round 2 is."""
    folder = _stopped_run(dataset, tmp_path / "first", (tmp_path / "unused").as_uri())
    one = tmp_path / "one"
    shutil.copytree(folder, one)
    shutil.rmtree(one / "checkpoints" / "round-00002")
    put, cut_at, num_changes = RunStorage._put_file, 0, 0

    def put_or_stop(storage: RunStorage, path: Path, name: str) -> None:
        nonlocal num_changes
        if storage.sent.get(name) is None:
            if num_changes == cut_at:
                raise _StoppedError
            num_changes += 1
        put(storage, path, name)

    while True:
        uri = (tmp_path / f"cut{cut_at}").as_uri()
        RunStorage(uri).push(one)
        num_changes = 0
        with monkeypatch.context() as patch:
            patch.setattr(RunStorage, "_put_file", put_or_stop)
            try:
                RunStorage(uri).push(folder)
            except _StoppedError:
                pass
            else:
                break
        fetched = fetch_run(uri, tmp_path / f"fetched{cut_at}")
        checkpoint, _ = newest_checkpoint(fetched / "checkpoints")
        done = 1 + int((tmp_path / f"cut{cut_at}" / "checkpoints" / "round-00002" / "manifest.json").is_file())
        assert checkpoint.name == f"round-{done:05d}"
        assert RunFolder.open(fetched)[0].read_metrics()[-1]["round"] >= done
        cut_at += 1
    assert cut_at >= 6, "the files of the run and of a checkpoint"
    assert _files(tmp_path / f"cut{cut_at}") == _files(folder)
    assert outcome(simulation.resume(fetch_run(f"{tmp_path.as_uri()}/cut3", tmp_path / "end")).folder) == unbroken


def test_what_was_pruned_vanishes_and_what_was_done_again_is_replaced(dataset: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    folder = _stopped_run(dataset, tmp_path / "first", shared.as_uri())
    shutil.rmtree(folder / "checkpoints" / "round-00001")
    manifest = folder / "checkpoints" / "round-00002" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    RunStorage(shared.as_uri()).push(folder)
    assert _rounds(shared) == ["round-00002"]
    assert _files(shared) == _files(folder)


def test_a_copy_that_was_moved_goes_on_where_it_is(stored: Path, tmp_path: Path) -> None:
    before = _files(stored)
    shutil.copytree(stored, tmp_path / "new")
    folder = fetch_run((tmp_path / "new").as_uri(), tmp_path / "second")
    assert load_config(folder / "config.yaml").storage == (tmp_path / "new").as_uri()
    simulation.resume(folder)
    assert (tmp_path / "new" / "result.json").is_file()
    assert _files(stored) == before


def test_a_run_survives_its_storage_and_is_stored_later(
    dataset: Path, unbroken: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared, output = tmp_path / "shared", tmp_path / "run"

    class TakesStorageAway(SilentObserver):
        def round_started(self, round_num: int) -> None:
            if round_num == 2:
                shutil.rmtree(shared)
                shared.write_text("not a folder any more")

    config = _config(dataset, output, storage=(shared / "trial").as_uri())
    with pytest.raises(RunError, match=r"the run is finished: bring it there with `fedsim store .*run`"):
        simulation.run(config, observer=TakesStorageAway())
    assert outcome(output) == unbroken
    shared.unlink()
    assert cli.main(["store", str(output)]) == 0
    assert _files(shared / "trial") == _files(output)
    assert cli.main(["store", str(output), "--storage", (tmp_path / "other").as_uri()]) == 0
    assert _files(tmp_path / "other") == _files(output)


def _refusal(dataset: Path, folder: Path, uri: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Start a run with a storage that cannot be used; returns the one message."""
    options = [f"--data.path={dataset}", f"--output={folder}", f"--storage={uri}", "--runtime.kind=in_process"]
    assert cli.main(["run", *options]) == 2
    assert not folder.exists()
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    return line


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_is_missing(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = "s3://nowhere/trial"
    text = f"error: storage {uri}: there is no bucket 'nowhere'; create it, or mend the URI"
    assert _refusal(dataset, tmp_path / "run", uri, capsys) == text
    with pytest.raises(RunError, match="there is no bucket 'nowhere'"):
        fetch_run(uri, tmp_path / "run")


def test_credentials_that_are_missing_or_wrong(
    s3: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _ask(f"{s3}/moto-api/reset-auth", "POST", b"0")  # from now on the server checks them
    line = _refusal(dataset, tmp_path / "run", "s3://bucket/trial", capsys)
    assert line.startswith("error: storage s3://bucket/trial: access is denied (")
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the machine's role" in line
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(RunError, match="access is denied"):
        RunStorage("s3://bucket/trial").push(tmp_path)


@pytest.mark.usefixtures("s3")
def test_an_endpoint_that_does_not_answer(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = "s3://bucket/trial?endpoint_override=127.0.0.1:9&scheme=http"
    line = _refusal(dataset, tmp_path / "run", uri, capsys)
    assert line.startswith(f"error: storage {uri}: it cannot be reached (")
    assert line.endswith("check the network and the endpoint (AWS_ENDPOINT_URL)")


def test_other_bad_storage_is_named(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = _refusal(dataset, tmp_path / "run", "ftpx://host/run", capsys)
    assert "has a scheme that neither pyarrow nor fsspec can use here" in line
    (tmp_path / "file").write_text("")
    line = _refusal(dataset, tmp_path / "run", (tmp_path / "file" / "run").as_uri(), capsys)
    assert line.startswith(f"error: storage {tmp_path.as_uri()}/file/run: ")
    for text, rule in [
        ("bucket/trial", "not the URI of a folder; write for example s3://bucket/runs/trial"),
        ("s3://", "not the URI of a folder"),
        ("s3://key:secret@bucket/trial", "credentials do not belong into the URI"),
    ]:
        with pytest.raises(ConfigError, match=rule):
            config_of_nothing({"storage": text})


def test_runs_are_not_overwritten(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = (tmp_path / "shared" / "trial").as_uri()
    folder = _stopped_run(dataset, tmp_path / "first", uri)
    assert f"storage {uri} holds a run; continue it with `fedsim resume {uri}`" in _refusal(
        dataset, tmp_path / "run", uri, capsys
    )
    with pytest.raises(RunError, match="exists; continue it with `fedsim resume"):
        fetch_run(uri, folder)
    with pytest.raises(RunError, match=r"holds no run \(it has no config\.yaml\); check the URI"):
        fetch_run((tmp_path / "empty").as_uri(), tmp_path / "run")
    assert not list(tmp_path.glob(".*"))


def test_storage_that_holds_something_else_is_left_alone(dataset: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    folder = _stopped_run(dataset, tmp_path / "first", shared.as_uri())
    _stopped_run(dataset, tmp_path / "second", (tmp_path / "runs" / "second").as_uri())
    other = tmp_path / "third"
    shutil.copytree(folder, other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("seed: 0", "seed: 1", 1))
    before = _files(tmp_path)
    for folder_of_run, place, reason in [(other, shared, "another run"), (folder, tmp_path / "runs", "files but no")]:
        with pytest.raises(RunError, match=f"holds {reason}"):
            RunStorage(place.as_uri()).push(folder_of_run)
    with pytest.raises(RunError, match="holds files but no run; give another --storage"):
        RunStorage((tmp_path / "runs").as_uri()).refuse_existing()
    assert _files(tmp_path) == before


def test_uris_stand_only_where_they_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "s3://bucket/runs/trial"]) == 2
    assert "get it with `fedsim fetch s3://bucket/runs/trial`" in capsys.readouterr().err
    assert cli.main(["fetch", "runs/trial"]) == 2
    assert "'runs/trial' is not a URI" in capsys.readouterr().err
    assert cli.main(["resume", "runs/trial", "--output", "x"]) == 2
    assert "--output is for a run that is fetched" in capsys.readouterr().err
    assert [str(local_folder(uri)) for uri in ("s3://b/runs/x", "s3://b", "file:///y/z/")] == [
        "runs/x",
        "runs/b",
        "runs/z",
    ]
