"""RotatE: a relation is a rotation in the complex plane.

Sun et al., "RotatE: Knowledge Graph Embedding by Relational Rotation in Complex Space", ICLR 2019.

    score(h, r, t) = - sum_i | h_i exp(i theta_i) - t_i |

Symbols: h, t = `entity` or a candidate; theta = `relation`, the phases in radians, half as wide as an entity. A complex
vector of length dim / 2 is stored as dim real numbers, first all real parts, then all imaginary parts. The sum of the
moduli is the distance of the authors' code. Their margin gamma is added by the loss, and their phases are the stored
parameter times pi / embedding_range: the model multiplies by `model.phase_scale` before.
"""

import torch
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.models.kernels import BLOCKED, MODULI, Distances


class RotatE:
    """Negative sum of moduli of the differences between the rotated head and the tail.

    Args:
        distances: who computes them.
    """

    name = "rotate"

    def __init__(self, distances: Distances = BLOCKED) -> None:
        self.distances = distances

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
        return -self.distances.all_pairs(query, candidates, MODULI)

    def score_negatives(self, query: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        """Score each query's own candidates, the rows `ids` [..., batch, num_negatives] of the table."""
        return -self.distances.rows(query, table, ids, MODULI)
