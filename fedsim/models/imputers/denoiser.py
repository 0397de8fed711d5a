"""HidE's denoiser: a residual MLP over all tokens of an entity, modulated by step and mask (AdaLN).

Each token enters in one of three states: known (clean, the condition), noised (to be denoised), or hidden (a learned
null token). The server's prototype of a token that is not known enters beside it, with a flag of its own. A prediction
of x_0 starts from the prototype, or without one from the mean of the client's tokens of the kind.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedsim.models.parameters import Params, layer_norm, linear, linear_init

STEP_FEATURES = 64


@dataclass(frozen=True)
class DenoiserInput:
    """What the denoiser is told about each entity besides the noisy tokens.

    Attributes:
        clean: [num_tokens, batch, dim], read where `known`.
        known: bool [num_tokens, batch], c of eq. 6.
        noised: bool [num_tokens, batch]; tokens neither known nor noised are hidden.
        means: of the client's available tokens, [num_tokens, dim].
        prototypes: [num_tokens, batch, dim], read where `has_prototype`; None if there are none at all.
        has_prototype: bool [num_tokens, batch], false wherever `known`; None with them.
    """

    clean: Tensor
    known: Tensor
    noised: Tensor
    means: Tensor
    prototypes: Tensor | None = None
    has_prototype: Tensor | None = None


@dataclass(frozen=True)
class Condition:
    """What does not change during sampling: see `encode_condition`."""

    tokens: Tensor  # [num_tokens, batch, dim], known and hidden tokens, zero where noised
    hidden: Tensor  # [batch, hidden]
    modulation: Tensor  # [batch, num_blocks * 3 * hidden]
    start: Tensor  # [num_tokens, batch, dim], prototypes or means that a prediction of x_0 starts from

    def repeat(self, num_times: int) -> "Condition":
        """Repeat the batch, for several draws."""
        return Condition(
            self.tokens.repeat(1, num_times, 1),
            self.hidden.repeat(num_times, 1),
            self.modulation.repeat(num_times, 1),
            self.start.repeat(1, num_times, 1),
        )


def init_denoiser(num_tokens: int, dim: int, hidden: int, num_blocks: int, generator: torch.Generator) -> Params:
    """Make the parameters, named ``imputer.*``."""
    width = num_tokens * dim
    params = {"imputer.null": torch.randn(num_tokens, dim, generator=generator) * 0.02}
    for part, in_dim in (("tokens", width), ("prototype", width), ("flags", 3 * num_tokens)):
        params |= linear_init(f"imputer.{part}", in_dim, hidden, generator, scale=0.5)
    params |= linear_init("imputer.step_in", STEP_FEATURES, hidden, generator)
    params |= linear_init("imputer.step_out", hidden, num_blocks * 3 * hidden, generator, scale=0.3)
    params |= linear_init("imputer.flags_out", 3 * num_tokens, num_blocks * 3 * hidden, generator, scale=0.3)
    for block in range(num_blocks):
        params |= linear_init(f"imputer.block{block}.in", hidden, hidden, generator)
        params |= linear_init(f"imputer.block{block}.out", hidden, hidden, generator)
    return params | linear_init("imputer.out", hidden, width, generator, scale=0.1)


def encode_condition(params: Mapping[str, Tensor], inputs: DenoiserInput) -> Condition:
    """Compute what does not depend on the step or the noise, once per sampling."""
    known = inputs.known.unsqueeze(-1)
    hidden_token = ~(inputs.known | inputs.noised).unsqueeze(-1)
    null = params["imputer.null"].unsqueeze(1)  # [num_tokens, 1, dim]
    clean = torch.where(known, inputs.clean, torch.where(hidden_token, null, torch.zeros_like(null)))
    if inputs.prototypes is None or inputs.has_prototype is None:
        prototypes, has_prototype = None, torch.zeros_like(inputs.known)
    else:
        prototypes, has_prototype = inputs.prototypes * inputs.has_prototype.unsqueeze(-1), inputs.has_prototype
    flags = torch.cat([inputs.known, inputs.noised, has_prototype]).to(clean.dtype).T  # [batch, 3 num_tokens]
    hidden = linear(params, "imputer.flags", flags)
    start = inputs.means.unsqueeze(1) * ~(inputs.known | has_prototype).unsqueeze(-1)
    if prototypes is not None:
        start = start + prototypes
        hidden = hidden + linear(params, "imputer.prototype", flatten_tokens(prototypes))
    return Condition(clean, hidden, linear(params, "imputer.flags_out", flags), start)


def step_modulation(params: Mapping[str, Tensor], steps: int, times: Sequence[int] | None = None) -> Tensor:
    """Return the AdaLN modulation of some steps, or of every step 0..K, [num_times, num_blocks * 3 * hidden]."""
    weight = params["imputer.step_in.weight"]
    asked = torch.tensor(range(steps + 1) if times is None else times, device=weight.device, dtype=weight.dtype)
    time = asked.unsqueeze(1) / steps * 1000
    half = STEP_FEATURES // 2
    frequency = torch.exp(torch.arange(half, device=weight.device, dtype=weight.dtype) * (-math.log(1e4) / half))
    waves = torch.cat([torch.sin(time * frequency), torch.cos(time * frequency)], 1)  # [num_times, STEP_FEATURES]
    return linear(params, "imputer.step_out", functional.silu(linear(params, "imputer.step_in", waves)))


def denoise(params: Mapping[str, Tensor], condition: Condition, noisy: Tensor, modulation: Tensor) -> Tensor:
    """Predict x_0 (or epsilon) for all tokens.

    Args:
        params: the denoiser's parameters.
        condition: from `encode_condition`.
        noisy: x_k, [num_tokens, batch, dim], zero where a token is not noised.
        modulation: rows of `step_modulation` for each entity's step, [batch or 1, num_blocks * 3 * hidden].

    Returns:
        [num_tokens, batch, dim].
    """
    hidden = condition.hidden + linear(params, "imputer.tokens", flatten_tokens(condition.tokens + noisy))
    width = hidden.shape[-1]
    parts = (modulation + condition.modulation).split(width, dim=-1)
    for block in range(len(parts) // 3):
        scale, shift, gate = parts[3 * block : 3 * block + 3]
        inner = layer_norm(hidden) * (1 + scale) + shift
        inner = functional.silu(linear(params, f"imputer.block{block}.in", inner))
        hidden = hidden + (1 + gate) * linear(params, f"imputer.block{block}.out", inner)
    out = linear(params, "imputer.out", layer_norm(hidden))
    num_tokens, batch, dim = noisy.shape
    return out.view(batch, num_tokens, dim).transpose(0, 1)


def flatten_tokens(tokens: Tensor) -> Tensor:
    """Put an entity's tokens side by side: [num_tokens, batch, dim] to [batch, num_tokens * dim]."""
    return tokens.transpose(0, 1).flatten(1)
