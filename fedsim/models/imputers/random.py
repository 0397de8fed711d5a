"""Random imputation: a missing token is standard normal noise, as MoSE does (Zhao et al., EMNLP 2022)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.models.imputers.base import FixedImputer, Imputation, TokenTable


class RandomImputer(FixedImputer):
    """Fill with N(0, 1), drawn anew each time tokens are imputed."""

    def impute(self, params: Mapping[str, Tensor], tokens: TokenTable, generator: torch.Generator) -> Imputation:
        """Return one standard normal draw per token."""
        noise = torch.randn(tokens.values.shape, generator=generator).to(tokens.values)
        return Imputation(noise, torch.zeros_like(tokens.values[..., 0]))
