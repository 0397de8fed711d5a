"""Sampled negatives: drawn for each query, or one set that all queries of a client's batch share.

Negatives of its own for each query, none of them a known answer (`filtered`), are what FedE and RotatE train on; with
many entities it makes little difference to leave known answers in (`per_triple`), and costs less. Shared ones are
compared with all queries at once, as a matrix product or a blocked distance, which costs a fraction; each query still
sees as many.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fedsim.config import TrainingConfig
from fedsim.evaluation.ranking import FilterIndex
from fedsim.models.client_model import ClientModel
from fedsim.models.losses import PADDING_LOGIT
from fedsim.models.parameters import take_rows

MAX_REDRAWS = 100


def draw_negatives(
    config: TrainingConfig, shape: Sequence[int], num_entities: int, generator: torch.Generator
) -> Tensor:
    """Draw uniformly from all entities of one client, true answers among them.

    Args:
        config: number of negatives, and whether they are shared.
        shape: of the client's queries.
        num_entities: of this client alone, without padding.
        generator: on the CPU.

    Returns:
        Local entity ids, int64 [*shape, num_negatives]; shared ones [1, ..., 1, num_negatives].
    """
    queries = [1] * len(shape) if config.negatives == "shared" else shape
    return torch.randint(num_entities, (*queries, config.num_negatives), generator=generator)


def known_answers(config: TrainingConfig, triples: Tensor) -> FilterIndex | None:
    """Index the known answers of a client's queries, which are no negatives; None if negatives are not filtered.

    Args:
        config: kind of negatives.
        triples: all that the client trains on, int64 [num_triples, 3].
    """
    if config.negatives != "filtered":
        return None
    own = triples.cpu().numpy()
    num_entities = int(own[:, [0, 2]].max()) + 1 if len(own) else 0
    return FilterIndex.build(own, num_entities, int(own[:, 1].max()) + 1 if len(own) else 0)


def redraw_known(
    negatives: Tensor, triples: Tensor, known: FilterIndex, num_entities: int, generator: torch.Generator
) -> Tensor:
    """Draw negatives that are known answers of their query again, until none is left.

    A query to which every entity is an answer keeps its negatives, and so does one that finds none in `MAX_REDRAWS`.

    Args:
        negatives: of the tail queries, then of the head queries if those are asked. int64 [num_sides, batch, num]
        triples: local ids of the batch. int64 [batch, 3]
        known: see `known_answers`.
        num_entities: of this client.
        generator: on the CPU.

    Returns:
        Negatives of the same shape.
    """
    head, relation, tail = triples.cpu().unbind(-1)
    is_known = torch.zeros(*negatives.shape[:2], num_entities, dtype=torch.bool)
    for side, entity in enumerate((head, tail)[: len(negatives)]):
        row, answer = known.known(entity, relation, bool(side))
        is_known[side, row, answer] = True
    hopeful = ~is_known.all(-1, keepdim=True)
    negatives = negatives.clone()
    for _ in range(MAX_REDRAWS):
        wrong = is_known.gather(-1, negatives).logical_and_(hopeful)
        num_wrong = int(wrong.sum())
        if not num_wrong:
            break
        negatives[wrong] = torch.randint(num_entities, (num_wrong,), generator=generator)
    return negatives


def candidate_scores(
    model: ClientModel,
    queries: Tensor,
    embeddings: Tensor,
    target: Tensor,
    negatives: Tensor,
    dropped: Tensor | None = None,
) -> Tensor:
    """Score each query's true answer, then its negatives, each query vector apart.

    Args:
        model: its scorer.
        queries: [..., num_parts, num_queries, dim].
        embeddings: [..., num_kinds, num_entities, dim].
        target: the true answers. int64 [..., num_queries]
        negatives: int64 [..., num_queries, num_negatives], or [..., 1, num_negatives] if all queries share them.
        dropped: negatives that are scored -1e6, as padding is; None for none. bool [..., num_queries, num_negatives]

    Returns:
        Scores, the true answer's in column 0. [..., num_parts, num_queries, 1 + num_negatives]
    """
    own = target.unsqueeze(-1)
    if negatives.shape[-2] == target.shape[-1]:
        scores = model.part_scores_of(queries, embeddings, torch.cat([own, negatives], -1))
    else:
        shared = model.part_scores(queries, take_rows(embeddings, negatives.squeeze(-2)))
        scores = torch.cat([model.part_scores_of(queries, embeddings, own), shared], -1)
    if dropped is None:
        return scores
    return scores.masked_fill(functional.pad(dropped, (1, 0)).unsqueeze(-3), PADDING_LOGIT)
