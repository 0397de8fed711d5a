"""Membership inference: is the triple (h, r, t) in a client's training data? (docs/privacy.md).

The attacker sees a client's rows before and after each round, knows which entities they belong to, and for the third
score some of the client's triples of each relation. It never sees a relation's embedding. What it can compute, each
score higher where it believes in a member:

- ``affinity``: cos(h, t) of the rows after the last round.
- ``movement``: the mean over rounds of cos(dh, dt), how alike the two rows moved.
- ``fitted``: f(h, r', t) of the rows after the last round minus that of the rows before the first, with r' the mean of
  `estimate_relation` over the known triples of the relation. The difference takes off what others' data say.

The scores are ours; comparing with what was before follows Watson et al., "On the Importance of Difficulty
Calibration in Membership Inference Attacks", ICLR 2022. Members are training triples that the attacker does not know,
the others are the client's true triples that are not in train (valid and test): links that the model was made to
guess as well, so this is a harder question than telling true triples from false ones.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedsim.data.clients import ClientData
from fedsim.privacy.attacks.observation import Observation
from fedsim.privacy.attacks.quality import AttackQuality, attack_quality
from fedsim.privacy.attacks.relation_estimate import estimate_relation, score_pairs

HELD_OUT = ("valid", "test")


def known_triples(data: ClientData, share: float, draws: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Divide a client's training triples into those that the attacker knows and the rest, int64 [num_triples, 3]."""
    train = torch.from_numpy(draws.permutation(data.train))
    return train[: round(share * len(train))], train[round(share * len(train)) :]


def infer_membership(
    scorer: str, seen: Sequence[Observation], data: ClientData, known: Tensor, rest: Tensor
) -> dict[str, AttackQuality]:
    """Attack one client by all scores.

    Args:
        scorer: of the federation.
        seen: rows of the client, in the order of its entities.
        data: the truth; its triples are of the positions of these rows.
        known: training triples that the attacker knows, int64 [num_known, 3].
        rest: those that it does not.
    """
    others = torch.from_numpy(np.concatenate([group.triples[name] for group in data.groups for name in HELD_OUT]))
    told = known[:, 1].unique()
    members, others = (part[torch.isin(part[:, 1], told)] for part in (rest, others))
    return {
        "affinity": attack_quality(affinity(seen, members), affinity(seen, others)),
        "movement": attack_quality(movement(seen, members), movement(seen, others)),
        "fitted": attack_quality(fitted(scorer, seen, known, members), fitted(scorer, seen, known, others)),
    }


def affinity(seen: Sequence[Observation], triples: Tensor) -> Tensor:
    """Return cos(h, t) after the last round; triples int64 [num_triples, 3] -> [num_triples]."""
    rows = seen[-1].after
    return functional.cosine_similarity(rows[triples[:, 0]], rows[triples[:, 2]])


def movement(seen: Sequence[Observation], triples: Tensor) -> Tensor:
    """Return the mean over rounds of cos(dh, dt), [num_triples]."""
    moves = [item.after - item.before for item in seen]
    cosines = [functional.cosine_similarity(move[triples[:, 0]], move[triples[:, 2]]) for move in moves]
    return torch.stack(cosines).mean(0)


def fitted(scorer: str, seen: Sequence[Observation], known: Tensor, triples: Tensor) -> Tensor:
    """Return how much the score under estimated relations rose over the rounds, [num_triples]."""
    last = _fitted_score(scorer, seen[-1].after, known, triples)
    return last - _fitted_score(scorer, seen[0].before, known, triples)


def _fitted_score(scorer: str, rows: Tensor, known: Tensor, triples: Tensor) -> Tensor:
    relations = mean_estimates(scorer, rows, known)
    return score_pairs(scorer, rows[triples[:, 0]], relations[triples[:, 1]], rows[triples[:, 2]])


def mean_estimates(scorer: str, rows: Tensor, known: Tensor) -> Tensor:
    """Average the estimates of each relation over its known triples, [num_relations, dim]; zero without any."""
    estimates = estimate_relation(scorer, rows[known[:, 0]], rows[known[:, 2]])
    num_relations = int(known[:, 1].max()) + 1
    total = torch.zeros(num_relations, rows.shape[1]).index_add_(0, known[:, 1], estimates)
    count = torch.zeros(num_relations).index_add_(0, known[:, 1], torch.ones(len(known)))
    return total / count.clamp(min=1).unsqueeze(1)
