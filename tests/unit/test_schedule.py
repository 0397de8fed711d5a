"""Noise schedules and the DDIM step (method.md eq. 5 and 7)."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments import generator
from fedsim.models.imputers.schedule import add_noise, clean_from_noise, ddim_step, sampling_times, signal_levels

SCHEDULES = ("cosine", "linear")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 50, 100, 1000])
def test_a_schedule_falls_from_signal_to_noise(schedule: str, steps: int) -> None:
    """Whatever K, abar_0 = 1 and the terminal signal-to-noise ratio abar_K / (1 - abar_K) is below 1e-3."""
    levels = signal_levels(schedule, steps)
    assert levels.shape == (steps + 1,)
    assert float(levels[0]) == 1.0
    assert bool((levels[1:] <= levels[:-1]).all())
    assert len(levels.unique()) >= len(levels) - 2, "no step is lost to the floor of abar but the very last"
    assert 0 < float(levels[-1]) < 1e-3
    assert float(levels[-1] / (1 - levels[-1])) < 1e-3


def test_the_cosine_schedule_by_hand() -> None:
    """Half-way, cos^2((0.5 + 0.008) / 1.008 * pi / 2) = 0.49376; over cos^2(0.008 / 1.008 * pi / 2) = 0.99984."""
    assert math.isclose(float(signal_levels("cosine", 2)[1]), 0.49384, abs_tol=1e-4)


def test_the_linear_schedule_at_1000_steps_is_that_of_ho() -> None:
    """With K = 1000 it follows prod(1 - beta), beta from 1e-4 to 0.02, which ends at 4.04e-5."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    expected = torch.cumprod(1 - betas, 0)
    levels = signal_levels("linear", 1000)[1:].double()
    assert torch.allclose(levels, expected, atol=2e-3)
    assert math.isclose(float(levels[-1]), 4.04e-5, rel_tol=0.15)


def test_noise_by_hand() -> None:
    """At abar = 0.25, x_0 = 2 and epsilon = 1: 0.5 * 2 + sqrt(0.75) * 1 = 1.866025; and back."""
    level = torch.tensor([[0.25]])
    noisy = add_noise(torch.tensor([[2.0]]), torch.tensor([[1.0]]), level)
    assert math.isclose(float(noisy), 1.866025, rel_tol=1e-6)
    assert math.isclose(float(clean_from_noise(noisy, torch.tensor([[1.0]]), level)), 2.0, rel_tol=1e-6)


@given(schedule=st.sampled_from(SCHEDULES), steps=st.integers(1, 200), seed=st.integers(0, 99))
def test_epsilon_gives_x_0_back_at_every_step(schedule: str, steps: int, seed: int) -> None:
    """The floor of abar keeps the division by sqrt(abar) harmless: 1e-7 / sqrt(1e-5) = 3e-5."""
    clean, noise = torch.randn(2, steps, 3, generator=generator(seed))
    level = signal_levels(schedule, steps)[1:].unsqueeze(1)
    assert torch.allclose(clean_from_noise(add_noise(clean, noise, level), noise, level), clean, atol=5e-4)


@given(steps=st.integers(2, 100), data=st.data())
def test_a_ddim_step_stays_on_the_path_of_its_noise(steps: int, data: st.DataObject) -> None:
    """With the true x_0 it leads from x_k to the x_k' of the same noise (eta = 0)."""
    k = data.draw(st.integers(1, steps))
    levels = signal_levels("cosine", steps)
    clean, noise = torch.randn(2, 4, 3, generator=generator(k))
    moved = ddim_step(add_noise(clean, noise, levels[k]), clean, levels[k], levels[k - 1])
    assert torch.allclose(moved, add_noise(clean, noise, levels[k - 1]), atol=2e-3)


@given(steps=st.integers(1, 1000), data=st.data())
def test_sampling_times_fall_strictly_from_k_to_0(steps: int, data: st.DataObject) -> None:
    num = data.draw(st.integers(1, steps))
    times = sampling_times(steps, num)
    assert (len(times), times[0], times[-1]) == (num + 1, steps, 0)
    assert all(later < earlier for earlier, later in itertools.pairwise(times))
