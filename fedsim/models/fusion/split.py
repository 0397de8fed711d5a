"""One scorer per token (MoSE: Zhao et al., "MoSE: Modality Split and Ensemble for Multimodal KGC", EMNLP 2022)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.config import ModelConfig
from fedsim.models.fusion.base import Pair, one_scorer_each
from fedsim.models.parameters import Params


class SplitFusion:
    """Each token is scored with a relation table of its own; the mean of the scores counts."""

    uses_modalities = True

    def pairs(self, num_tokens: int) -> tuple[Pair, ...]:
        """Return one pair per token."""
        return one_scorer_each(num_tokens)

    def init(self, config: ModelConfig, num_tokens: int, generator: torch.Generator) -> Params:
        """Return no parameters."""
        return {}

    def fuse(self, params: Mapping[str, Tensor], tokens: Tensor, available: Tensor, uncertainty: Tensor) -> Tensor:
        """Return the tokens themselves, [num_tokens, num_entities, dim]."""
        return tokens
