"""ComplEx: a diagonal bilinear form over the complex numbers.

Trouillon et al., "Complex Embeddings for Simple Link Prediction", ICML 2016.

    score(h, r, t) = Re( sum_i h_i r_i conj(t_i) )

Symbols: h, t = `entity` or a candidate; r = `relation`. A complex vector of length dim / 2 is stored as dim real
numbers, first all real parts, then all imaginary parts. In this layout Re(sum_i q_i conj(c_i)) is the plain dot
product of q and c, so scoring is a matrix product.
"""

import torch
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.models.kernels import dot_rows


class ComplEx:
    """Real part of the trilinear product of head, relation and conjugated tail."""

    name = "complex"

    def relation_dim(self, dim: int) -> int:
        """Return the width of a relation vector: that of an entity, which must be even."""
        if dim % 2:
            raise ConfigError(f"dim is {dim}, but scorer 'complex' needs an even dim (real and imaginary halves)")
        return dim

    def query(self, entity: Tensor, relation: Tensor, *, inverse: bool = False) -> Tensor:
        """Return h * r, or t * conj(r) with ``inverse``; [..., batch, dim] twice -> [..., batch, dim]."""
        entity_re, entity_im = entity.chunk(2, dim=-1)  # [batch, dim / 2] each
        relation_re, relation_im = relation.chunk(2, dim=-1)
        if inverse:
            # Re(h r conj(t)) = Re(h conj(conj(r) t)): seen from the tail, the relation acts by its conjugate.
            relation_im = -relation_im
        return torch.cat(
            [
                entity_re * relation_re - entity_im * relation_im,
                entity_re * relation_im + entity_im * relation_re,
            ],
            dim=-1,
        )

    def score(self, query: Tensor, candidates: Tensor) -> Tensor:
        """Score all pairs; [..., batch, dim], [..., num, dim] -> [..., batch, num]."""
        return query @ candidates.mT

    def score_negatives(self, query: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        """Score each query's own candidates, the rows `ids` [..., batch, num_negatives] of the table."""
        return dot_rows(query, table, ids)
