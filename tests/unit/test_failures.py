"""Clients that fail in a round: how many a run goes on without, and what is left of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fedsim.federated.runtime
from builders import write_tiny_dataset
from fedsim import simulation
from fedsim.config import Config, make_config
from fedsim.errors import ConfigError, LostActorError, RunError
from fedsim.federated.failures import Failure, check_failures, unchanged_on_failure
from fedsim.federated.message_checks import Rejection
from fedsim.federated.runtime import InProcessRuntime, prepare
from fedsim.run_folder import RunFolder
from runs import outcome, small_config


def _config(allowed: int, fewest: int = 1) -> Config:
    return make_config({}, {"federation.max_failed_clients": allowed, "faults.min_clients": fewest})


def _failure(client: int) -> Failure:
    return Failure(client, 4, "died", f"client {client} died")


def _rejection(client: int) -> Rejection:
    return Rejection(client, 4, "not_finite", f"client {client} sent a NaN")


def test_failed_and_rejected_clients_count_together() -> None:
    """Of two that failed and one that was rejected three may fail, but not two; one that did both counts once."""
    check_failures(_config(3), 4, 5, [_failure(1), _failure(7)], [_rejection(2)])
    check_failures(_config(1), 4, 5, [_failure(2)], [_rejection(2)])
    message = r"round 4: 3 clients failed, more than federation.max_failed_clients 2; the first: client 1 died"
    with pytest.raises(RunError, match=message):
        check_failures(_config(2), 4, 5, [_failure(1), _failure(7)], [_rejection(2)])


@pytest.mark.parametrize("num_updates", [0, 1])
def test_a_round_below_the_quorum_is_never_averaged(num_updates: int) -> None:
    message = rf"round 4: {num_updates} update\(s\) are left, fewer than faults.min_clients 2, as 1 client\(s\) failed"
    with pytest.raises(RunError, match=message):
        check_failures(_config(3, fewest=2), 4, num_updates, [_failure(1)], [])
    check_failures(_config(3, fewest=2), 4, 2, [_failure(1)], [])


def test_a_small_cohort_in_which_nobody_failed_is_a_round() -> None:
    check_failures(_config(0, fewest=2), 4, 1, [], [])


def test_a_deadline_needs_a_checkpoint_of_each_round() -> None:
    with pytest.raises(ConfigError, match=r"set checkpoint.every to 1, not 5"):
        make_config({}, {"faults.round_deadline_seconds": 3.0, "checkpoint.every": 5})


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_client_that_fails_is_as_it_was_before(allowed: int, tmp_path: Path) -> None:
    """Training changes values in place; without tolerance nothing is copied, as the run stops."""
    dataset = write_tiny_dataset(tmp_path / "tiny")
    config = small_config(dataset, tmp_path / "unused", federation__max_failed_clients=allowed)
    runtime = InProcessRuntime(prepare(config))
    clients = list(runtime.clients.values())
    before = [{name: value.clone() for name, value in client.state().items()} for client in clients]
    with pytest.raises(RunError, match="in the middle"), unchanged_on_failure(clients, config):  # noqa: PT012
        runtime.train(1, [0, 1, 2])
        raise RunError("in the middle")
    same = [
        client.state().keys() == state.keys()
        and all(torch.equal(value, state[name]) for name, value in client.state().items())
        for client, state in zip(clients, before, strict=True)
    ]
    assert same == [allowed == 1] * 3


@pytest.mark.parametrize(("at", "every", "lost"), [("evaluate", 1, [1, 3]), ("save", 2, [1, 3])])
def test_a_run_goes_back_to_its_checkpoint(
    at: str, every: int, lost: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that loses what it held, once before any checkpoint and once after one, ends with the same bits."""
    dataset = write_tiny_dataset(tmp_path / "tiny")
    changes: dict[str, Any] = {"checkpoint__every": every, "model__imputer": "zero"}
    simulation.run(small_config(dataset, tmp_path / "unbroken", **changes))
    calls: list[int] = []
    went_back: list[int] = []

    class Losing(InProcessRuntime):
        def __init__(self, experiment: Any) -> None:
            super().__init__(experiment)
            self.experiment = experiment

        def recover(self, error: LostActorError, folder: Path | None, round_num: int) -> None:
            went_back.append(round_num)
            self.__init__(self.experiment)  # type: ignore[misc]
            if folder is not None:
                self.load(folder)

    whole = getattr(Losing, at)

    def losing(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        done = whole(self, *args, **options)
        if len(calls) in lost:
            raise LostActorError("it is gone")
        return done

    monkeypatch.setattr(Losing, at, losing)
    simulation.run(small_config(dataset, tmp_path / "run", **changes), Losing)
    assert len(went_back) == 2
    assert went_back[0] == 0
    assert went_back[1] > 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "unbroken")
    assert "recovery" in RunFolder(tmp_path / "run").result_file.read_text()


def test_a_batch_that_fails_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_tiny_dataset(tmp_path / "tiny")
    train_clients = fedsim.federated.runtime.train_clients

    def failing(clients: Sequence[Any], round_num: int, broadcast: Any) -> Any:
        if round_num == 2 and clients[0].data.client == 1:
            raise RunError("client 1, round 2: no more memory")
        return train_clients(clients, round_num, broadcast)

    monkeypatch.setattr(fedsim.federated.runtime, "train_clients", failing)
    with pytest.raises(RunError, match="client 1, round 2: no more memory"):
        simulation.run(small_config(dataset, tmp_path / "strict"))
    simulation.run(small_config(dataset, tmp_path / "run", federation__max_failed_clients=1))
    rows = [row for row in RunFolder(tmp_path / "run").read_metrics() if row["client"] is None]
    named = {"client": 1, "round_num": 2, "reason": "error", "message": "client 1, round 2: no more memory"}
    assert [row["failed"] for row in rows] == [[], [named], []]
    assert [row["num_aggregated"] for row in rows] == [3, 2, 3]
