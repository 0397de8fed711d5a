"""The values of one training step: what it asks, what a view's pass gives, and what a strategy's terms may see."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedsim.models.imputers import Draws, TokenTable
from fedsim.models.parameters import Params
from fedsim.models.step_entities import StepEntities


@dataclass(frozen=True)
class Batch:
    """What one step asks of its clients; ... is nothing for one client, and [clients] for a stack.

    Attributes:
        entities: those that the step computes on; triples, negatives and draws number them.
        triples: int64 [..., batch, 3]; clients with fewer triples are padded.
        weight: of each query, [..., num_sides * batch]; sums to 1 over a client's queries, 0 where padded.
        negatives: of each query, int64 [..., num_sides * batch, num_negatives], or [..., 1, num_negatives] if all
            queries of a client share them; None to score all entities.
        draws: view -> what its imputer drew.
        keep: view -> which numbers of the queries dropout keeps, bool [..., num_parts, num_sides * batch, dim].
    """

    entities: StepEntities
    triples: Tensor
    weight: Tensor
    negatives: Tensor | None
    draws: dict[str, Draws]
    keep: dict[str, Tensor]


@dataclass(frozen=True)
class Forward:
    """One view's pass over one batch, for the loss terms and the coupling; ... as in `Batch`.

    Attributes:
        tokens: the hyper-modal embeddings of the step's entities, [..., num_tokens, num_entities, dim]; available are
            those that views may be compared by.
        logits: [..., num_queries, num_candidates].
        target: int64 [..., num_queries], column of the true answer.
        weight: of each query, [..., num_queries].
        losses: the view's own weighted terms, [...].
    """

    tokens: TokenTable
    logits: Tensor
    target: Tensor
    weight: Tensor
    losses: dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """What a strategy's own loss terms may see of one step; ... as in `Batch`.

    Attributes:
        forwards: view -> its pass.
        params: the trained parameters, which take gradients; see `ClientValues.params`.
        anchors: constants of the round; see `ClientValues.anchors`.
        real: which rows of the entity tables are entities, bool [..., num_rows]; None if all are.
        apply: applies a function of one client's tensors to each client; see `ClientStack.apply`.
    """

    forwards: Mapping[str, Forward]
    params: Params
    anchors: Params
    real: Tensor | None
    apply: Callable[..., Any]


Coupling = Callable[[Step], dict[str, Tensor]]
