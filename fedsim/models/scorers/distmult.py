"""DistMult: a diagonal bilinear form.

Yang et al., "Embedding Entities and Relations for Learning and Inference in Knowledge Bases", ICLR 2015.

    score(h, r, t) = sum_i h_i r_i t_i

Symbols: h, t = `entity` or a candidate; r = `relation`, as wide as an entity. The score is symmetric in head and tail.
"""

from torch import Tensor

from fedsim.models.kernels import dot_rows


class DistMult:
    """Sum of the elementwise product of head, relation and tail."""

    name = "distmult"

    def relation_dim(self, dim: int) -> int:
        """Return the width of a relation vector: that of an entity."""
        return dim

    def query(self, entity: Tensor, relation: Tensor, *, inverse: bool = False) -> Tensor:
        """Return entity * relation, in both directions; [..., batch, dim] twice -> [..., batch, dim]."""
        return entity * relation

    def score(self, query: Tensor, candidates: Tensor) -> Tensor:
        """Score all pairs; [..., batch, dim], [..., num, dim] -> [..., batch, num]."""
        return query @ candidates.mT

    def score_negatives(self, query: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        """Score each query's own candidates, the rows `ids` [..., batch, num_negatives] of the table."""
        return dot_rows(query, table, ids)
