"""Adaptive weights of the tokens.

AdaMF: Zhang et al., "Unleashing the Power of Imbalanced Modality Information for Multi-modal Knowledge Graph
Completion", LREC-COLING 2024.

    h(e) = sum_m alpha_m(e) x_m(e),    alpha(e) = softmax_m(v . tanh(x_m(e)))

Symbols: v = `vector`, one for all tokens. Availability and uncertainty play no part. The adversarial training of the
paper's AdaMF-MAT is not part of the fusion.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.config import ModelConfig
from fedsim.models.fusion.base import Pair, one_scorer_each
from fedsim.models.parameters import Params


class AdamfFusion:
    """Convex combination by the agreement of each token with one learned vector."""

    uses_modalities = True
    trains_apart = False

    def pairs(self, num_tokens: int) -> tuple[Pair, ...]:
        """Return one pair: one embedding per entity."""
        return one_scorer_each(1)

    def init(self, config: ModelConfig, num_tokens: int, generator: torch.Generator) -> Params:
        """Make the vector; it starts at zero, so all tokens weigh alike."""
        return {"fusion.vector": torch.zeros(config.dim)}

    def fuse(self, params: Mapping[str, Tensor], tokens: Tensor, available: Tensor, uncertainty: Tensor) -> Tensor:
        """Return the weighted sum, [1, num_entities, dim]."""
        weights = torch.softmax(torch.tanh(tokens) @ params["fusion.vector"], 0)  # [num_tokens, num_entities]
        return (weights.unsqueeze(-1) * tokens).sum(0, keepdim=True)
