"""A relation's vector from its entities' rows, as an attacker estimates it."""

from collections.abc import Callable

import torch
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.models.scorers import SCORERS


def _translation(head: Tensor, tail: Tensor) -> Tensor:
    return tail - head


def _product(head: Tensor, tail: Tensor) -> Tensor:
    return head * tail


def _complex_product(head: Tensor, tail: Tensor) -> Tensor:
    head_re, head_im = head.chunk(2, dim=-1)
    tail_re, tail_im = tail.chunk(2, dim=-1)
    return torch.cat([head_re * tail_re + head_im * tail_im, head_re * tail_im - head_im * tail_re], dim=-1)


ESTIMATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "transe": _translation,
    "transe_l2": _translation,
    "distmult": _product,
    "complex": _complex_product,
}


def estimate_relation(scorer: str, head: Tensor, tail: Tensor) -> Tensor:
    """Estimate the relation of each pair, [num_pairs, dim] twice -> [num_pairs, dim].

    With TransE r' = t - h. With DistMult and ComplEx r' is the vector of a given length under which the pair scores
    best: the product of the one row with the (conjugated) other.

    Raises:
        ConfigError: with a scorer for which there is no such formula here.
    """
    if scorer not in ESTIMATES:
        raise ConfigError(f"model.scorer '{scorer}': attacks are there for {', '.join(ESTIMATES)}")
    return ESTIMATES[scorer](head, tail)


def score_pairs(scorer: str, head: Tensor, relation: Tensor, tail: Tensor) -> Tensor:
    """Score each triple by itself, [num_triples, dim] three times -> [num_triples]."""
    part = SCORERS[scorer]
    query = part.query(head, relation)
    return part.score(query.unsqueeze(1), tail.unsqueeze(1)).flatten()
