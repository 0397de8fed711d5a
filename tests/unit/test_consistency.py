"""Semantic consistency between clients (method.md section 7)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from experiments import generator, small_runtime
from fedsim.evaluation.consistency import (
    MAX_SHARED,
    TokenSample,
    merge_sums,
    sample_tokens,
    semantic_consistency,
    shared_entities,
    sum_samples,
)

X, Y = [1.0, 0.0], [0.0, 2.0]


def _sample(ids: list[int], structure: list[list[float]], image: list[list[float]]) -> TokenSample:
    return TokenSample(torch.tensor(ids), {"local": torch.tensor([structure, image])}, ("structure", "image"))


def test_consistency_by_hand() -> None:
    """Entity 5 has three owners with structure x, x and -x: pairs 1, -1, -1. Entity 9 has two, x and y: pair 0.

    Structure: (1 - 1 - 1 + 0) / 4 = -0.25. Images agree everywhere: 1. Together, x x against -x x has cosine 0, and
    x x against y x (lengths 1, 1 and 2, 1) 1 / sqrt(10): (1 + 0 + 0 + 0.316228) / 4 = 0.329057.
    """
    minus = [-1.0, 0.0]
    samples = [_sample([5, 9], [X, X], [X, X]), _sample([5, 9], [X, Y], [X, X]), _sample([5], [minus], [X])]
    shared = torch.tensor([5, 9])
    found = semantic_consistency(sum_samples(samples, shared))
    assert found["local/structure"] == pytest.approx(-0.25)
    assert found["local/image"] == pytest.approx(1.0)
    assert found["local/total"] == pytest.approx((1 + 10**-0.5) / 4, rel=1e-5)
    # Who sums with whom, and in which order, makes no difference to the bit.
    parts = [sum_samples(samples[1:][::-1], shared), sum_samples(samples[:1], shared)]
    assert semantic_consistency(merge_sums(parts)) == found


@given(seed=st.integers(0, 999), num_clients=st.integers(2, 4))
def test_it_equals_a_loop_over_pairs(seed: int, num_clients: int) -> None:
    draws = generator(seed)
    values = torch.randn(num_clients, 1, 5, 3, generator=draws)
    samples = [TokenSample(torch.arange(5), {"v": part}, ("structure",)) for part in values]
    pairs = [(a, b) for a in range(num_clients) for b in range(a)]
    cosines: list[Tensor] = [torch.cosine_similarity(values[a], values[b], dim=-1) for a, b in pairs]
    expected = float(torch.stack(cosines).mean())
    assert semantic_consistency(sum_samples(samples, torch.arange(5)))["v/structure"] == pytest.approx(
        expected, abs=1e-5
    )


def test_shared_entities_have_two_owners() -> None:
    owned = {0: torch.tensor([0, 1, 2]), 1: torch.tensor([1, 3]), 2: torch.tensor([1, 2, 4])}
    assert shared_entities(owned).tolist() == [1, 2]


def test_nothing_shared_is_nothing_measured() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert semantic_consistency(sum_samples([], empty)) == {}
    sample = TokenSample(empty, {"v": torch.zeros(1, 0, 3)}, ("structure",))
    assert semantic_consistency(sum_samples([sample], empty)) == {}


def test_of_many_shared_entities_some_are_compared() -> None:
    ids = torch.arange(0, 6 * MAX_SHARED, 2)
    shared = shared_entities({0: ids, 1: ids})
    assert len(shared.unique()) == MAX_SHARED
    assert torch.isin(shared, ids).all()
    assert int(shared[-1]) > 5.9 * MAX_SHARED


def test_clients_with_the_same_global_rows_agree() -> None:
    """Right after joining, all clients hold the server's rows: the structure tokens are the same."""
    runtime = small_runtime({"data.num_clients": 3})
    owned = {number: client.entity_ids for number, client in runtime.clients.items()}
    samples = [sample_tokens(client, shared_entities(owned), 0) for client in runtime.clients.values()]
    found = semantic_consistency(sum_samples(samples, shared_entities(owned)))
    assert found["local/structure"] == pytest.approx(1.0, abs=1e-5)
    assert set(found) == {
        f"{view}/{token}" for view in ("local", "global") for token in ("structure", "text", "image", "total")
    }
    assert found["local/image"] < 1.0
