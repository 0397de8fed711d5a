"""Sum of energies of structure, of one multimodal vector, and of both.

TBKGC: Mousselly-Sergieh et al., "A Multimodal Translation-Based Approach for Knowledge Graph Representation Learning",
*SEM 2018.

    E(h, r, t) = f(h_s, r, t_s) + f(h_m, r, t_m) + f(h_s + h_m, r, t_s + t_m) + f(h_s, r, t_m) + f(h_m, r, t_s)

Symbols: s = structure, m = the multimodal vector, f = the scorer (TransE in the paper). The paper maps the
concatenated visual and linguistic features by a dense layer. Our inference: m = b + mean over modalities of W_m x_m,
which is that map on the tokens, started at W_m = I and b = 0, the mean of the modality tokens; any scorer; and the
mean of the five terms, as in `ikrl`. With DistMult and ComplEx, which are linear in head and tail, the sum is
2 f(h_s + h_m, r, t_s + t_m).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.config import ModelConfig
from fedsim.models.fusion.base import Pair
from fedsim.models.parameters import Params

STRUCTURE, MULTIMODAL, BOTH = range(3)


class TbkgcFusion:
    """Structure, the multimodal vector and their sum, with one relation table."""

    uses_modalities = True
    trains_apart = False

    def pairs(self, num_tokens: int) -> tuple[Pair, ...]:
        """Return the five energies."""
        return (
            Pair(STRUCTURE, STRUCTURE, 0),
            Pair(MULTIMODAL, MULTIMODAL, 0),
            Pair(BOTH, BOTH, 0),
            Pair(STRUCTURE, MULTIMODAL, 0),
            Pair(MULTIMODAL, STRUCTURE, 0),
        )

    def init(self, config: ModelConfig, num_tokens: int, generator: torch.Generator) -> Params:
        """Make one projection per modality; at first the multimodal vector is the mean of the tokens."""
        return {
            "fusion.weight": torch.eye(config.dim).repeat(num_tokens - 1, 1, 1),
            "fusion.bias": torch.zeros(config.dim),
        }

    def fuse(self, params: Mapping[str, Tensor], tokens: Tensor, available: Tensor, uncertainty: Tensor) -> Tensor:
        """Return structure, the multimodal vector and their sum, [3, num_entities, dim]."""
        structure = tokens[0]
        multimodal = (tokens[1:] @ params["fusion.weight"]).mean(0) + params["fusion.bias"]
        return torch.stack([structure, multimodal, structure + multimodal])
