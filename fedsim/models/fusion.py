"""Fusion: from an entity's tokens to the embeddings that the scorer takes (eq. 2).

To add one: write a class with the methods of `Fusion` and add a line to `FUSIONS`.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from fedsim.models.parameters import Params


class Fusion(Protocol):
    """Maps tokens to entity embeddings, one per part; the scores of the parts are summed."""

    uses_modalities: bool

    def num_parts(self, num_tokens: int) -> int:
        """Return how many scorers are summed."""
        ...

    def init(self, num_tokens: int, dim: int, hidden: int, generator: torch.Generator) -> Params:
        """Make the parameters, named ``fusion.*``."""
        ...

    def fuse(self, params: Mapping[str, Tensor], tokens: Tensor, available: Tensor, uncertainty: Tensor) -> Tensor:
        """Fuse complete tokens.

        Args:
            params: the shared modules.
            tokens: [num_tokens, num_entities, dim], missing ones imputed.
            available: [num_tokens, num_entities] of 0 and 1, o_m(e).
            uncertainty: [num_tokens, num_entities] of the imputation.

        Returns:
            [num_parts, num_entities, dim].
        """
        ...


class GateFusion:
    """Convex combination: h(e) = sum_m g_m x_m, g = softmax over tokens of a small net of [x_m, o_m, u_m]."""

    uses_modalities = True

    def num_parts(self, num_tokens: int) -> int:
        """Return 1: one embedding per entity."""
        return 1

    def init(self, num_tokens: int, dim: int, hidden: int, generator: torch.Generator) -> Params:
        """Make one net per token; the last layer starts at zero, so all tokens weigh alike."""
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


class SplitFusion:
    """One scorer per token with its own relation table, scores summed (MoSE, Zhao et al., EMNLP 2022)."""

    uses_modalities = True

    def num_parts(self, num_tokens: int) -> int:
        """Return one part per token."""
        return num_tokens

    def init(self, num_tokens: int, dim: int, hidden: int, generator: torch.Generator) -> Params:
        """Return no parameters."""
        return {}

    def fuse(self, params: Mapping[str, Tensor], tokens: Tensor, available: Tensor, uncertainty: Tensor) -> Tensor:
        """Return the tokens themselves, [num_tokens, num_entities, dim]."""
        return tokens


class NoFusion:
    """Structure alone, the raw table without layer norm: the unimodal FedE client."""

    uses_modalities = False

    def num_parts(self, num_tokens: int) -> int:
        """Return 1."""
        return 1

    def init(self, num_tokens: int, dim: int, hidden: int, generator: torch.Generator) -> Params:
        """Return no parameters."""
        return {}

    def fuse(self, params: Mapping[str, Tensor], tokens: Tensor, available: Tensor, uncertainty: Tensor) -> Tensor:
        """Return the structure token, [1, num_entities, dim]."""
        return tokens[:1]


FUSIONS: dict[str, Fusion] = {"gate": GateFusion(), "split": SplitFusion(), "none": NoFusion()}
