"""TransE: a relation is a translation.

Bordes et al., "Translating Embeddings for Modeling Multi-relational Data", NeurIPS 2013.

    score(h, r, t) = -|| h + r - t ||_1, or with the L2 norm -|| h + r - t ||_2; the paper allows either.

Symbols: h, t = `entity` or a candidate; r = `relation`, as wide as an entity. The paper's margin gamma is a constant
that the loss adds; it changes no ranking and is not part of the score.
"""

from torch import Tensor

from fedsim.models.kernels import BLOCKED, L1, L2, Distances, distance_rows, euclidean


class TransE:
    """Negative L1 distance between the translated head and the tail.

    Args:
        distances: who computes them.
    """

    name = "transe"

    def __init__(self, distances: Distances = BLOCKED) -> None:
        self.distances = distances

    def relation_dim(self, dim: int) -> int:
        """Return the width of a relation vector: that of an entity."""
        return dim

    def query(self, entity: Tensor, relation: Tensor, *, inverse: bool = False) -> Tensor:
        """Return h + r, or t - r with ``inverse``; [..., batch, dim] twice -> [..., batch, dim]."""
        return entity - relation if inverse else entity + relation

    def score(self, query: Tensor, candidates: Tensor) -> Tensor:
        """Score all pairs; [..., batch, dim], [..., num, dim] -> [..., batch, num]."""
        return -self.distances.all_pairs(query, candidates, L1)

    def score_negatives(self, query: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        """Score each query's own candidates, the rows `ids` [..., batch, num_negatives] of the table."""
        return -self.distances.rows(query, table, ids, L1)


class TransEL2(TransE):
    """Negative L2 distance: comparing with all entities, or with shared negatives, is a matrix product."""

    name = "transe_l2"

    def score(self, query: Tensor, candidates: Tensor) -> Tensor:
        """Score all pairs; [..., batch, dim], [..., num, dim] -> [..., batch, num]."""
        return -euclidean(query, candidates)

    def score_negatives(self, query: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        """Score each query's own candidates, the rows `ids` [..., batch, num_negatives] of the table."""
        return -distance_rows(query, table, ids, L2)
