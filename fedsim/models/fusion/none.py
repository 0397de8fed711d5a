"""No fusion: the unimodal client of FedE (Chen et al., IJCKG 2021)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.config import ModelConfig
from fedsim.models.fusion.base import Pair, one_scorer_each
from fedsim.models.parameters import Params


class NoFusion:
    """Structure alone, the raw table without layer norm."""

    uses_modalities = False
    trains_apart = False

    def pairs(self, num_tokens: int) -> tuple[Pair, ...]:
        """Return one pair."""
        return one_scorer_each(1)

    def init(self, config: ModelConfig, num_tokens: int, generator: torch.Generator) -> Params:
        """Return no parameters."""
        return {}

    def fuse(self, params: Mapping[str, Tensor], tokens: Tensor, available: Tensor, uncertainty: Tensor) -> Tensor:
        """Return the structure token, [1, num_entities, dim]."""
        return tokens[:1]
