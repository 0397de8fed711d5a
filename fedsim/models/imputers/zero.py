"""Zero imputation: a missing token is the zero vector, and the gate sees that it is missing."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.models.imputers.base import Draws, FixedImputer, Imputation, TokenTable


class ZeroImputer(FixedImputer):
    """Fill with zeros."""

    def impute(self, params: Mapping[str, Tensor], tokens: TokenTable, draws: Draws) -> Imputation:
        """Return zeros."""
        return Imputation(torch.zeros_like(tokens.values), torch.zeros_like(tokens.values[..., 0]))
