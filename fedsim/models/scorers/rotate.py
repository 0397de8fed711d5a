"""RotatE: a relation is a rotation in the complex plane.

Sun et al., "RotatE: Knowledge Graph Embedding by Relational Rotation in Complex Space", ICLR 2019.

    score(h, r, t) = - sum_i | h_i exp(i theta_i) - t_i |

Symbols: h, t = `entity` or a candidate; theta = `relation`, the phases in radians, half as wide as an entity. A complex
vector of length dim / 2 is stored as dim real numbers, first all real parts, then all imaginary parts. The sum of the
moduli is the distance of the authors' code. Their margin gamma is added by the loss, and their phases are the stored
parameter times pi / embedding_range; here the parameter is the phase.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedsim.errors import ConfigError
from fedsim.models.kernels import gather_rows

# Numbers per block: on a CPU a block and its temporaries stay in the cache, an accelerator wants few large kernels.
_BLOCK_SIZE_CPU = 1 << 16
_BLOCK_SIZE_ACCELERATOR = 1 << 26


class RotatE:
    """Negative sum of moduli of the differences between the rotated head and the tail."""

    name = "rotate"

    def relation_dim(self, dim: int) -> int:
        """Return the width of a relation vector: one phase per complex number, half of an even ``dim``."""
        if dim % 2:
            raise ConfigError(f"dim is {dim}, but scorer 'rotate' needs an even dim (real and imaginary halves)")
        return dim // 2

    def query(self, entity: Tensor, relation: Tensor, *, inverse: bool = False) -> Tensor:
        """Return h rotated by r, or t rotated back; [..., batch, dim], [..., batch, dim / 2] -> [..., batch, dim]."""
        entity_re, entity_im = entity.chunk(2, dim=-1)  # [batch, dim / 2] each
        # A rotation keeps moduli: |h exp(i theta) - t| = |h - t exp(-i theta)|.
        cos, sin = relation.cos(), -relation.sin() if inverse else relation.sin()
        return torch.cat([entity_re * cos - entity_im * sin, entity_re * sin + entity_im * cos], dim=-1)

    def score(self, query: Tensor, candidates: Tensor) -> Tensor:
        """Score all pairs; [..., batch, dim], [..., num, dim] -> [..., batch, num]."""
        batch, num, dim = query.shape[-2], candidates.shape[-2], query.shape[-1]
        pairs = zip(query.reshape(-1, batch, dim), candidates.reshape(-1, num, dim), strict=True)
        distances = [_modulus_distance(q, c.unsqueeze(0)) for q, c in pairs]
        return -torch.stack(distances).view(*query.shape[:-1], num)

    def score_negatives(self, query: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        """Score each query's own candidates, the rows `ids` [..., batch, num_negatives] of the table."""
        dim, num = query.shape[-1], ids.shape[-1]
        distance = _modulus_distance(query.reshape(-1, dim), gather_rows(table, ids).view(-1, num, dim))
        return -distance.view(ids.shape)


def _modulus_distance(query: Tensor, candidates: Tensor) -> Tensor:
    """Sum the moduli of complex differences: [batch, dim], [batch or 1, num, dim] -> [batch, num]."""
    distance: Tensor = _ModulusDistance.apply(query, candidates)  # type: ignore[no-untyped-call]
    return distance


class _ModulusDistance(torch.autograd.Function):
    """The distance, block by block: neither pass holds more than one block of the [batch, num, dim] differences.

    The moduli are not kept for the backward pass but computed again, and where a modulus is 0 its gradient is 0 (a
    subgradient), which the derivative of `torch.hypot` or of a square root would turn into NaN.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, candidates: Tensor) -> Tensor:
        """Compute the distances, [batch, num]."""
        ctx.save_for_backward(query, candidates)
        distance = query.new_empty(query.shape[0], candidates.shape[1])
        for rows, columns in _blocks(query, candidates):
            distance[rows, columns] = _moduli(*_differences(query, candidates, rows, columns)).sum(dim=-1)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of the query, [batch, dim], and the candidates, [batch or 1, num, dim]."""
        query, candidates = ctx.saved_tensors
        half = query.shape[-1] // 2
        query_grad, candidates_grad = torch.zeros_like(query), torch.zeros_like(candidates)
        # Below it the squares underflow; with it as divisor a zero difference has slope 0 and no slope exceeds 1.
        smallest = torch.finfo(query.dtype).tiny ** 0.5
        for rows, columns in _blocks(query, candidates):
            re, im = _differences(query, candidates, rows, columns)  # [rows, columns, dim / 2] each
            # d|z| / d re = re / |z|, weighted by the incoming gradient of the whole distance.
            weight = grad[rows, columns].unsqueeze(-1) / _moduli(re, im).clamp_min_(smallest)
            for part, slot in ((re, slice(0, half)), (im, slice(half, None))):
                slope = part.mul_(weight)
                query_grad[rows, slot] += slope.sum(dim=1)
                if candidates.shape[0] == 1:
                    candidates_grad[0, columns, slot] -= slope.sum(dim=0)
                else:
                    candidates_grad[rows, columns, slot] -= slope
        return query_grad, candidates_grad


def _differences(query: Tensor, candidates: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
    """Subtract one block, real and imaginary part: [rows, columns, dim / 2] each."""
    query_re, query_im = query[rows].unsqueeze(1).chunk(2, dim=-1)
    shared = candidates.shape[0] == 1
    candidates_re, candidates_im = candidates[slice(None) if shared else rows, columns].chunk(2, dim=-1)
    return query_re - candidates_re, query_im - candidates_im


def _moduli(re: Tensor, im: Tensor) -> Tensor:
    """Compute sqrt(re^2 + im^2) in one new tensor; 1.7 times as fast as `torch.hypot`, which guards against overflow.

    Embeddings are far from 1e19, where the squares overflow, and an infinite score is an error anyway.
    """
    return re.square().addcmul_(im, im).sqrt_()


def _blocks(query: Tensor, candidates: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut [batch, num] into blocks of (rows, columns), in an order that depends on the shapes alone."""
    batch, num, half = query.shape[0], candidates.shape[1], max(query.shape[1] // 2, 1)
    block_size = _BLOCK_SIZE_CPU if query.device.type == "cpu" else _BLOCK_SIZE_ACCELERATOR
    num_pairs = max(block_size // half, 1)
    num_columns = min(num, max(int(num_pairs**0.5), 1))
    num_rows = max(num_pairs // max(num_columns, 1), 1)
    for row in range(0, batch, num_rows):
        for column in range(0, num, num_columns):
            yield slice(row, row + num_rows), slice(column, column + num_columns)
