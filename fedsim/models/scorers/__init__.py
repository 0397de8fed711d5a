"""Scorers: how plausible a triple is, from the vectors of its head, relation and tail.

One file per scorer, and the registry `SCORERS`. Every scorer splits the work in two: a query vector is built from
the known entity and the relation, then compared with candidate entities. That way scoring against all entities is
one matrix product (or one blocked distance), for tail and head queries alike, and training on negatives that are
drawn per triple uses the same query.

To add one: write its file with the name and the four methods below, and register an instance here. The property tests
over the registry then hold it to the contract.
"""

from typing import Protocol

from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.models.compiled import COMPILED, load_library
from fedsim.models.scorers.complex import ComplEx
from fedsim.models.scorers.distmult import DistMult
from fedsim.models.scorers.rotate import RotatE
from fedsim.models.scorers.transe import TransE, TransEL2


class Scorer(Protocol):
    """What a scorer offers; higher scores mean more plausible triples.

    A scorer has no state: all parameters come in as arguments, so one instance serves every client. The leading
    dimensions `...` are the same for all arguments: nothing, [parts] or [clients, parts].
    """

    name: str

    def relation_dim(self, dim: int) -> int:
        """Return the width of a relation vector for entity vectors of width ``dim``; ConfigError if dim cannot be."""
        ...

    def query(self, entity: Tensor, relation: Tensor, *, inverse: bool = False) -> Tensor:
        """Build the query vector q, such that comparing q with a candidate scores the triple.

        Args:
            entity: vectors of the known entity. [..., batch, dim]
            relation: vectors of the relation. [..., batch, relation_dim]
            inverse: False for (entity, relation, candidate), True for (candidate, relation, entity).

        Returns:
            The query vectors. [..., batch, dim]
        """
        ...

    def score(self, query: Tensor, candidates: Tensor) -> Tensor:
        """Score every query against every candidate.

        Args:
            query: [..., batch, dim]
            candidates: [..., num_candidates, dim]

        Returns:
            Scores. [..., batch, num_candidates]
        """
        ...

    def score_negatives(self, query: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        """Score every query against its own candidates, which are gathered inside, block by block.

        Args:
            query: [..., batch, dim]
            table: [..., num_entities, dim]
            ids: rows of the table. int64 [..., batch, num_negatives]

        Returns:
            Scores. [..., batch, num_negatives]
        """
        ...


SCORERS: dict[str, Scorer] = {scorer.name: scorer for scorer in (TransE(), TransEL2(), DistMult(), ComplEx(), RotatE())}

COMPILED_SCORERS: dict[str, Scorer] = {scorer.name: scorer for scorer in (TransE(COMPILED), RotatE(COMPILED))}
"""The same scores by compiled kernels, float32 on CPUs alone; the other scorers are matrix products."""


def compiled_scorer(name: str) -> Scorer:
    """Choose a registered scorer's compiled twin, ready to compute.

    Raises:
        ConfigError: if it has none, or this machine cannot compile.
    """
    if name not in COMPILED_SCORERS:
        raise ConfigError(
            f"config field 'training.compile' = true, but scorer '{name}' has nothing to compile: set it to false, or "
            f"choose model.scorer from {', '.join(COMPILED_SCORERS)}"
        )
    load_library()
    return COMPILED_SCORERS[name]


__all__ = [
    "COMPILED_SCORERS",
    "SCORERS",
    "ComplEx",
    "DistMult",
    "RotatE",
    "Scorer",
    "TransE",
    "TransEL2",
    "compiled_scorer",
]
