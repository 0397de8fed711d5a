"""Placement: what is chosen for which cluster, and what is said when it does not fit."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.cluster import available_memory, private_memory
from actors.placement import Move, NodeResources, deal, plan_placement, rebalance
from actors.runtime import BALANCE_ROUNDS, RayRuntime
from fedsim.config import RuntimeConfig
from fedsim.errors import RunError

GB = 1e9


def _plan(config: RuntimeConfig, num_clients: int, *nodes: NodeResources, free: NodeResources | None = None):
    total = NodeResources(*(sum(getattr(n, name) for n in nodes) for name in ("cpus", "gpus", "memory_bytes")))
    return plan_placement(
        config, {(client,): 1.0 for client in range(num_clients)}, nodes, free or total, with_server=True
    )


def test_the_default_config_is_dedicated_on_two_cores() -> None:
    plan = _plan(RuntimeConfig(), 3, NodeResources(2, 0, 8 * GB))
    assert plan.kind == "dedicated"
    assert plan.groups == (((0,),), ((1,),), ((2,),))
    assert plan.num_cpus == 0.5
    assert plan.lines[0] == ("dedicated: 3 client actors, one per client, each on 0.5 CPU, server actor on 0.5 CPU")


@pytest.mark.parametrize(
    ("node", "why"),
    [
        (NodeResources(2, 0, 100 * GB), "cpus: 4 actors of half a CPU, one of them the server"),
        (NodeResources(64, 0, 1 * GB), "memory: 4 actors of 250 MB, one of them the server"),
    ],
)
def test_auto_pools_what_does_not_fit(node: NodeResources, why: str) -> None:
    plan = _plan(RuntimeConfig(), 300, node)
    assert plan.kind == "pooled", why
    assert len(plan.groups) == 3
    assert sorted(client for group in plan.groups for (client,) in group) == list(range(300))
    resource = why.split(":")[0].replace("cpus", "CPUs").replace("memory", "GB of memory")
    assert plan.lines[1].startswith(f"placement auto: room for 3 client actors, not for 300 (limit: {resource}); ")


def test_a_share_of_a_gpu_lies_on_one_gpu() -> None:
    """0.4 of a GPU fits twice on each of 2 GPUs, not 5 times on both together."""
    plan = _plan(RuntimeConfig(gpus_per_client=0.4), 5, NodeResources(16, 2, 100 * GB))
    assert plan.kind == "pooled"
    assert len(plan.groups) == 4
    assert plan.num_gpus == 0.4


def test_all_resources_of_an_actor_lie_on_one_node() -> None:
    """The GPUs are on a node with CPUs for two actors; the CPUs of the other node do not help them."""
    nodes = NodeResources(1, 4, 100 * GB), NodeResources(32, 0, 100 * GB)
    assert len(_plan(RuntimeConfig(gpus_per_client=0.5), 5, *nodes).groups) == 2


def test_actors_of_others_are_left_alone() -> None:
    plan = _plan(RuntimeConfig(), 7, NodeResources(4, 0, 100 * GB), free=NodeResources(1.5, 0, 50 * GB))
    assert len(plan.groups) == 2


def test_a_pool_is_never_larger_than_the_number_of_clients() -> None:
    plan = _plan(RuntimeConfig(placement="pooled", num_actors=8), 3, NodeResources(16, 0, 100 * GB))
    assert len(plan.groups) == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"placement": "dedicated", "cpus_per_actor": 1},
            r"dedicated placement of 3 clients needs 4 CPUs \(3 client actors and the server, 1 each\), "
            r"but 2 are available; lower runtime.cpus_per_actor",
        ),
        (
            {"placement": "dedicated", "gpus_per_client": 0.5},
            r"needs 1.5 GPUs \(3 client actors, 0.5 each\), but 0 are available; lower runtime.gpus_per_client",
        ),
        ({"placement": "pooled", "num_actors": 2, "cpus_per_actor": 1}, "a pool of 2 client actors needs 3 CPUs"),
        ({"cpus_per_actor": 4}, "a pool of 1 client actors needs 8 CPUs"),
    ],
)
def test_what_does_not_fit_is_named_with_what_there_is(config: dict[str, object], message: str) -> None:
    with pytest.raises(RunError, match=message):
        _plan(RuntimeConfig.model_validate(config), 3, NodeResources(2, 0, 8 * GB))


def test_clients_are_dealt_by_work() -> None:
    work = {(0,): 10.0, (1,): 1.0, (2, 4): 1.0, (3,): 8.0}
    assert deal(work, 2) == (((0,),), ((3,), (1,), (2, 4)))


def test_auto_pools_clients_that_train_together() -> None:
    node = NodeResources(16, 0, 100 * GB)
    work = {(0, 2): 3.0, (1, 3): 2.0}
    plan = plan_placement(RuntimeConfig(), work, [node], node, with_server=True)
    assert plan.kind == "pooled"
    assert plan.groups == (((0, 2),), ((1, 3),))
    assert plan.lines[1].startswith("placement auto: 4 clients train together in 2 batches; 100.0 GB of memory free")


def test_batches_move_from_the_busiest_actor_to_the_idlest() -> None:
    """10 s against 2 s: the batch of 4 s, half of the gap, makes it 6 and 6. Even actors are left alone."""
    seconds = {(0,): 5.0, (1, 2): 4.0, (3,): 1.0, (4,): 2.0}
    groups = [[(0,), (1, 2), (3,)], [(4,)]]
    assert rebalance(groups, seconds) == [Move((1, 2), 0, 1)]
    assert rebalance([[(0,), (3,)], [(1, 2), (4,)]], seconds) == []


def test_a_batch_that_fills_an_actor_alone_stays() -> None:
    assert rebalance([[(0,)], []], {(0,): 10.0}) == []
    assert rebalance([[(0,)], [(1,)]], {(0,): 10.0, (1,): 1.0}) == []


@given(
    seconds=st.lists(st.floats(0, 100), min_size=1, max_size=12),
    actors=st.lists(st.integers(0, 3), min_size=12, max_size=12),
)
def test_moves_never_make_the_busiest_actor_busier(seconds: list[float], actors: list[int]) -> None:
    groups: list[list[tuple[int, ...]]] = [[] for _ in range(4)]
    for client, actor in zip(range(len(seconds)), actors, strict=False):
        groups[actor].append((client,))
    measured = {(client,): value for client, value in enumerate(seconds)}
    before = max(sum(measured[batch] for batch in group) for group in groups)
    for move in rebalance(groups, measured):
        groups[move.source].remove(move.batch)
        groups[move.target].append(move.batch)
    assert max(sum(measured[batch] for batch in group) for group in groups) <= before + 1e-9
    assert sorted(batch for group in groups for batch in group) == sorted(measured)


def test_the_clients_state_leaves_less_memory_for_actors() -> None:
    """Of 2 GB, 1.25 GB are the clients': 0.75 GB carry three processes, one of them the server."""
    node = NodeResources(64, 0, 2 * GB)
    work = {(client,): 1.0 for client in range(50)}
    plan = plan_placement(RuntimeConfig(), work, [node], node, with_server=True, state_bytes=1.25 * GB)
    assert len(plan.groups) == 2
    assert plan.lines[1].endswith("2.0 GB of memory free, 1.2 GB of it for the clients' state")


@pytest.mark.parametrize(("slow", "moved"), [([1], 0), ([1, 2], 0), ([0, 1, 2], 2)])
def test_one_slow_round_moves_nothing(slow: list[int], moved: int) -> None:
    """Actor a holds clients 0, 1, 2, b holds 3; of five rounds, client 0 takes ten times as long in the slow ones.

    Three of five are the usual: 12 seconds beside 3, so clients 1 and 2 go to b.
    """
    moves = []
    pool = [SimpleNamespace(name="a", batches=((0,), (1,), (2,))), SimpleNamespace(name="b", batches=((3,),))]
    seconds = {client: [3.0 if client == 3 else 1.0] * BALANCE_ROUNDS for client in range(4)}
    for round_num in slow:
        seconds[0][round_num] = 10.0
    runtime = SimpleNamespace(rounds_since_balance=BALANCE_ROUNDS, pool=pool, measured=seconds)
    runtime.crew, runtime._move = SimpleNamespace(clients=range(4)), lambda *move: moves.append(move)
    RayRuntime._balance(cast(RayRuntime, runtime))
    assert len(moves) == moved
    assert runtime.rounds_since_balance == 0


def test_memory_is_measured() -> None:
    free, mine = available_memory(), private_memory()
    assert free is not None
    assert 1e6 < mine < 1e12
    block = np.ones(40_000_000, dtype=np.uint8)
    assert private_memory() > mine + 0.9 * block.nbytes
