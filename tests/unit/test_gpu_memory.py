"""Batches that run out of GPU memory: halved, repeated from the state before, and said."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fedsim.errors import RunError
from fedsim.federated.client import Client
from fedsim.federated.gpu_memory import PartSize


class _Counter:
    """A client whose state is how often it was trained."""

    def __init__(self, number: int) -> None:
        self.data = SimpleNamespace(client=number)
        self.device = torch.device("cuda")
        self.count = torch.zeros(())

    def state(self) -> dict[str, Tensor]:
        return {"count": self.count}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.count = state["count"]


class _SmallGPU:
    """Trains clients and then fails if there were more than fit, as a step late in a round does."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tried: list[int] = []

    def __call__(self, clients: Sequence[Any]) -> list[int]:
        self.tried.append(len(clients))
        for client in clients:
            client.count += 1
        if len(clients) > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        return [client.data.client for client in clients]


def _clients(number: int) -> tuple[list[_Counter], Sequence[Client]]:
    clients = [_Counter(i) for i in range(number)]
    return clients, cast(Sequence[Client], clients)


def test_a_batch_is_halved_until_it_fits_and_each_client_is_trained_once() -> None:
    """Ten do not fit, nor do five; three do: 3 + 3 + 3 + 1."""
    counters, clients = _clients(10)
    gpu, size = _SmallGPU(3), PartSize()
    assert size.run(clients, "training", gpu) == list(range(10))
    assert gpu.tried == [10, 5, 3, 3, 3, 1]
    assert [int(client.count) for client in counters] == [1] * 10
    assert size.most == 3


def test_what_fits_is_remembered() -> None:
    gpu, size = _SmallGPU(2), PartSize()
    size.run(_clients(4)[1], "training", gpu)
    gpu.tried.clear()
    size.run(_clients(4)[1], "training", gpu)
    assert gpu.tried == [2, 2]


def test_a_batch_that_fits_is_done_at_once() -> None:
    gpu, size = _SmallGPU(8), PartSize()
    assert size.run(_clients(8)[1], "training", gpu) == list(range(8))
    assert gpu.tried == [8]
    assert size.most is None


def test_a_client_that_does_not_fit_alone_is_named() -> None:
    message = r"client 0: training in round 2 does not fit into its share of the GPU \(CUDA out of memory. Tried to "
    with pytest.raises(RunError, match=message + r"allocate 2 GiB\); raise runtime.gpus_per_client"):
        PartSize().run(_clients(3)[1], "training in round 2", _SmallGPU(0))


def test_other_failures_pass() -> None:
    def fail(clients: Sequence[Client]) -> list[int]:
        raise RunError("loss is not finite")

    with pytest.raises(RunError, match="loss is not finite"):
        PartSize().run(_clients(2)[1], "training", fail)
