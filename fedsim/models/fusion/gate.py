"""A softmax gate over the tokens that knows which are imputed (eq. 2; our inference).

Symbols: gamma = `gates`, A = `weight_in`, B = `weight_flags`, a = `weight_out`, [o, u] = `flags`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.config import ModelConfig
from fedsim.models.fusion.base import Pair, one_scorer_each
from fedsim.models.parameters import Params


class GateFusion:
    """Convex combination: h(e) = sum_m g_m x_m, g = softmax over tokens of a small net of [x_m, o_m, u_m]."""

    uses_modalities = True
    trains_apart = False

    def pairs(self, num_tokens: int) -> tuple[Pair, ...]:
        """Return one pair: one embedding per entity."""
        return one_scorer_each(1)

    def init(self, config: ModelConfig, num_tokens: int, generator: torch.Generator) -> Params:
        """Make one net per token; the last layer starts at zero, so all tokens weigh alike."""
        dim, hidden = config.dim, config.gate_hidden
        weight = torch.randn(num_tokens, dim, hidden, generator=generator) / dim**0.5
        return {
            "fusion.weight_in": weight,
            "fusion.weight_flags": torch.randn(num_tokens, 2, hidden, generator=generator),
            "fusion.bias_in": torch.zeros(num_tokens, 1, hidden),
            "fusion.weight_out": torch.zeros(num_tokens, hidden, 1),
            "fusion.bias_out": torch.zeros(num_tokens, 1, 1),
        }

    def fuse(self, params: Mapping[str, Tensor], tokens: Tensor, available: Tensor, uncertainty: Tensor) -> Tensor:
        """Return the gated sum, [1, num_entities, dim]."""
        flags = torch.stack([available, uncertainty], -1)  # [num_tokens, num_entities, 2]
        hidden = tokens @ params["fusion.weight_in"] + flags @ params["fusion.weight_flags"] + params["fusion.bias_in"]
        logits = torch.tanh(hidden) @ params["fusion.weight_out"] + params["fusion.bias_out"]
        gates = torch.softmax(logits, 0)  # [num_tokens, num_entities, 1]
        return (gates * tokens).sum(0, keepdim=True)
