"""Low-rank interactive fusion, and a joint decision with each token alone.

IMF: Li et al., "IMF: Interactive Multimodal Fusion Model for Link Prediction", WWW 2023.

    h_f(e) = LN(P^T prod_m (U_m^T x_m(e) + b_m)),    score = mean of f(h_f, r_f, t_f) and f(h_m, r_m, t_m), all m

Symbols: U = `factor`, b = `factor_bias`, P = `output`, prod = elementwise, f = the scorer, h_m = x_m, r_f and r_m =
relations of tables of their own. The fused embedding and each token are trained by losses of their own. The product of
projections is a tensor of all tokens' interactions in `model.fusion_rank` rank-one terms. Our inference: that form of
the low-rank fusion, b started at 1 (so that products of fewer tokens are terms too, and a token of zeros leaves the
others'), the layer norm, the plain mean where the paper learns the weights of the average, and any scorer instead of
the paper's contextual relational model. The paper's contrastive term is left out.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.config import ModelConfig
from fedsim.models.fusion.base import Pair, one_scorer_each
from fedsim.models.parameters import Params, layer_norm


class ImfFusion:
    """The multiplied tokens and each token, every one with a scorer and a relation table of its own."""

    uses_modalities = True
    trains_apart = True

    def pairs(self, num_tokens: int) -> tuple[Pair, ...]:
        """Return one pair for the fused embedding, then one per token."""
        return one_scorer_each(1 + num_tokens)

    def init(self, config: ModelConfig, num_tokens: int, generator: torch.Generator) -> Params:
        """Make the factors of the tokens and the way back from them."""
        dim, rank = config.dim, config.fusion_rank
        return {
            "fusion.factor": torch.randn(num_tokens, dim, rank, generator=generator) / dim**0.5,
            "fusion.factor_bias": torch.ones(num_tokens, 1, rank),
            "fusion.output": torch.randn(rank, dim, generator=generator) / rank**0.5,
        }

    def fuse(self, params: Mapping[str, Tensor], tokens: Tensor, available: Tensor, uncertainty: Tensor) -> Tensor:
        """Return the fused embedding and the tokens, [1 + num_tokens, num_entities, dim]."""
        factors = tokens @ params["fusion.factor"] + params["fusion.factor_bias"]  # [num_tokens, num_entities, rank]
        product = factors[0]
        for factor in factors[1:]:
            product = product * factor
        fused = layer_norm(product @ params["fusion.output"])
        return torch.cat([fused.unsqueeze(0), tokens])
