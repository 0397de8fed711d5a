"""What goes wrong on Ray: one message that names who and what, exit code 2, no traceback, nothing half-written."""

import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import ray

import actors.cluster
from actors.calls import Call, collect
from actors.runtime import RayRuntime, ray_runtime
from builders import write_tiny_dataset
from fedsim import cli, simulation
from fedsim.errors import RunError
from fedsim.federated.runtime import prepare
from processes import fedsim
from runs import small_config, small_options


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@contextmanager
def _running(dataset: Path, **changes: Any) -> Iterator[RayRuntime]:
    made = ray_runtime(prepare(small_config(dataset, Path("run"), data__num_clients=2, **changes)))
    with closing(made):
        assert isinstance(made, RayRuntime)
        yield made


@pytest.fixture(scope="module")
def runtime(ray_cluster: Any, dataset: Path) -> Iterator[RayRuntime]:
    """Two clients and a server; the tests that share it leave it as it was."""
    with _running(dataset) as made:
        yield made


def _fails(options: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command, check that it fails as it should, and return its message."""
    assert cli.main(["run", *options]) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    (message,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    return message


def test_a_cluster_that_cannot_be_reached(dataset: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = [*small_options(dataset, tmp_path / "run", 2), f"--runtime.address={address}"]
    with fedsim("run", *options, cwd=tmp_path) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    (line,) = output.strip().splitlines()
    assert line.startswith(f"error: the Ray cluster at {address} cannot be reached: ")
    assert "check runtime.address" in line
    assert not (tmp_path / "run").exists()


def test_a_port_where_something_else_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.cluster, "PROBE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(RunError, match=f"the Ray cluster at {address} cannot be reached: no answer in 0.5 seconds"):
            actors.cluster.connect(address)


@pytest.mark.parametrize(("wanted", "included"), [(True, None), (False, False)])
def test_the_dashboard_can_be_left_out(wanted: bool, included: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(actors.cluster.ray, "init", lambda address, **options: seen.append(options))
    actors.cluster.connect(None, dashboard=wanted)
    assert [options["include_dashboard"] for options in seen] == [included]


def test_a_machine_where_ray_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray says so by a bare Exception; what it has started by then is ended."""
    ended = []

    def init(address: str, **options: Any) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(actors.cluster.ray, "init", init)
    monkeypatch.setattr(actors.cluster.ray, "shutdown", lambda: ended.append("the node"))
    with pytest.raises(RunError, match="Ray does not start on this machine: The current node timed out .* try again"):
        actors.cluster.connect(None)
    assert ended == ["the node"]


def test_a_scratch_folder_that_is_not_there(ray_cluster: object, tmp_path: Path) -> None:
    """The line names the field, and nothing is left of the run."""
    dataset = write_tiny_dataset(tmp_path / "tiny")
    config = small_config(dataset, tmp_path / "run", runtime__scratch=str(tmp_path / "missing"))
    with pytest.raises(RunError, match=r"'runtime.scratch' = '.*/missing': No such file or directory; give a folder"):
        simulation.run(config, ray_runtime)
    assert not (tmp_path / "run").exists()


def test_an_address_that_is_none() -> None:
    with pytest.raises(RunError, match="the Ray cluster at nowhere:port cannot be reached"):
        actors.cluster.connect("nowhere:port")


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--runtime.placement=dedicated", "--runtime.cpus_per_actor=2"],
            r"dedicated placement of 3 clients needs 8 CPUs \(3 client actors and the server, 2 each\), "
            r"but 4 are available; lower runtime.cpus_per_actor",
        ),
        (
            ["--runtime.placement=dedicated", "--runtime.gpus_per_client=0.25"],
            r"needs 0.75 GPUs \(3 client actors, 0.25 each\), but 0 are available; lower runtime.gpus_per_client",
        ),
        (["--runtime.timeout_seconds=0.01"], r"client \d .*has not finished starting .* in 0.01 seconds; raise"),
        (
            ["--training.learning_rate=1e30"],
            r"client \d, round [12]: .*not finite.* \(actor fedsim/run[^ ]*/(client-0000\d|server) on node ",
        ),
    ],
)
def test_what_the_cluster_or_a_client_cannot_do(
    options: list[str], message: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message, error := _fails([*small_options(dataset, tmp_path / "run", 2), *options], capsys)), error


@pytest.mark.usefixtures("ray_cluster")
def test_who_dies_is_named_with_the_round(dataset: Path) -> None:
    client = r"client 1 \(actor fedsim/run.*/client-00001 on node .*\) died, training in round 2; cause: "
    server = r"the server \(actor fedsim/run.*/server on node .*\) died, opening round 3; cause: "
    with _running(dataset, faults__max_restarts=0) as runtime:
        runtime.train(1, [0, 1])
        os.kill(runtime.pool[1].pid, signal.SIGKILL)
        with pytest.raises(RunError, match=client) as err:
            runtime.train(2, [0, 1])
        assert "continue with `fedsim resume RUN`" in str(err.value)
        assert "\n" not in str(err.value)
        os.kill(runtime.crew.server_pid, signal.SIGKILL)
        with pytest.raises(RunError, match=server):
            runtime.train(3, [0])


def test_a_bug_at_a_client_is_one_message_and_keeps_the_remote_traceback(runtime: RayRuntime) -> None:
    held = runtime.pool[0]
    call = Call("client 0", held.name, held.node, "evaluation", lambda: held.actor.evaluate.remote([0], "no", 1, False))
    with pytest.raises(RunError) as err:
        list(collect([[call]], 60))
    assert re.match(r"client 0, evaluation \(actor .*/client-00000 on node .*\): KeyError: 'no'", str(err.value))
    assert "Traceback" not in str(err.value)
    assert 'client.py", line ' in str(err.value.__cause__)


def test_a_damaged_client_file_is_named(runtime: RayRuntime, tmp_path: Path) -> None:
    runtime.save(tmp_path)
    (tmp_path / "clients-00001.safetensors").write_bytes(b"short")
    with pytest.raises(RunError, match=r"client 1, loading: .*clients-00001.safetensors cannot be read"):
        runtime.load(tmp_path)


def test_a_checkpoint_does_not_need_a_folder_that_all_machines_share(
    runtime: RayRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An actor that does not find the mark hands over what it would have written, and is handed what it asks for."""
    shared, alone, again = tmp_path / "shared", tmp_path / "alone", tmp_path / "again"
    for folder in (shared, alone, again):
        folder.mkdir()
    runtime.save(shared)
    with monkeypatch.context() as patch:
        patch.setattr("actors.runtime.marked", lambda folder: nullcontext(folder / "no mark"))
        runtime.save(alone)
        runtime.train(1, [0, 1])
        runtime.load(alone)
    runtime.save(again)
    files = {path.name: path.read_bytes() for path in shared.iterdir()}
    assert set(files) == {"server.safetensors", "clients-00000.safetensors", "clients-00001.safetensors"}
    for folder in (alone, again):
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    with pytest.raises(RunError, match=r"no such folder/\..* cannot be written: No such file or directory"):
        runtime.save(tmp_path / "no such folder")


def test_a_gpu_without_memory_for_a_batch_is_said_once_per_size(
    dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = RayRuntime(small_config(dataset, Path("run"), data__num_clients=2), shut_down=False)

    def trained(num_clients: int, at_once: int) -> list[str]:
        caplog.clear()
        call = Call("x", "run/pool-0", "node", "training in round 2", lambda: None, tuple(range(num_clients)))
        runtime.crew.say_parts(call, at_once)
        return caplog.messages

    assert trained(8, 8) == []
    (line,) = trained(8, 2)
    assert "run/pool-0 ran out of memory, training in round 2: of 8 clients of a batch it trains 2 at once" in line
    assert "changes the last digits; lower runtime.clients_per_batch or raise runtime.gpus_per_client" in line
    assert trained(8, 2) == trained(1, 1) == []
    assert len(trained(8, 1)) == 1


def test_results_come_as_they_are_ready_with_few_calls_in_flight(ray_cluster: Any) -> None:
    """Of two actors, the slow one's results come last, and no actor has more than two calls queued."""

    @ray.remote(num_cpus=0)
    class Sleeper:
        def nap(self, seconds: float) -> float:
            import time

            time.sleep(seconds)
            return seconds

    sleepers = [Sleeper.remote(), Sleeper.remote()]
    ray.get([sleeper.nap.remote(0.0) for sleeper in sleepers])
    submitted: list[int] = []

    def submit(index: int, seconds: float) -> Any:
        submitted.append(index)
        return sleepers[index].nap.remote(seconds)

    def queue(index: int, seconds: float) -> list[Call[float]]:
        return [Call("x", "x", "x", "napping", lambda: submit(index, seconds)) for _ in range(4)]

    results = collect([queue(0, 3.0), queue(1, 0.0)], 60)
    first_four = [next(results)[1] for _ in range(4)]
    assert first_four == [0.0] * 4
    assert submitted.count(0) == 2
    for sleeper in sleepers:
        ray.kill(sleeper)
