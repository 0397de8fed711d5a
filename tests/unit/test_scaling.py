"""Waiting for the nodes of a cluster that scales."""

from typing import Any

import pytest

from actors import scaling
from actors.placement import NodeResources
from actors.scaling import await_nodes
from experiments import small_config
from fedsim.config import RuntimeConfig
from fedsim.errors import ConfigError, RunError

HEAD, WORKER = NodeResources(8, 0, 3e10), NodeResources(8, 1, 3e10)


def _config(**changes: Any) -> RuntimeConfig:
    settings = {"num_actors": 6, "gpus_per_client": 0.25, "nodes_wait_seconds": 60, "address": "auto"} | changes
    return small_config({f"runtime.{name}": value for name, value in settings.items()}).runtime


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let a cluster have one more GPU node at each look after it was asked; returns what it was asked for."""
    asked: list[Any] = []
    nodes = [HEAD]

    def resources() -> tuple[list[NodeResources], NodeResources]:
        if asked:
            nodes.append(WORKER)
        return list(nodes), HEAD

    monkeypatch.setattr(scaling, "cluster_resources", resources)
    monkeypatch.setattr(scaling, "request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(scaling, "LOOK_SECONDS", 0.0)
    return asked


def test_nodes_are_asked_for_and_the_request_is_taken_back(asked: list[Any]) -> None:
    """Six actors of a quarter of a GPU need two nodes; the server needs a bundle without a GPU."""
    await_nodes(_config())
    assert asked == [[{"CPU": 0.5, "GPU": 0.25}] * 6 + [{"CPU": 0.5}], []]


@pytest.mark.parametrize("changes", [{"nodes_wait_seconds": 0}, {"gpus_per_client": 0.0}])
def test_nothing_is_asked_for_without_need(asked: list[Any], changes: dict[str, Any]) -> None:
    """Without GPUs the head's 8 CPUs are enough."""
    await_nodes(_config(**changes))
    assert asked == []


@pytest.mark.parametrize(("num_actors", "waits"), [(15, False), (16, True)])
def test_the_server_has_its_share(asked: list[Any], num_actors: int, waits: bool) -> None:
    """On 8 CPUs, half a CPU each: sixteen actors, one of them the server."""
    await_nodes(_config(gpus_per_client=0.0, num_actors=num_actors))
    assert bool(asked) == waits


def test_nodes_that_do_not_come(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "cluster_resources", lambda: ([HEAD, WORKER], HEAD))
    with pytest.raises(RunError, match=r"after 0\.01 seconds .* room for 4 of 6 client actors .* see `ray status`"):
        await_nodes(_config(nodes_wait_seconds=0.01))
    assert asked[-1] == []


@pytest.mark.parametrize("missing", ["num_actors", "address"])
def test_there_must_be_something_to_wait_for(missing: str) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.num_actors: set both"):
        _config(**{missing: None})
