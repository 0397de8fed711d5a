"""Mean imputation: a missing token is the mean of that modality's available tokens at this client."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.models.imputers.base import Draws, FixedImputer, Imputation, TokenTable


class MeanImputer(FixedImputer):
    """Fill with the client's mean token of the modality (zero where the client has none)."""

    def impute(self, params: Mapping[str, Tensor], tokens: TokenTable, draws: Draws) -> Imputation:
        """Return the mean over the available tokens, for every entity."""
        values = tokens.means().unsqueeze(1).expand_as(tokens.values)
        return Imputation(values, torch.zeros_like(tokens.values[..., 0]))
