"""Which clients share a batch."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import small_experiment
from fedsim.config import make_config
from fedsim.federated.batches import ClientSize, plan_batches, predicted_work, state_bytes
from fedsim.federated.runtime import InProcessRuntime, client_sizes, num_module_numbers

SIZES = {0: ClientSize(10, 90), 1: ClientSize(500, 900), 2: ClientSize(11, 80), 3: ClientSize(480, 900)}


def _batches(sizes: dict[int, ClientSize], **runtime: Any) -> tuple[tuple[int, ...], ...]:
    return plan_batches(make_config({"runtime": runtime}), sizes)


def test_similar_clients_share_a_batch() -> None:
    assert _batches(SIZES, clients_per_batch=2) == ((0, 2), (1, 3))


@pytest.mark.parametrize("runtime", [{"clients_per_batch": 1}, {"clients_per_batch": 4, "placement": "dedicated"}])
def test_one_by_one(runtime: dict[str, Any]) -> None:
    assert _batches(SIZES, **runtime) == ((0,), (1,), (2,), (3,))


@given(
    sizes=st.dictionaries(st.integers(0, 50), st.builds(ClientSize, st.integers(1, 9), st.integers(1, 9)), min_size=1),
    limit=st.integers(1, 5),
)
def test_every_client_is_in_one_batch_whatever_the_order(sizes: dict[int, ClientSize], limit: int) -> None:
    batches = _batches(sizes, clients_per_batch=limit)
    assert sorted(client for batch in batches for client in batch) == sorted(sizes)
    assert max(map(len, batches)) <= limit
    assert batches == _batches(dict(reversed(sizes.items())), clients_per_batch=limit)


def test_work_by_hand() -> None:
    """Two epochs of 90 triples in 3 steps of 32: against all 10 entities 2 * (900 + 16 * 3 * 10) = 2760 rows.

    With 4 negatives, 2 * (360 + 480) = 1680. An untrained client still costs its messages.
    """
    tree = {"training": {"batch_size": 32, "local_epochs": 2, "num_negatives": 4}}
    assert predicted_work(make_config(tree), SIZES[0]) == 2760.0
    assert predicted_work(make_config(tree, {"training.loss": "self_adversarial"}), SIZES[0]) == 1680.0
    assert predicted_work(make_config(tree, {"training.local_epochs": 0}), SIZES[0]) == 1380.0


def test_state_by_hand() -> None:
    """Ten rows of 8 floats, three times, in two views: 10 * 8 * 4 * 3 * 2 bytes; 5 numbers of modules, four times."""
    config = make_config({"model": {"dim": 8}})
    assert state_bytes(config, SIZES[0], 2, 0) == 1920.0
    assert state_bytes(config, SIZES[0], 2, 5) == 1920.0 + 5 * 4 * 4 * 2


@pytest.mark.parametrize("settings", [{}, {"federation.strategy": "fede", "model.imputer": "zero"}])
def test_predicted_state_is_about_what_a_client_keeps(settings: dict[str, Any]) -> None:
    experiment = small_experiment(settings)
    runtime = InProcessRuntime(experiment)
    runtime.train(1, list(runtime.clients))
    sizes, modules = client_sizes(experiment), num_module_numbers(experiment)
    for number, client in runtime.clients.items():
        kept = sum(value.numel() * value.element_size() for value in client.state().values())
        predicted = state_bytes(client.config, sizes[number], len(client.strategy.views), modules)
        assert 0.6 * kept < predicted < 1.4 * kept


@pytest.mark.parametrize(
    ("num_clients", "num_entities", "gpus", "expected"),
    [
        (3, 500, 0.0, 1),  # few clients are spread over actors
        (15, 500, 0.0, 1),
        (40, 500, 0.0, 5),  # so that there are eight batches
        (300, 500, 0.0, 16),
        (300, 2048, 0.0, 4),  # 2^13 rows
        (300, 20_000, 0.0, 1),
        (300, 500, 0.5, 37),
        (3000, 500, 0.5, 256),
    ],
)
def test_the_automatic_rule(num_clients: int, num_entities: int, gpus: float, expected: int) -> None:
    sizes = {client: ClientSize(num_entities, 100) for client in range(num_clients)}
    assert max(map(len, _batches(sizes, gpus_per_client=gpus))) == expected


def test_clients_of_unlike_sizes_do_not_share_a_batch() -> None:
    """Half of the clients have 100 entities and half 151: a batch with both would pad by more than a half."""
    sizes = {client: ClientSize(100 if client % 2 else 151, 50) for client in range(64)}
    assert all(len({client % 2 for client in batch}) == 1 for batch in _batches(sizes))
