"""The network that the learned imputers beside HidE are made of, and what it is told of an entity."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from fedsim.models.imputers.denoiser import flatten_tokens
from fedsim.models.parameters import Params, linear, linear_init


def perceptron_init(
    name: str, in_dim: int, hidden: int, out_dim: int, generator: torch.Generator, *, scale: float = 0.1
) -> Params:
    """Make a network with one hidden layer, whose output starts small."""
    params = linear_init(f"{name}.in", in_dim, hidden, generator)
    return params | linear_init(f"{name}.out", hidden, out_dim, generator, scale=scale)


def perceptron(params: Mapping[str, Tensor], name: str, inputs: Tensor) -> Tensor:
    """Apply the network to inputs [..., in_dim]; result [..., out_dim]."""
    return linear(params, f"{name}.out", functional.silu(linear(params, f"{name}.in", inputs)))


def known_width(num_tokens: int, dim: int) -> int:
    """Return the width of `known_input`."""
    return num_tokens * (dim + 1)


def known_input(values: Tensor, known: Tensor) -> Tensor:
    """Put the known tokens of an entity side by side, zero for the others, with their flags.

    Args:
        values: [num_tokens, batch, dim].
        known: bool [num_tokens, batch].

    Returns:
        [batch, known_width].
    """
    flags = known.to(values.dtype)
    return torch.cat([flatten_tokens(values * flags.unsqueeze(-1)), flags.T], 1)


def as_tokens(flat: Tensor, num_tokens: int) -> Tensor:
    """Divide [batch, num_tokens * dim] into tokens, [num_tokens, batch, dim]."""
    tokens: Tensor = flat.unflatten(1, (num_tokens, -1))
    return tokens.transpose(0, 1)
