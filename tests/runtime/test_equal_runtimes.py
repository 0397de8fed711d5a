"""The same bits in one process and on Ray, whatever the number of actors, and in any order of arrival."""

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import actors.runtime
from actors.placement import Move
from actors.runtime import ray_runtime
from builders import write_tiny_dataset
from fedsim import simulation
from fedsim.federated.messages import ClientUpdate
from fedsim.federated.runtime import InProcessRuntime, prepare
from fedsim.federated.server import Server
from runs import outcome, small_config

pytestmark = pytest.mark.usefixtures("ray_cluster")

Outcomes = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def in_process(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Return the outcome of a config in one process, each computed once."""
    known: dict[str, dict[str, Any]] = {}

    def compute(**changes: Any) -> dict[str, Any]:
        key = str(sorted(changes.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("runs") / "in_process"
            simulation.run(small_config(dataset, folder, **changes))
            known[key] = outcome(folder)
        return known[key]

    return compute


PLACEMENTS = [
    pytest.param({}, {"placement": "dedicated"}, 3, id="3 clients, dedicated"),
    pytest.param({}, {"placement": "pooled", "num_actors": 1}, 1, id="3 clients in 1 actor"),
    pytest.param({}, {"placement": "pooled", "num_actors": 2}, 2, id="3 clients in 2 actors"),
    pytest.param({"data__num_clients": 1}, {"placement": "dedicated"}, 1, id="1 client"),
    pytest.param({"data__num_clients": 2}, {"placement": "dedicated"}, 2, id="2 clients"),
    pytest.param({"data__num_clients": 5}, {"placement": "pooled", "num_actors": 2}, 2, id="5 clients in 2 actors"),
    pytest.param(
        {"data__num_clients": 5, "federation__cohort_size": 2},
        {"placement": "pooled", "num_actors": 3},
        3,
        id="2 of 5 clients sampled, in 3 actors",
    ),
    pytest.param({"federation__strategy": "local"}, {"placement": "pooled", "num_actors": 2}, 2, id="no server"),
    pytest.param(
        {"data__num_clients": 5, "runtime__clients_per_batch": 2, "federation__cohort_size": 3},
        {"placement": "pooled", "num_actors": 2},
        2,
        id="5 clients in batches of 2, in 2 actors",
    ),
    pytest.param(
        {"data__num_clients": 5, "runtime__clients_per_batch": 2, "federation__cohort_size": 3},
        {"placement": "auto"},
        3,
        id="5 clients in batches of 2, in 3 actors",
    ),
    pytest.param(
        {
            "data__num_clients": 5,
            "federation__cohort_size": 3,
            "communication__dtype": "float16",
            "communication__top_k": 0.4,
            "participation__availability": 0.7,
            "participation__slowness_spread": 0.5,
            "participation__over_selection": 1.5,
        },
        {"placement": "pooled", "num_actors": 2},
        2,
        id="smaller messages and simulated participation, 5 clients in 2 actors",
    ),
    pytest.param(
        {"federation__strategy": "pfedeg", "federation__cohort_size": 2, "evaluation__evaluate_on": "aggregated"},
        {"placement": "pooled", "num_actors": 2},
        2,
        id="a table for each client, ranked as aggregated, 3 clients in 2 actors",
    ),
    pytest.param(
        {"federation__strategy": "fedr", "evaluation__protocol": "fede"},
        {"placement": "dedicated"},
        3,
        id="relations federated, FedE's protocol, 3 clients, dedicated",
    ),
    pytest.param(
        {"model__scorer": "transe", "training__loss": "self_adversarial", "training__compile": True},
        {"placement": "pooled", "num_actors": 2},
        2,
        id="distances compiled, 3 clients in 2 actors",
        marks=pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (Debian: apt-get install gcc)"),
    ),
    pytest.param(
        {
            "data__num_clients": 5,
            "federation__aggregator": "trimmed_mean",
            "adversary__attack": "alie",
            "adversary__clients": [1, 3],
            "adversary__strength": 1.5,
        },
        {"placement": "pooled", "num_actors": 2},
        2,
        id="a robust aggregator and attackers who collude, 5 clients in 2 actors",
    ),
    pytest.param(
        {
            "adversary__attack": "boost",
            "adversary__clients": [1],
            "adversary__strength": 1e8,
            "federation__max_failed_clients": 1,
        },
        {"placement": "pooled", "num_actors": 2},
        2,
        id="updates that are rejected where they are summed, 3 clients in 2 actors",
    ),
]


@pytest.mark.parametrize(("changes", "placement", "num_actors"), PLACEMENTS)
def test_ray_ends_with_the_bits_of_one_process(
    changes: dict[str, Any],
    placement: dict[str, Any],
    num_actors: int,
    dataset: Path,
    in_process: Outcomes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # the repository's root would hide an import that workers miss
    runtime_changes = {f"runtime__{name}": value for name, value in placement.items()}
    seen: list[int] = []

    def factory(experiment: Any) -> Any:
        runtime = ray_runtime(experiment)
        seen.append(len(runtime.pool))  # type: ignore[attr-defined]
        return runtime

    simulation.run(small_config(dataset, tmp_path / "ray", **changes, **runtime_changes), factory)
    assert seen == [num_actors]
    # Dedicated clients train one by one; else config and sizes decide who shares a batch.
    alone = {"runtime__clients_per_batch": 1} if placement["placement"] == "dedicated" else {}
    assert outcome(tmp_path / "ray") == in_process(**changes, **alone)


@pytest.mark.parametrize("shelved", [False, True], ids=["state in memory", "state on a shelf"])
def test_clients_that_move_between_actors_change_no_bit(
    shelved: bool, dataset: Path, in_process: Outcomes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each round but the first, the first batch of an actor goes to the other, back and forth."""
    moved: list[Move] = []

    def shuttle(groups: Sequence[Sequence[tuple[int, ...]]], seconds: Mapping[tuple[int, ...], float]) -> list[Move]:
        assert sorted(seconds) == sorted(batch for group in groups for batch in group)
        source = len(moved) % 2
        moved.append(Move(groups[source][0], source, 1 - source))
        return moved[-1:]

    monkeypatch.setattr(actors.runtime, "rebalance", shuttle)
    monkeypatch.setattr(actors.runtime, "BALANCE_ROUNDS", 1)
    changes = {"data__num_clients": 5, "runtime__clients_per_batch": 2}
    here = {"runtime__scratch": str(tmp_path) if shelved else None}
    placed = {"runtime__placement": "pooled", "runtime__num_actors": 2}
    simulation.run(small_config(dataset, tmp_path / "ray", **changes, **placed, **here), ray_runtime)
    assert len(moved) == 2
    assert outcome(tmp_path / "ray") == in_process(**changes)


def test_the_comparison_sees_a_difference(in_process: Outcomes) -> None:
    assert in_process() != in_process(seed=1)


def test_the_server_makes_the_same_model_of_updates_in_any_order(dataset: Path, tmp_path: Path) -> None:
    experiment = prepare(small_config(dataset, tmp_path / "unused"))
    runtime = InProcessRuntime(experiment)
    assert runtime.server is not None
    runtime.train(1, [0, 1, 2])
    before = {name: value.clone() for name, value in runtime.server.state().items()}
    broadcast = runtime.server.begin_round(2)
    updates: list[ClientUpdate] = []
    for client in runtime.clients.values():
        update, _ = client.train(2, broadcast.for_entities(client.entity_ids))
        assert update is not None
        updates.append(update)

    states = []
    for order in itertools.permutations(updates):
        server = Server(
            runtime.server.config, runtime.server.strategy, experiment.num_entities, experiment.feature_dims
        )
        for client in runtime.clients.values():
            server.register(client.hello())
        server.load_state(before)
        server.begin_round(2)
        for update in order:
            server.receive(update)
        server.finish_round()
        states.append(server.state())
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        for name, value in state.items():
            assert torch.equal(value, states[0][name]), name


def test_messages_are_contiguous_so_that_sending_them_changes_no_sum(dataset: Path, tmp_path: Path) -> None:
    runtime = InProcessRuntime(prepare(small_config(dataset, tmp_path / "unused")))
    assert runtime.server is not None
    broadcast = runtime.server.begin_round(1)
    client = runtime.clients[0]
    update, _ = client.train(1, broadcast.for_entities(client.entity_ids))
    assert update is not None
    assert update.soft_queries is not None
    tensors = [update.entity, *update.modules.values(), update.tokens, update.soft_queries.queries]
    assert all(tensor is not None and tensor.is_contiguous() for tensor in tensors)
