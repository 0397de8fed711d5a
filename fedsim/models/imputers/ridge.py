"""Ridge imputation: a missing token is a linear function of the entity's other tokens, fitted at the client.

The fit is made anew each time tokens are imputed, on the entities that have the modality; nothing of it is federated.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.models.imputers.base import Draws, FixedImputer, Imputation, TokenTable
from fedsim.models.regression import fit_ridge, regressors


class RidgeImputer(FixedImputer):
    """Regress each modality's token on the others (zero where the client has none of the modality)."""

    def __init__(self, config: Config, num_tokens: int) -> None:
        """Keep the penalty and when to impute."""
        self.strength = config.imputer.ridge_strength
        self.hide_rate = config.imputer.hide_rate
        self.each_epoch = config.imputer.impute_each == "epoch"

    def impute(self, params: Mapping[str, Tensor], tokens: TokenTable, draws: Draws) -> Imputation:
        """Fit and estimate, in double precision: a fit is a solution of as many equations as there are inputs."""
        values = tokens.values.detach() * tokens.available.unsqueeze(-1)
        estimates = [torch.zeros_like(values[0])]  # structure is never missing
        for index in range(1, len(values)):
            inputs = regressors(values, tokens.available, index).double()
            estimate = fit_ridge(inputs, values[index].double(), tokens.available[index], self.strength)
            estimates.append(estimate(inputs).to(values.dtype))
        return Imputation(torch.stack(estimates), torch.zeros_like(values[..., 0]))
