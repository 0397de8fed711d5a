"""What a fusion is, and which pairs of its embeddings a scorer compares (method.md section 3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fedsim.config import ModelConfig
from fedsim.models.parameters import Params


class Pair(NamedTuple):
    """One score of a triple; a triple's is the mean over all pairs.

    Attributes:
        head: kind of the head's embedding.
        tail: kind of the tail's embedding.
        relation: relation table.
    """

    head: int
    tail: int
    relation: int


class Fusion(Protocol):
    """Maps an entity's tokens to embeddings of one or more kinds, and says which pairs of kinds are scored.

    A client without modalities fuses nothing, so there are at least two tokens, except with `uses_modalities` False.
    """

    uses_modalities: bool
    """Whether it takes tokens of modalities; else structure alone."""
    trains_apart: bool
    """Whether each query vector's scores have a loss of their own in training; else their mean has one."""

    def pairs(self, num_tokens: int) -> tuple[Pair, ...]:
        """Return the pairs that are scored; with (a, b) comes (b, a) on the same relation table.

        So the query vectors for tails and for heads are compared with the same kinds.
        """
        ...

    def init(self, config: ModelConfig, num_tokens: int, generator: torch.Generator) -> Params:
        """Make the parameters, named ``fusion.*``."""
        ...

    def fuse(self, params: Mapping[str, Tensor], tokens: Tensor, available: Tensor, uncertainty: Tensor) -> Tensor:
        """Fuse complete tokens.

        Args:
            params: the shared modules.
            tokens: [num_tokens, num_entities, dim], missing ones imputed.
            available: [num_tokens, num_entities] of 0 and 1, o_m(e).
            uncertainty: [num_tokens, num_entities] of the imputation.

        Returns:
            [num_kinds, num_entities, dim]; the kinds are those that the pairs name, from 0.
        """
        ...


def one_scorer_each(num_kinds: int) -> tuple[Pair, ...]:
    """Pair each kind with itself, on a relation table of its own."""
    return tuple(Pair(kind, kind, kind) for kind in range(num_kinds))


@dataclass(frozen=True)
class QueryPlan:
    """The query vectors of one query, and the candidates that each is compared with.

    Attributes:
        known: of each query vector, the kinds of the known entity that are added up.
        asked: of each query vector, the kind of the candidates.
        relation: of each query vector, its relation table.
    """

    known: tuple[tuple[int, ...], ...]
    asked: tuple[int, ...]
    relation: tuple[int, ...]

    @classmethod
    def build(cls, pairs: Sequence[Pair], *, linear: bool) -> "QueryPlan":
        """Plan the query vectors of some pairs.

        Args:
            pairs: of the fusion.
            linear: whether the scorer is linear in the known entity and in the query vector. Then pairs with the same
                candidates and relations need one query vector together: f(a, r, c) + f(b, r, c) = f(a + b, r, c).
        """
        found: dict[tuple[int, ...], list[int]] = {}
        for head, tail, relation in sorted(pairs, key=lambda pair: (pair.tail, pair.relation, pair.head)):
            found.setdefault((tail, relation) if linear else (tail, relation, head), []).append(head)
        return cls(
            tuple(tuple(kinds) for kinds in found.values()),
            tuple(key[0] for key in found),
            tuple(key[1] for key in found),
        )

    @property
    def num_parts(self) -> int:
        """Return how many query vectors a query has."""
        return len(self.asked)

    @property
    def num_kinds(self) -> int:
        """Return how many kinds of embeddings an entity has."""
        return 1 + max(self.asked)

    @property
    def num_tables(self) -> int:
        """Return how many relation tables there are."""
        return 1 + max(self.relation)

    def known_entities(self, entities: Tensor) -> Tensor:
        """Make the known entity of each query vector: [..., num_kinds, batch, dim] -> [..., num_parts, batch, dim]."""
        if self.known == tuple((kind,) for kind in range(self.num_kinds)):
            return entities
        # `join` divides by the number of query vectors, but the mean is over pairs, of which one may have several.
        weight = self.num_parts / sum(map(len, self.known))
        chosen = [[weight * (kind in kinds) for kind in range(self.num_kinds)] for kinds in self.known]
        mix = torch.tensor(chosen, dtype=entities.dtype, device=entities.device)
        return torch.einsum("pk,...kbd->...pbd", mix, entities)

    def known_relations(self, relations: Tensor) -> Tensor:
        """Take each query vector's relation: [..., num_tables, batch, dim] -> [..., num_parts, batch, dim]."""
        return _take(relations, self.relation)

    def join(self, scores: Tensor) -> Tensor:
        """Join the scores of the query vectors, [..., num_parts, batch, n] -> [..., batch, n]; one is not copied."""
        if scores.shape[-3] == 1:
            return scores.squeeze(-3)
        return scores.mean(-3)

    def candidates(self, embeddings: Tensor) -> Tensor:
        """Take each query vector's candidates: [..., num_kinds, num, dim] -> [..., num_parts, num, dim]."""
        return _take(embeddings, self.asked)


def _take(values: Tensor, places: tuple[int, ...]) -> Tensor:
    """Take places of dimension -3; all of them in order are no copy."""
    if places == tuple(range(len(places))):
        return values
    return values.index_select(-3, torch.tensor(places, device=values.device))
