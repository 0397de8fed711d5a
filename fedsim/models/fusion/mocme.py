"""Complementarity-guided mixture of modality experts.

MoCME: Li, "Complementarity-driven Representation Learning for Multi-modal Knowledge Graph Completion",
arXiv:2507.20620, whose abstract alone is known to us. From it: a mixture of experts whose views of each modality are
fused by intra-modal complementarity, and the modalities by inter-modal complementarity. All formulas are our inference:

    v_mk(e) = x_m(e) W_mk + b_mk,                                       k = 1 .. K
    z_m(e) = sum_k softmax_k(s_1 c_mk(e)) v_mk(e),    c_mk = 1 - mean over l != k of cos(v_mk, v_ml)
    h(e) = LN(sum_m softmax_m(s_2 c_m(e)) z_m(e)),    c_m = 1 - mean over n != m of cos(z_m, z_n)

Symbols: v = `views`, W = `expert`, K = `model.num_experts`, log s = `log_sharpness`, learned. A view that is unlike
the others adds more. Two views are always as unlike each other, so weights differ from three on.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.config import ModelConfig
from fedsim.models.fusion.base import Pair, one_scorer_each
from fedsim.models.parameters import Params, layer_norm

# Of a view's length, about 1e2 as a rule: a zero token's views are zero, where the slope of a cosine is boundless.
_SMALL_SQUARE = 1e-3


class MocmeFusion:
    """Views of each token, weighed by how unlike each other they are; then the tokens likewise."""

    uses_modalities = True
    trains_apart = False

    def pairs(self, num_tokens: int) -> tuple[Pair, ...]:
        """Return one pair: one embedding per entity."""
        return one_scorer_each(1)

    def init(self, config: ModelConfig, num_tokens: int, generator: torch.Generator) -> Params:
        """Make the experts of each token; both sharpnesses start at 1."""
        dim, experts = config.dim, config.num_experts
        return {
            "fusion.expert": torch.randn(experts, num_tokens, dim, dim, generator=generator) / dim**0.5,
            "fusion.expert_bias": torch.zeros(experts, num_tokens, 1, dim),
            "fusion.log_sharpness": torch.zeros(2),
        }

    def fuse(self, params: Mapping[str, Tensor], tokens: Tensor, available: Tensor, uncertainty: Tensor) -> Tensor:
        """Return the fused embedding, [1, num_entities, dim]."""
        views = tokens @ params["fusion.expert"] + params["fusion.expert_bias"]  # [experts, num_tokens, entities, dim]
        sharpness = params["fusion.log_sharpness"].exp()
        fused = mix_by_complementarity(views, sharpness[0])  # [num_tokens, num_entities, dim]
        return layer_norm(mix_by_complementarity(fused, sharpness[1])).unsqueeze(0)


def mix_by_complementarity(views: Tensor, sharpness: Tensor) -> Tensor:
    """Sum views [num_views, ..., dim] by how unlike the others each is, [..., dim]."""
    weights = torch.softmax(sharpness * complementarity(views), 0)
    return (weights.unsqueeze(-1) * views).sum(0)


def complementarity(views: Tensor) -> Tensor:
    """Return 1 - the mean cosine of each view with the others, [num_views, ..., dim] -> [num_views, ...]."""
    unit = views * (views.square().sum(-1, keepdim=True) + _SMALL_SQUARE).rsqrt()
    # The sum over the others is the sum over all less the view itself: no tensor of all pairs.
    others = unit.sum(0) - unit
    return 1 - (unit * others).sum(-1) / max(len(views) - 1, 1)
