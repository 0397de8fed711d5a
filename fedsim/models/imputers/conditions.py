"""Which entities train an imputer in a step, and what it is told of each: the masking rule of CSDI.

Source: Tashiro et al., NeurIPS 2021 (method.md eq. 6). All learned imputers draw alike, so what differs between them is
the model alone.
"""

import torch
from torch import Tensor

from fedsim.models.imputers.base import Draws


def draw_conditions(available: Tensor, batch_size: int, generator: torch.Generator) -> Draws:
    """Draw a batch of entities with two available tokens or more, and what is known of each.

    Args:
        available: bool [num_tokens, num_entities].
        batch_size: entities, with replacement; fewer if fewer can be drawn.
        generator: CPU generator.

    Returns:
        ``rows``, int64 [batch], and ``known`` and ``target``, bool [num_tokens, batch]: c and g = o - c of eq. 6.
    """
    eligible = (available.sum(0) >= 2).nonzero().squeeze(1)
    size = min(batch_size, len(eligible))
    rows = eligible[torch.randint(max(len(eligible), 1), (size,), generator=generator)]
    known = random_condition(available[:, rows], generator)
    return {"rows": rows, "known": known, "target": available[:, rows] & ~known}


def random_condition(available: Tensor, generator: torch.Generator) -> Tensor:
    """Draw c(e): a random non-empty proper subset of the available tokens (eq. 6).

    Args:
        available: bool [num_tokens, batch], at least two per entity.
        generator: CPU generator.

    Returns:
        bool [num_tokens, batch].
    """
    draw = torch.rand(available.shape, generator=generator).to(available.device)
    threshold = torch.rand(available.shape[1], generator=generator).to(available.device)
    known = available & (draw < threshold)
    first = draw.masked_fill(~available, 2.0).argmin(0, keepdim=True)
    last = draw.masked_fill(~available, -1.0).argmax(0, keepdim=True)
    known = known.scatter(0, first, torch.ones_like(known[:1]))
    return known.scatter(0, last, torch.zeros_like(known[:1]))


def draw_link_rows(seen: Tensor, num_rows: int, generator: torch.Generator) -> Tensor:
    """Draw entities that lack a token, whose links reach the imputer in this step; int64, `num_rows` or all of them.

    Args:
        seen: what the epoch does not hide, bool [num_tokens, num_entities].
        num_rows: how many.
        generator: CPU generator.
    """
    missing = (~seen).any(0).nonzero().squeeze(1)
    return missing[torch.randperm(len(missing), generator=generator)[:num_rows]]


def mean_of_targets(errors: Tensor, target: Tensor) -> Tensor:
    """Average errors over the targets, both [num_tokens, batch]; 0 if there are none."""
    return (errors * target).sum() / target.sum().clamp(min=1)
