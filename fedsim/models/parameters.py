"""Parameter values: flat dicts of tensors, their initialisation and their views."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

Params = dict[str, Tensor]


def linear_init(
    name: str, in_dim: int, out_dim: int, generator: torch.Generator, *, scale: float = 1.0
) -> dict[str, Tensor]:
    """Make `<name>.weight` [in_dim, out_dim] with standard deviation scale / sqrt(in_dim), and a zero `<name>.bias`."""
    weight = torch.randn(in_dim, out_dim, generator=generator) * (scale / math.sqrt(in_dim))
    return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(out_dim)}


def linear(params: Mapping[str, Tensor], name: str, inputs: Tensor) -> Tensor:
    """Apply `<name>.weight` and `<name>.bias` to inputs [..., in_dim]; result [..., out_dim]."""
    return inputs @ params[f"{name}.weight"] + params[f"{name}.bias"]


def layer_norm(values: Tensor) -> Tensor:
    """Standardise the last dimension (no learned scale), so that every token has unit variance (eq. 1 and 4)."""
    return functional.layer_norm(values, values.shape[-1:])


def select_view(params: Mapping[str, Tensor], view: str) -> Params:
    """Take the parameters of one view, without its prefix: `local/entity` becomes `entity`."""
    prefix = f"{view}/"
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def with_prefix(params: Mapping[str, Tensor], prefix: str) -> Params:
    """Put `<prefix>/` before every name."""
    return {f"{prefix}/{name}": value for name, value in params.items()}


def overwrite(own: Params, values: Mapping[str, Tensor], device: torch.device | None = None) -> None:
    """Set copies of values, in the tensors that are there already where they fit.

    What lives from round to round so stays where it is in memory. New tensors every round would come to lie among those
    of the training, and leave holes between them that no tensor fits.

    Args:
        own: is changed.
        values: their new values, of any device.
        device: of tensors that are not there yet; None is that of the value.
    """
    for name, value in values.items():
        kept = own.get(name)
        if kept is not None and kept.shape == value.shape and kept.dtype == value.dtype:
            kept.copy_(value.detach())
        else:
            own[name] = value.detach().to(device, copy=True, memory_format=torch.contiguous_format)


def take_rows(table: Tensor, ids: Tensor) -> Tensor:
    """Take the same rows of each part of a table.

    Args:
        table: [..., num_parts, num_rows, dim].
        ids: int64 [..., batch].

    Returns:
        [..., num_parts, batch, dim].
    """
    num_rows, dim = table.shape[-2:]
    flat = table.reshape(-1, dim)
    offset = torch.arange(0, flat.shape[0], num_rows, device=ids.device).view(*table.shape[:-2], 1)
    rows = ids.unsqueeze(-2) + offset  # [..., num_parts, batch]
    return flat.index_select(0, rows.flatten()).view(*rows.shape, dim)
