"""Ridge regression in closed form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments import generator
from fedsim.models.regression import fit_ridge, regressors


def test_ridge_by_hand() -> None:
    """Of x = 0, 1, 2 and y = 0, 2, 4: S_xx = 2, S_xy = 4, so with lambda 2 the slope is 4 / (2 + 2) = 1.

    The line goes through the means (1, 2), so x = 3 is estimated as 2 + 1 * (3 - 1) = 4. The fourth row is not seen.
    """
    inputs = torch.tensor([[0.0], [1.0], [2.0], [7.0]]).double()
    goal = torch.tensor([[0.0], [2.0], [4.0], [-50.0]]).double()
    estimate = fit_ridge(inputs, goal, torch.tensor([1, 1, 1, 0]), strength=2.0)
    assert estimate(torch.tensor([[3.0]]).double()).tolist() == [[pytest.approx(4.0)]]


@given(seed=st.integers(0, 9999), num_seen=st.integers(0, 12), strength=st.floats(0.01, 1000))
def test_rows_that_are_not_seen_do_not_count(seed: int, num_seen: int, strength: float) -> None:
    """A fit on some rows of a table is the fit on a table of those rows; without rows the estimate is zero."""
    draws = generator(seed)
    inputs, goal = torch.randn(12, 5, generator=draws).double(), torch.randn(12, 3, generator=draws).double()
    seen = torch.randperm(12, generator=draws) < num_seen
    with_all = fit_ridge(inputs, goal, seen, strength)(inputs)
    alone = fit_ridge(inputs[seen], goal[seen], torch.ones(num_seen), strength)(inputs)
    assert torch.allclose(with_all, alone, atol=1e-9)
    if num_seen == 0:
        assert float(with_all.abs().max()) == 0.0


def test_the_regressors_are_the_other_tokens_and_their_flags() -> None:
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]], [[9.0, 9.0], [9.0, 9.0]]])
    available = torch.tensor([[True, True], [True, False], [True, True]])
    found = regressors(tokens, available, 2)
    assert found.tolist() == [[1, 2, 5, 6, 1, 1], [3, 4, 0, 0, 1, 0]]
