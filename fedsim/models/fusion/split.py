"""One scorer per token (MoSE: Zhao et al., "MoSE: Modality Split and Ensemble for Multimodal KGC", EMNLP 2022).

Each token is trained by a loss of its own, and the ensemble answers. Our inference: the plain mean of the scores, where
the paper also learns weights of the ensemble.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.config import ModelConfig
from fedsim.models.fusion.base import Pair, one_scorer_each
from fedsim.models.parameters import Params


class SplitFusion:
    """Each token is scored and trained with a relation table of its own; the mean of the scores answers."""

    uses_modalities = True
    trains_apart = True

    def pairs(self, num_tokens: int) -> tuple[Pair, ...]:
        """Return one pair per token."""
        return one_scorer_each(num_tokens)

    def init(self, config: ModelConfig, num_tokens: int, generator: torch.Generator) -> Params:
        """Return no parameters."""
        return {}

    def fuse(self, params: Mapping[str, Tensor], tokens: Tensor, available: Tensor, uncertainty: Tensor) -> Tensor:
        """Return the tokens themselves, [num_tokens, num_entities, dim]."""
        return tokens
