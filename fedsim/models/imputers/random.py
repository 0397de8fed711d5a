"""Random imputation: a missing token is standard normal noise, as MoSE does (Zhao et al., EMNLP 2022)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.models.imputers.base import Draws, FixedImputer, Imputation, TokenTable


class RandomImputer(FixedImputer):
    """Fill with N(0, 1), drawn anew each time tokens are imputed."""

    def __init__(self, config: Config, num_tokens: int) -> None:
        """Keep the width of a token."""
        self.dim = config.model.dim

    def draw_imputation(self, available: Tensor, generator: torch.Generator) -> Draws:
        """Draw one standard normal vector per token."""
        return {"entity_noise": torch.randn(*available.shape, self.dim, generator=generator)}

    def impute(self, params: Mapping[str, Tensor], tokens: TokenTable, draws: Draws) -> Imputation:
        """Return the draws."""
        return Imputation(draws["entity_noise"], torch.zeros_like(tokens.values[..., 0]))
