"""Kernels behind the scorers: dot products and distances of queries to rows of a table, block by block.

No tensor of all pairs' vectors, [..., batch, num, dim], is ever made: neither pass holds more of it than a block that
stays in the cache. What a pass needs again is computed again, which costs less than to write and read it.

Leading dimensions `...` stack independent tables and their queries; they are the same for all arguments.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Numbers per block: on a CPU a block stays in the second-level cache, an accelerator wants few large kernels.
_BLOCK_SIZE_CPU = 1 << 17
_BLOCK_SIZE_ACCELERATOR = 1 << 26
# Candidates per block when all are compared with all: few enough for the sums over queries to stay in the cache too.
_BLOCK_COLUMNS_CPU = 128


class Norm(NamedTuple):
    """A norm of differences, and its slope; both may write over the differences.

    Attributes:
        measure: differences [..., dim] -> norms [...].
        slope: differences [..., dim], gradient of the norms [...] -> gradient of the differences [..., dim].
    """

    measure: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]


def _sum_of_sizes(differences: Tensor) -> Tensor:
    return differences.abs_().sum(-1)


def _slope_of_sizes(differences: Tensor, grad: Tensor) -> Tensor:
    return differences.sign_().mul_(grad.unsqueeze(-1))  # 0 at 0, a subgradient


def _sum_of_moduli(differences: Tensor) -> Tensor:
    # 1.7 times as fast as `torch.hypot`, which guards against overflow. Embeddings are far from 1e19, where the
    # squares overflow, and an infinite score is an error anyway.
    re, im = differences.chunk(2, dim=-1)
    return re.square_().addcmul_(im, im).sqrt_().sum(-1)


def _slope_of_moduli(differences: Tensor, grad: Tensor) -> Tensor:
    re, im = differences.chunk(2, dim=-1)
    # d|z| / d re = re / |z|. Below `tiny` the squares underflow; with it as divisor a zero difference has slope 0 (a
    # subgradient, where the derivative of a square root is NaN) and no slope exceeds 1.
    scale = re.square().addcmul_(im, im).clamp_min_(torch.finfo(re.dtype).tiny).rsqrt_().mul_(grad.unsqueeze(-1))
    re.mul_(scale)
    im.mul_(scale)
    return differences


L1 = Norm(_sum_of_sizes, _slope_of_sizes)
"""Sum of absolute values."""

MODULI = Norm(_sum_of_moduli, _slope_of_moduli)
"""Sum of the moduli of complex numbers, stored as all real parts, then all imaginary parts."""


def take_rows(tables: Tensor, ids: Tensor) -> Tensor:
    """Take the same rows of every part's table.

    Args:
        tables: [..., num_parts, num_rows, dim].
        ids: int64 [..., batch].

    Returns:
        [..., num_parts, batch, dim].
    """
    *stack, num_rows, dim = tables.shape
    offset = torch.arange(torch.Size(stack).numel(), device=ids.device).view(*stack, 1) * num_rows
    # Its gradient is summed in a fixed order on any number of threads, which that of indexing is not.
    return functional.embedding(ids.unsqueeze(-2) + offset, tables.reshape(-1, dim))


def dot_rows(query: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """Multiply each query with its own rows of the table.

    Args:
        query: [..., batch, dim].
        table: [..., num_rows, dim].
        ids: int64 [..., batch, num].

    Returns:
        Dot products. [..., batch, num]
    """
    products: Tensor = _DotRows.apply(*_flatten(query, table, ids))  # type: ignore[no-untyped-call]
    return products.view(ids.shape)


def distance_rows(query: Tensor, table: Tensor, ids: Tensor, norm: Norm) -> Tensor:
    """Measure each query's distance to its own rows of the table; shapes as in `dot_rows`."""
    distances: Tensor = _DistanceRows.apply(*_flatten(query, table, ids), norm)  # type: ignore[no-untyped-call]
    return distances.view(ids.shape)


def distance(query: Tensor, candidates: Tensor, norm: Norm) -> Tensor:
    """Measure the distances of all pairs: [..., batch, dim], [..., num, dim] -> [..., batch, num]."""
    stacked = [value.reshape(-1, *value.shape[-2:]) for value in (query, candidates)]
    distances: Tensor = _Distance.apply(*stacked, norm)  # type: ignore[no-untyped-call]
    return distances.view(*query.shape[:-1], candidates.shape[-2])


def _flatten(query: Tensor, table: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Join stacked tables to one: [num_queries, dim], [num_tables * num_rows, dim], int64 [num_queries, num]."""
    num_rows, dim = table.shape[-2:]
    if table.shape[:-2].numel() > 1:
        offset = torch.arange(table.shape[:-2].numel(), device=ids.device) * num_rows
        ids = ids + offset.view(*table.shape[:-2], 1, 1)
    return query.reshape(-1, dim), table.reshape(-1, dim), ids.reshape(-1, ids.shape[-1])


class _DotRows(torch.autograd.Function):
    """All three products are weighted sums of rows, for which `embedding_bag` is the fused kernel."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        """Compute the dot products, [num_queries, num]."""
        ctx.save_for_backward(query, table, ids)
        if not ids.numel():
            return query.new_zeros(ids.shape)
        # The products are the gradient that the weights of a weighted sum have.
        with torch.enable_grad():
            weights = torch.ones(ids.shape, dtype=query.dtype, device=query.device, requires_grad=True)
            sums = functional.embedding_bag(ids, table.detach(), mode="sum", per_sample_weights=weights)
            (products,) = torch.autograd.grad(sums, weights, query.detach())
        return products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Compute the gradients of the query, [num_queries, dim], and of the table, [num_rows, dim]."""
        query, table, ids = ctx.saved_tensors
        query_grad = table_grad = None
        if not ids.numel():
            return torch.zeros_like(query), torch.zeros_like(table), None
        if ctx.needs_input_grad[0]:
            query_grad = functional.embedding_bag(ids, table, mode="sum", per_sample_weights=grad.contiguous())
        if ctx.needs_input_grad[1]:
            rows, order = ids.flatten().sort(stable=True)
            starts = torch.searchsorted(rows, torch.arange(table.shape[0], device=rows.device))
            weights = grad.flatten()[order]
            users = order // ids.shape[1]  # the queries that a row was compared with
            table_grad = functional.embedding_bag(users, query, starts, mode="sum", per_sample_weights=weights)
        return query_grad, table_grad, None


class _DistanceRows(torch.autograd.Function):
    """Distances of each query to its own rows."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, table: Tensor, ids: Tensor, norm: Norm) -> Tensor:
        """Compute the distances, [num_queries, num]."""
        ctx.save_for_backward(query, table, ids)
        ctx.norm = norm
        distances = query.new_empty(ids.shape)
        for rows, columns, differences in _row_differences(query, table, ids):
            distances[rows, columns] = norm.measure(differences)
        return distances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Compute the gradients of the query, [num_queries, dim], and of the table, [num_rows, dim]."""
        query, table, ids = ctx.saved_tensors
        query_grad, table_grad = torch.zeros_like(query), torch.zeros_like(table)
        for rows, columns, differences in _row_differences(query, table, ids):
            slope = ctx.norm.slope(differences, grad[rows, columns])  # [rows, columns, dim]
            query_grad[rows] += slope.sum(1)
            _subtract_rows(table_grad, ids[rows, columns].flatten(), slope.flatten(0, 1))
        return query_grad, table_grad, None, None


class _Distance(torch.autograd.Function):
    """Distances of all pairs."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, candidates: Tensor, norm: Norm) -> Tensor:
        """Compute the distances: [num_tables, batch, dim], [num_tables, num, dim] -> [num_tables, batch, num]."""
        ctx.save_for_backward(query, candidates)
        ctx.norm = norm
        distances = query.new_empty(*query.shape[:2], candidates.shape[1])
        for tables, rows, columns, differences in _all_differences(query, candidates):
            distances[tables, rows, columns] = norm.measure(differences)
        return distances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Compute the gradients of the query and of the candidates, shapes as theirs."""
        query, candidates = ctx.saved_tensors
        query_grad, candidates_grad = torch.zeros_like(query), torch.zeros_like(candidates)
        for tables, rows, columns, differences in _all_differences(query, candidates):
            slope = ctx.norm.slope(differences, grad[tables, rows, columns])  # [tables, rows, columns, dim]
            query_grad[tables, rows] += slope.sum(2)
            candidates_grad[tables, columns] -= slope.sum(1)
        return query_grad, candidates_grad, None


def _subtract_rows(table: Tensor, ids: Tensor, values: Tensor) -> None:
    """Take values [num, dim] off rows [num] of a table, rows repeated or not, in a fixed order."""
    if table.device.type == "cpu":
        table.index_add_(0, ids, values, alpha=-1)
    else:  # sorts; the other would add in any order
        table.index_put_((ids,), values.neg_(), accumulate=True)


def _row_differences(query: Tensor, table: Tensor, ids: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Subtract each query's own rows from it, in blocks of (queries, columns of ids, [queries, columns, dim])."""
    dim = query.shape[1]
    buffer: Tensor | None = None
    for _, rows, columns in _blocks((1, *ids.shape), dim, query.device, ids.shape[1]):
        block = ids[rows, columns]
        if buffer is None:
            buffer = query.new_empty(block.numel(), dim)
        gathered = torch.index_select(table, 0, block.flatten(), out=buffer[: block.numel()]).view(*block.shape, dim)
        yield rows, columns, torch.sub(query[rows].unsqueeze(1), gathered, out=gathered)


def _all_differences(query: Tensor, candidates: Tensor) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Subtract all pairs in blocks of (tables, queries, candidates, [tables, queries, candidates, dim])."""
    dim, num = query.shape[2], candidates.shape[1]
    width = min(num, _BLOCK_COLUMNS_CPU) if query.device.type == "cpu" else num
    buffer: Tensor | None = None
    for tables, rows, columns in _blocks((*query.shape[:2], num), dim, query.device, width):
        own, others = query[tables, rows].unsqueeze(2), candidates[tables, columns].unsqueeze(1)
        shape = (own.shape[0], own.shape[1], others.shape[2], dim)
        if buffer is None:
            buffer = query.new_empty(shape).flatten()
        block = buffer[: torch.Size(shape).numel()].view(shape)
        yield tables, rows, columns, torch.sub(own, others, out=block)


def _blocks(
    shape: tuple[int, int, int], dim: int, device: torch.device, width: int
) -> Iterator[tuple[slice, slice, slice]]:
    """Cut all pairs into blocks, the largest first, in an order that the shapes alone decide.

    Args:
        shape: stacked tables, queries of each, candidates of each query.
        dim: numbers per pair.
        device: of the tensors.
        width: columns of a block, fewer where they do not fit; all if whole tables fit.
    """
    num_tables, num_rows, num_columns = shape
    block_size = _BLOCK_SIZE_CPU if device.type == "cpu" else _BLOCK_SIZE_ACCELERATOR
    num_pairs = max(block_size // max(dim, 1), 1)
    if num_rows * num_columns <= num_pairs:
        width, height = max(num_columns, 1), max(num_rows, 1)
        depth = num_pairs // max(num_rows * num_columns, 1)
    else:
        width = max(min(width, num_pairs), 1)
        height, depth = max(num_pairs // width, 1), 1
    for table in range(0, num_tables, depth):
        for row in range(0, num_rows, height):
            for column in range(0, num_columns, width):
                yield slice(table, table + depth), slice(row, row + height), slice(column, column + width)
