"""Mean imputation: a missing token is the mean of that modality's available tokens at this client."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.models.imputers.base import Draws, FixedImputer, Imputation, TokenTable


class MeanImputer(FixedImputer):
    """Fill with the client's mean token of the modality (zero where the client has none)."""

    def impute(self, params: Mapping[str, Tensor], tokens: TokenTable, draws: Draws) -> Imputation:
        """Return the mean over the available tokens, for every entity."""
        weight = tokens.available.to(tokens.values.dtype).unsqueeze(-1)  # [num_tokens, num_entities, 1]
        mean = (tokens.values * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        values = mean.detach().expand_as(tokens.values)
        return Imputation(values, torch.zeros_like(tokens.values[..., 0]))
