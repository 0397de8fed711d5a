"""Noise schedules of the forward process (eq. 5) and the DDIM step.

Cosine: Nichol and Dhariwal, 2021. Linear: that of Ho et al., 2020, in its continuous form (Song et al., "Score-based
generative modeling through SDEs", 2021), which ends near zero signal at any K: the discrete betas keep 60 % of the
signal at K = 50, and scaled by 1000 / K they pass 1 at K < 20. DDIM: Song et al., 2021, eta = 0.
"""

import math

import torch
from torch import Tensor

MIN_SIGNAL = 1e-5  # floor of abar, so that x_0 can be recovered from epsilon at the last step
BETA_FIRST, BETA_LAST = 0.1, 20.0  # rate of noise of the linear schedule at time 0 and 1: 1000 steps of Ho's betas


def signal_levels(schedule: str, steps: int) -> Tensor:
    """Return abar_0 .. abar_K, float32 [steps + 1]; abar_0 = 1, falling to nearly 0."""
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    if schedule == "cosine":
        levels = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        levels = levels / levels[0]
    else:
        levels = torch.exp(-(BETA_FIRST * time + (BETA_LAST - BETA_FIRST) * time**2 / 2))
    return levels.clamp(min=MIN_SIGNAL).float()


def add_noise(clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """Draw x_k given x_0 (eq. 5).

    Args:
        clean: x_0, [..., batch, dim].
        noise: standard normal, the same shape.
        level: abar_k, [batch, 1].
    """
    return level.sqrt() * clean + (1 - level).sqrt() * noise


def clean_from_noise(noisy: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """Recover x_0 from x_k and the predicted epsilon, bounded (tokens have unit variance)."""
    return ((noisy - (1 - level).sqrt() * noise) / level.sqrt()).clamp(-8.0, 8.0)


def ddim_step(noisy: Tensor, clean: Tensor, level: Tensor, next_level: Tensor) -> Tensor:
    """Move from x_k to a less noisy x_k' along the deterministic DDIM path through the estimate of x_0."""
    # epsilon = (x_k - sqrt(abar_k) x_0) / sqrt(1 - abar_k), written as one scaling of each argument
    keep = ((1 - next_level) / (1 - level)).sqrt()
    return clean * (next_level.sqrt() - keep * level.sqrt()) + noisy * keep


def sampling_times(steps: int, sampling_steps: int) -> list[int]:
    """Return S + 1 falling step numbers from K to 0."""
    return [round(steps * (sampling_steps - i) / sampling_steps) for i in range(sampling_steps + 1)]
