"""Actors that die, clients that fail: nothing is lost that was not in flight, and no bit changes (docs/faults.md)."""

import logging
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

import actors.crew
import fedsim.federated.runtime
from actors.client import _ClientActor
from actors.runtime import RayRuntime, ray_runtime
from builders import write_tiny_dataset
from fedsim import cli, simulation
from fedsim.errors import RunError
from fedsim.run_folder import RunFolder
from runs import outcome, small_config, small_options

pytestmark = pytest.mark.usefixtures("ray_cluster")

Kill = tuple[str, str]  # when this work has ended, the actor of that name is killed


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def unbroken(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run to the end without a fault, in this process."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    simulation.run(small_config(dataset, folder))
    return outcome(folder)


def _killing(kills: Sequence[Kill]) -> Callable[[Any], RayRuntime]:
    """Make runtimes whose actors are killed, one after the other."""
    left = list(kills)

    def factory(experiment: Any) -> RayRuntime:
        runtime = ray_runtime(experiment)
        assert isinstance(runtime, RayRuntime)
        ended = runtime.timeline.ended

        def watched(actor: str, what: str, seconds: float, *, failed: bool = False) -> None:
            ended(actor, what, seconds, failed=failed)
            if left and what == left[0][0]:
                pids = {held.name.rpartition("/")[2]: held.pid for held in runtime.pool}
                pids["server"] = runtime.crew.server_pid
                os.kill(pids[left.pop(0)[1]], signal.SIGKILL)

        runtime.timeline.ended = watched  # type: ignore[method-assign]
        return runtime

    return factory


@pytest.mark.parametrize(
    ("placement", "kills", "lines"),
    [
        pytest.param(
            {"placement": "dedicated"},
            [
                ("opening round 1", "server"),
                ("training in round 2", "client-00001"),
                ("evaluation on valid in round 3", "client-00002"),
            ],
            [
                r"the server \(actor .*/server on node .*\) died, adding updates in round 1; cause: .*; "
                r"replaced .*/server and went back to the start in",
                r"client 1 \(actor .*/client-00001 on node .*\) died, \w+ .*in round 2; cause: .*; replaced on node",
                r"client 2 \(actor .*/client-00002 on node .*\) died, .*; cause: .*; replaced on node .* in .* s,",
            ],
            id="dedicated",
        ),
        pytest.param(
            {"placement": "pooled", "num_actors": 2},
            [
                ("training in round 1", "pool-1"),
                ("summing updates in round 2", "pool-0"),
                ("saving", "pool-1"),
                ("distilling in round 3", "server"),
            ],
            [
                r"clients? [012, ]+ \(actor .*/pool-1 on node .*\) died, .*; replaced on node",
                r"clients? [012, ]+ \(actor .*/pool-0 on node .*\) died, .*; replaced on node",
                r"clients? [012, ]+ \(actor .*/pool-1 on node .*\) died, saving; .*; replaced on node",
                r"the server .*; replaced .*/server and went back to round 2 in",
            ],
            id="pooled",
        ),
        pytest.param(
            {"placement": "pooled", "num_actors": 2},
            [
                ("distilling in round 2", "server"),
                ("its last work", "pool-1"),
                ("taking its data", "pool-0"),  # when the new server does not know the clients yet
            ],
            [
                r"clients? [012, ]+ \(actor .*/pool-0 on node .*\) died, .*; replaced .*/pool-1, .*/server, .*/pool-0 "
                r"and went back to round 1 in",
            ],
            id="while going back",
        ),
    ],
)
def test_actors_that_are_killed_change_no_bit(
    placement: dict[str, Any],
    kills: list[Kill],
    lines: list[str],
    dataset: Path,
    unbroken: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    changes = {f"runtime__{name}": value for name, value in placement.items()}
    with caplog.at_level(logging.WARNING):
        simulation.run(small_config(dataset, tmp_path / "run", **changes), _killing(kills))
    assert outcome(tmp_path / "run") == unbroken
    said = [line for line in caplog.messages if "replaced" in line]
    assert len(said) == len(lines), caplog.messages
    for line, expected in zip(said, lines, strict=True):
        assert re.match(expected, line), line
    spans = [span for row in RunFolder(tmp_path / "run").read_timeline() for span in row.get("spans", ())]
    assert sum(what == "restarting" or what.startswith("going back") for _, what, *_ in spans) == len(lines)


def _failing_actor(*rounds: int) -> Any:
    """Make client actors in which client r - 1 fails in round r: by an error, by its end, and by taking forever.

    The class is local, so that it reaches the actors' processes by value: they cannot import this file.
    """

    class FailingActor(_ClientActor):
        @ray.method(num_returns=2)
        def train(self, clients: Sequence[int], round_num: int, broadcast: Any) -> Any:
            if list(clients) != [round_num - 1] or round_num not in rounds:
                return super().train(clients, round_num, broadcast)
            if round_num == 2:
                os._exit(1)
            if round_num == 3:
                time.sleep(3600)
            import actors.client

            whole = actors.client.train_clients

            def failing(*args: Any) -> Any:
                whole(*args)
                raise RunError("client 0, round 1: an error after the work")

            actors.client.train_clients = failing  # type: ignore[assignment]
            try:
                return super().train(clients, round_num, broadcast)
            finally:
                actors.client.train_clients = whole

    return ray.remote(FailingActor)


def test_a_round_goes_on_without_clients_that_fail(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the failure, it is as if the client had not been asked: the bits are those of one process."""
    changes = {"federation__max_failed_clients": 1, "faults__min_clients": 2}
    with monkeypatch.context() as patch:
        train_clients = fedsim.federated.runtime.train_clients

        def failing(clients: Sequence[Any], round_num: int, broadcast: Any) -> Any:
            results = train_clients(clients, round_num, broadcast)
            if any(client.data.client == round_num - 1 for client in clients):
                raise RunError("an error after the work")
            return results

        patch.setattr(fedsim.federated.runtime, "train_clients", failing)
        simulation.run(small_config(dataset, tmp_path / "here", **changes))

    monkeypatch.setattr(actors.crew, "ClientActor", _failing_actor(1, 2, 3))
    limits = {"faults__max_restarts": 0, "faults__round_deadline_seconds": 20.0, "runtime__placement": "dedicated"}
    simulation.run(small_config(dataset, tmp_path / "ray", **changes, **limits), ray_runtime)
    here, there = outcome(tmp_path / "here"), outcome(tmp_path / "ray")
    rows = [row for row in there["metrics"] if row["client"] is None]
    failed = [[(failure["client"], failure["reason"]) for failure in row["failed"]] for row in rows]
    assert failed == [[(0, "error")], [(1, "died")], [(2, "late")]]
    assert [row["num_aggregated"] for row in rows] == [2, 2, 2]
    assert "client-00001 on node" in rows[1]["failed"][0]["message"]
    for row in (*here["metrics"], *there["metrics"]):
        row.pop("failed", None)
    assert there == here


def test_an_actor_that_dies_of_every_restart_stops_the_run(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(actors.crew, "ClientActor", _failing_actor(2))
    options = small_options(dataset, tmp_path / "run", 2)
    options += ["--data.num_clients=2", "--runtime.placement=dedicated", "--faults.max_restarts=1"]
    assert cli.main(["run", *options]) == 2
    errors = capsys.readouterr().err
    warning, error = errors.strip().splitlines()
    assert re.match(r"warning: client 1 \(actor .*\) died, training in round 2; cause: .*; replaced on node", warning)
    assert re.match(
        r"error: client 1 \(actor fedsim/run.*/client-00001 on node .*\) died, training in round 2; cause: .*; "
        r"continue with `fedsim resume RUN`; round 2: actor .*/client-00001 died 2 times since the last checkpoint "
        r"\(faults.max_restarts 1\)$",
        error,
    )
    assert "ActorDiedError" in (tmp_path / "run" / "run.log").read_text()


def test_a_round_of_secure_aggregation_is_repeated_with_new_keys(dataset: Path, tmp_path: Path) -> None:
    """Its actor took the keys with it, so all go back; masks are drawn anew, and leave no trace in the sums."""
    changes: dict[str, Any] = {
        "secure_aggregation__enabled": True,
        "distillation__num_soft_queries": 0,
        "num_rounds": 2,
    }
    simulation.run(small_config(dataset, tmp_path / "here", **changes))
    placed = {"runtime__placement": "pooled", "runtime__num_actors": 2}
    kills = [("training in round 2", "pool-1")]
    simulation.run(small_config(dataset, tmp_path / "ray", **changes, **placed), _killing(kills))
    assert outcome(tmp_path / "ray") == outcome(tmp_path / "here")
    spans = [span for row in RunFolder(tmp_path / "ray").read_timeline() for span in row.get("spans", ())]
    assert [what for _, what, *_ in spans if what.startswith("going back")] == ["going back to round 1"]
