"""What is hidden: exact counts, independent draws per client and modality, and never a feature that does not exist."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data.modalities import visible_mask
from fedsim.errors import ConfigError

AVAILABLE = np.arange(100) % 2 == 0  # 50 of 100 entities


def mask(available: np.ndarray = AVAILABLE, **changes: Any) -> np.ndarray:
    arguments: dict[str, Any] = {
        "modality": "image",
        "client": 0,
        "num_clients": 10,
        "missing_rate": 0.5,
        "pattern": "random",
        "seed": 7,
    }
    return visible_mask(available, **(arguments | changes))


@given(rate=st.floats(0, 1), num=st.integers(0, 60), seed=st.integers(0, 5), client=st.integers(0, 9))
def test_random_hides_exactly_the_rounded_share(rate: float, num: int, seed: int, client: int) -> None:
    available = np.arange(60) < num
    visible = mask(available, missing_rate=rate, seed=seed, client=client)
    assert int(visible.sum()) == num - round(rate * num)
    assert not (visible & ~available).any()


def test_draws_repeat_and_differ_by_client_modality_and_seed() -> None:
    assert np.array_equal(mask(), mask())
    for change in ({"client": 1}, {"modality": "text"}, {"seed": 8}):
        assert not np.array_equal(mask(), mask(**change))


def test_client_hides_whole_modalities_at_the_rounded_number_of_clients() -> None:
    visible = [mask(pattern="client", client=client, missing_rate=0.3) for client in range(10)]
    num_visible = [int(item.sum()) for item in visible]
    assert sorted(num_visible) == [0] * 3 + [50] * 7


def test_natural_hides_nothing_and_copies() -> None:
    visible = mask(pattern="natural", missing_rate=0.9)
    assert np.array_equal(visible, AVAILABLE)
    assert visible is not AVAILABLE


def test_a_mask_does_not_change_its_input() -> None:
    available = AVAILABLE.copy()
    mask(available, missing_rate=1.0)
    assert np.array_equal(available, AVAILABLE)


def test_a_rate_out_of_range_and_an_unknown_pattern_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"missing_rate of image: 1\.5 is not in 0\.\.1"):
        mask(missing_rate=1.5)
    with pytest.raises(ConfigError, match="'block' is not known; choose one of random, client, natural"):
        mask(pattern="block")
