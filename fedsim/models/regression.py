"""Regression of one token from the others: the ridge imputer and the measure beside every imputer share it.

Source: Hoerl and Kennard, Technometrics 1970. Symbols: X `inputs`, Y `goal`, lambda `strength`.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def regressors(tokens: Tensor, available: Tensor, index: int) -> Tensor:
    """Put the other tokens of an entity side by side, zero where they are missing, with their flags.

    Args:
        tokens: [num_tokens, num_entities, dim].
        available: bool [num_tokens, num_entities].
        index: the token to be estimated.

    Returns:
        [num_entities, num_features].
    """
    others = [i for i in range(len(tokens)) if i != index]
    known = tokens[others] * available[others].unsqueeze(-1)
    flat = known.transpose(0, 1).flatten(1)
    return torch.cat([flat, available[others].T.to(flat.dtype)], 1)


def fit_ridge(inputs: Tensor, goal: Tensor, seen: Tensor, strength: float) -> Callable[[Tensor], Tensor]:
    """Solve ridge regression with a free intercept, in closed form.

    Args:
        inputs: [num_rows, num_features], of double precision.
        goal: [num_rows, dim], of double precision.
        seen: [num_rows], 1 for the rows that are fitted and 0 for the others; with no row the estimate is 0.
        strength: of the penalty on the coefficients, above 0.

    Returns:
        A function of inputs [n, num_features] that estimates [n, dim].
    """
    weight = seen.to(inputs.dtype).unsqueeze(1)  # [num_rows, 1]
    total = weight.sum().clamp(min=1)
    mean_x, mean_y = (inputs * weight).sum(0) / total, (goal * weight).sum(0) / total
    centred = (inputs - mean_x) * weight
    penalty = strength * torch.eye(inputs.shape[1], dtype=inputs.dtype, device=inputs.device)
    coefficients = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ (goal - mean_y))
    return lambda x: (x - mean_x) @ coefficients + mean_y
