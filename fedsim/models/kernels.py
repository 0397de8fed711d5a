"""Kernels behind the scorers: each query against its own rows of a table, without a tensor of all pairs' vectors."""

import torch
from torch import Tensor


def dot_rows(query: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """Multiply each query with its own rows of the table.

    Args:
        query: [..., batch, dim].
        table: [..., num_rows, dim].
        ids: int64 [..., batch, num].

    Returns:
        Dot products. [..., batch, num]
    """
    return torch.einsum("...d,...nd->...n", query, gather_rows(table, ids))


def gather_rows(table: Tensor, ids: Tensor) -> Tensor:
    """Gather rows of stacked tables: [..., num_rows, dim], int64 [..., batch, num] -> [..., batch, num, dim]."""
    num_rows, dim = table.shape[-2:]
    flat = table.reshape(-1, dim)
    offset = torch.arange(0, flat.shape[0], num_rows, device=ids.device).view(*table.shape[:-2], 1, 1)
    return flat[ids + offset]
