"""Sum of structure and modality energies in one space.

IKRL: Xie et al., "Image-embodied Knowledge Representation Learning", IJCAI 2017.

    E(h, r, t) = E_SS + E_II + E_SI + E_IS,    E_XY = f(h_X, r, t_Y), all with the same r

Symbols: S = structure, I = image, f = the scorer (TransE in the paper). Our inference: any scorer instead of TransE,
each further modality the same three terms that the image has, the token x_m as the image-based embedding, where the
paper weighs several pictures of an entity by attention, and the mean of the terms instead of the sum: it ranks alike,
and cross-entropy and margin meet scores of the size that one term has.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.config import ModelConfig
from fedsim.models.fusion.base import Pair
from fedsim.models.parameters import Params


class IkrlFusion:
    """Each token against itself, and structure against each modality both ways; one relation table, mean of all."""

    uses_modalities = True
    trains_apart = False

    def pairs(self, num_tokens: int) -> tuple[Pair, ...]:
        """Return 1 + 3 pairs per modality; modalities are not scored against each other."""
        pairs = [Pair(0, 0, 0)]
        for token in range(1, num_tokens):
            pairs += [Pair(token, token, 0), Pair(0, token, 0), Pair(token, 0, 0)]
        return tuple(pairs)

    def init(self, config: ModelConfig, num_tokens: int, generator: torch.Generator) -> Params:
        """Return no parameters."""
        return {}

    def fuse(self, params: Mapping[str, Tensor], tokens: Tensor, available: Tensor, uncertainty: Tensor) -> Tensor:
        """Return the tokens themselves, [num_tokens, num_entities, dim]."""
        return tokens
