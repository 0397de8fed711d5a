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
_BLOCK_SIZE_CPU = 1 << 18
_BLOCK_SIZE_ACCELERATOR = 1 << 26
# Candidates per block when all are compared with all: few enough for the sums over queries to stay in the cache too.
_BLOCK_COLUMNS_CPU = 128


class Norm(NamedTuple):
    """A norm of differences, and its slope; both may write over the differences.

    Attributes:
        measure: differences [..., dim], where the norms go [...].
        slope: differences [..., dim], gradient of the norms [...] -> gradient of the differences [..., dim].
    """

    measure: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]


def _sum_of_sizes(differences: Tensor, out: Tensor) -> Tensor:
    return torch.sum(differences.abs_(), -1, out=out)


def _slope_of_sizes(differences: Tensor, grad: Tensor) -> Tensor:
    return differences.sign_().mul_(grad.unsqueeze(-1))  # 0 at 0, a subgradient


def _sum_of_moduli(differences: Tensor, out: Tensor) -> Tensor:
    # 1.7 times as fast as `torch.hypot`, which guards against overflow. Embeddings are far from 1e19, where the
    # squares overflow, and an infinite score is an error anyway.
    re, im = differences.chunk(2, dim=-1)
    return torch.sum(re.square_().addcmul_(im, im).sqrt_(), -1, out=out)


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


def _root_of_squares(differences: Tensor, out: Tensor) -> Tensor:
    return torch.sum(differences.square_(), -1, out=out).sqrt_()


def _slope_of_root(differences: Tensor, grad: Tensor) -> Tensor:
    squares = differences.square().sum(-1).clamp_min_(torch.finfo(differences.dtype).tiny)  # slope 0 at 0
    return differences.mul_(squares.rsqrt_().mul_(grad).unsqueeze(-1))


L2 = Norm(_root_of_squares, _slope_of_root)
"""Square root of the sum of squares. For all pairs `euclidean` is faster."""

MODULI = Norm(_sum_of_moduli, _slope_of_moduli)
"""Sum of the moduli of complex numbers, stored as all real parts, then all imaginary parts."""


def dot_rows(query: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """Multiply each query with its own rows of the table.

    Args:
        query: [..., batch, dim].
        table: [..., num_rows, dim].
        ids: int64 [..., batch, num].

    Returns:
        Dot products. [..., batch, num]
    """
    products: Tensor = _DotRows.apply(*flatten_tables(query, table, ids))  # type: ignore[no-untyped-call]
    return products.view(ids.shape)


def distance_rows(query: Tensor, table: Tensor, ids: Tensor, norm: Norm) -> Tensor:
    """Measure each query's distance to its own rows of the table; shapes as in `dot_rows`."""
    distances: Tensor = _DistanceRows.apply(*flatten_tables(query, table, ids), norm)  # type: ignore[no-untyped-call]
    return distances.view(ids.shape)


def distance(query: Tensor, candidates: Tensor, norm: Norm) -> Tensor:
    """Measure the distances of all pairs: [..., batch, dim], [..., num, dim] -> [..., batch, num]."""
    stacked = [value.reshape(-1, *value.shape[-2:]) for value in (query, candidates)]
    distances: Tensor = _Distance.apply(*stacked, norm)  # type: ignore[no-untyped-call]
    return distances.view(*query.shape[:-1], candidates.shape[-2])


def euclidean(query: Tensor, candidates: Tensor) -> Tensor:
    """Measure the L2 distances of all pairs by a matrix product; shapes as in `distance`."""
    stacked = [value.reshape(-1, *value.shape[-2:]) for value in (query, candidates)]
    distances: Tensor = _Euclidean.apply(*stacked)  # type: ignore[no-untyped-call]
    return distances.view(*query.shape[:-1], candidates.shape[-2])


class Distances(NamedTuple):
    """Who computes distances: `BLOCKED` here, or `fedsim.models.compiled.COMPILED`.

    Attributes:
        all_pairs: as `distance`.
        rows: as `distance_rows`.
    """

    all_pairs: Callable[[Tensor, Tensor, Norm], Tensor]
    rows: Callable[[Tensor, Tensor, Tensor, Norm], Tensor]


BLOCKED = Distances(distance, distance_rows)
"""By torch's operators, block by block; for every type and device."""


def flatten_tables(query: Tensor, table: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Join stacked tables to one: [num_queries, dim], [num_tables * num_rows, dim], int64 [num_queries, num]."""
    num_rows, dim = table.shape[-2:]
    if table.shape[:-2].numel() > 1:
        offset = torch.arange(table.shape[:-2].numel(), device=ids.device) * num_rows
        ids = ids + offset.view(*table.shape[:-2], 1, 1)
    return query.reshape(-1, dim), table.reshape(-1, dim), ids.reshape(-1, ids.shape[-1]).contiguous()


class _DotRows(torch.autograd.Function):
    """Dot products of each query with its own rows.

    All three products are weighted sums of rows, for which `embedding_bag` is the fused kernel, or their gradient. The
    products themselves are the gradient that the weights of such a sum have; they are computed in the order of the
    rows, see `_DistanceRows`.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        """Compute the dot products, [num_queries, num]."""
        order, rows, users = _in_order(ids, table)
        ctx.save_for_backward(query, table, ids, order, users)
        if not ids.numel():
            return query.new_zeros(ids.shape)
        starts = torch.arange(0, ids.numel(), ids.shape[1], device=ids.device)
        in_order = torch.ops.aten._embedding_bag_per_sample_weights_backward(query, table, rows, starts, users, 0)
        return torch.empty_like(in_order).scatter_(0, order, in_order).view(ids.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Compute the gradients of the query, [num_queries, dim], and of the table, [num_rows, dim]."""
        query, table, ids, order, users = ctx.saved_tensors
        query_grad = table_grad = None
        if not ids.numel():
            return torch.zeros_like(query), torch.zeros_like(table), None
        if ctx.needs_input_grad[0]:
            query_grad = functional.embedding_bag(ids, table, mode="sum", per_sample_weights=grad.contiguous())
        if ctx.needs_input_grad[1]:
            counts = ids.flatten().bincount(minlength=table.shape[0])
            starts = counts.cumsum(0) - counts
            weights = grad.flatten().index_select(0, order)
            table_grad = functional.embedding_bag(users, query, starts, mode="sum", per_sample_weights=weights)
        return query_grad, table_grad, None


class _DistanceRows(torch.autograd.Function):
    """Distances of each query to its own rows, pair by pair in the order of the rows.

    In that order each row of a large table is read, and its gradient written, once and in sequence; the queries, which
    are few, stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, table: Tensor, ids: Tensor, norm: Norm) -> Tensor:
        """Compute the distances, [num_queries, num]."""
        order, rows, users = _in_order(ids, table)
        ctx.save_for_backward(query, table, rows, users, order)
        ctx.norm = norm
        in_order = query.new_empty(rows.shape)
        for pairs, differences in _pair_differences(query, table, rows, users):
            norm.measure(differences, in_order[pairs])
        return torch.empty_like(in_order).scatter_(0, order, in_order).view(ids.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Compute the gradients of the query, [num_queries, dim], and of the table, [num_rows, dim]."""
        query, table, rows, users, order = ctx.saved_tensors
        query_grad, table_grad = torch.zeros_like(query), torch.zeros_like(table)
        in_order = grad.flatten().index_select(0, order)
        for pairs, differences in _pair_differences(query, table, rows, users):
            slope = ctx.norm.slope(differences, in_order[pairs])  # [num_pairs, dim]
            _add_rows(query_grad, users[pairs], slope)
            _add_rows(table_grad, rows[pairs], slope)
        return query_grad, table_grad.neg_(), None, None


class _Distance(torch.autograd.Function):
    """Distances of all pairs."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, candidates: Tensor, norm: Norm) -> Tensor:
        """Compute the distances: [num_tables, batch, dim], [num_tables, num, dim] -> [num_tables, batch, num]."""
        ctx.save_for_backward(query, candidates)
        ctx.norm = norm
        distances = query.new_empty(*query.shape[:2], candidates.shape[1])
        for differences, block, _, _ in _all_differences(query, candidates, distances, query, candidates):
            norm.measure(differences, block)
        return distances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Compute the gradients of the query and of the candidates, shapes as theirs."""
        query, candidates = ctx.saved_tensors
        grads = torch.zeros_like(query), torch.zeros_like(candidates)
        for differences, block, query_grad, candidates_grad in _all_differences(query, candidates, grad, *grads):
            slope = ctx.norm.slope(differences, block)  # [tables, rows, columns, dim]
            query_grad += slope.sum(2)
            candidates_grad -= slope.sum(1)
        return *grads, None


class _Euclidean(torch.autograd.Function):
    """L2 distances of all pairs: |q - c|^2 = |q|^2 + |c|^2 - 2 q c.

    Where q and c almost agree the difference of these terms is rounding, so no slope is taken steeper than it allows.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, candidates: Tensor) -> Tensor:
        """Compute the distances: [num_tables, batch, dim], [num_tables, num, dim] -> [num_tables, batch, num]."""
        own, others = query.square().sum(-1).unsqueeze(2), candidates.square().sum(-1).unsqueeze(1)
        distances = torch.baddbmm(others, query, candidates.mT, alpha=-2).add_(own).clamp_min_(0).sqrt_()
        ctx.save_for_backward(query, candidates, distances, own)
        return distances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of the query and of the candidates, shapes as theirs."""
        query, candidates, distances, own = ctx.saved_tensors
        kind = torch.finfo(distances.dtype)
        least = own.mul(16 * kind.eps).clamp_min_(kind.tiny).sqrt_()  # [num_tables, batch, 1]
        slope = grad / torch.maximum(distances, least)
        query_grad = torch.baddbmm(query * slope.sum(2, keepdim=True), slope, candidates, alpha=-1)
        turned = slope.mT
        return query_grad, torch.baddbmm(candidates * turned.sum(2, keepdim=True), turned, query, alpha=-1)


def _in_order(ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort all pairs of a query and a row of the table by the row; the first of equals stays the first.

    Returns:
        The order, the rows and the queries of the pairs, int64 [ids.numel()] each.
    """
    flat = ids.flatten()
    narrow = flat.int() if table.shape[0] < 1 << 31 else flat  # sorts twice as fast
    order = narrow.sort(stable=True).indices
    return order, flat.index_select(0, order), order // max(ids.shape[1], 1)


def _add_rows(table: Tensor, ids: Tensor, values: Tensor) -> None:
    """Add values [num, dim] to rows [num] of a table, some of them the same, in a fixed order."""
    if table.device.type == "cpu":
        table.index_add_(0, ids, values)
    else:  # sorts, where the other adds in any order
        table.index_put_((ids,), values, accumulate=True)


def _pair_differences(query: Tensor, table: Tensor, rows: Tensor, users: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Subtract a row from a query, pair by pair, in blocks of (pairs, [num_pairs, dim])."""
    dim = query.shape[1]
    size = max(_block_size(query.device) // max(dim, 1), 1)
    own, others = query.new_empty(2, min(size, len(rows)), dim)
    for start in range(0, len(rows), size):
        pairs = slice(start, min(start + size, len(rows)))
        num = pairs.stop - start
        torch.index_select(query, 0, users[pairs], out=own[:num])
        torch.index_select(table, 0, rows[pairs], out=others[:num])
        yield pairs, own[:num].sub_(others[:num])


def _all_differences(
    query: Tensor, candidates: Tensor, pairs: Tensor, of_query: Tensor, of_candidates: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Subtract all pairs in blocks, in an order that the shapes alone decide.

    A block has several tables only if it has all pairs of each.

    Args:
        query: [num_tables, batch, dim].
        candidates: [num_tables, num, dim].
        pairs: what belongs to a pair. [num_tables, batch, num]
        of_query: what belongs to a query. [num_tables, batch, dim]
        of_candidates: what belongs to a candidate. [num_tables, num, dim]

    Yields:
        The differences of a block, [tables, rows, columns, dim], and its parts of the last three arguments.
    """
    num_tables, num_rows, dim = query.shape
    num_columns = candidates.shape[1]
    num_pairs = max(_block_size(query.device) // max(dim, 1), 1)
    if num_rows * num_columns <= num_pairs:
        height, width = max(num_rows, 1), max(num_columns, 1)
        depth = num_pairs // (height * width)
    else:
        widest = min(_BLOCK_COLUMNS_CPU, num_columns) if query.device.type == "cpu" else num_columns
        width = min(widest, num_pairs)
        height, depth = max(num_pairs // width, 1), 1
    buffer = query.new_empty(min(depth, num_tables), min(height, num_rows), min(width, num_columns), dim)
    block = buffer
    tables = (query.unsqueeze(2), of_query, candidates.unsqueeze(1), of_candidates, pairs)
    for own, of_own, others, of_others, both in zip(*(value.split(depth) for value in tables), strict=True):
        columns = list(zip(others.split(width, 2), of_others.split(width, 1), strict=True))
        rows = zip(own.split(height, 1), of_own.split(height, 1), both.split(height, 1), strict=True)
        for row, of_row, both_row in rows:
            for (column, of_column), part in zip(columns, both_row.split(width, 2), strict=True):
                shape = part.shape
                if block.shape[:-1] != shape:
                    block = buffer.flatten()[: shape.numel() * dim].view(*shape, dim)
                yield torch.sub(row, column, out=block), part, of_row, of_column


def _block_size(device: torch.device) -> int:
    return _BLOCK_SIZE_CPU if device.type == "cpu" else _BLOCK_SIZE_ACCELERATOR
