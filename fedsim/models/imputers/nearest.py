"""Nearest-neighbour imputation: a missing token is the mean of those of the entities that are near in structure.

Source: k-nearest-neighbour imputation, Troyanskaya et al., Bioinformatics 2001; nearness by the cosine of structure
tokens is our choice.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from fedsim.config import Config
from fedsim.models.imputers.base import Draws, FixedImputer, Imputation, TokenTable

BLOCK = 1024  # missing entities that are compared at once


class NearestImputer(FixedImputer):
    """Fill with the mean of the nearest entities that have the modality (zero where the client has none)."""

    def __init__(self, config: Config, num_tokens: int) -> None:
        """Keep the number of neighbours and when to impute."""
        self.num_neighbours = config.imputer.num_neighbours
        self.hide_rate = config.imputer.hide_rate
        self.each_epoch = config.imputer.impute_each == "epoch"

    def draw_imputation(self, available: Tensor, generator: torch.Generator) -> Draws:
        """Draw nothing; say, per modality, which entities lack it and which have it."""
        rows = enumerate(available[1:], start=1)
        return {
            name: mask.nonzero().squeeze(1)
            for index, has in rows
            for name, mask in ((f"missing_{index}_rows", ~has), (f"known_{index}_rows", has))
        }

    def impute(self, params: Mapping[str, Tensor], tokens: TokenTable, draws: Draws) -> Imputation:
        """Average the neighbours' tokens, block by block of the missing ones."""
        values = tokens.values.detach()
        structure = functional.normalize(values[0], dim=-1)  # [num_entities, dim]
        filled = [torch.zeros_like(values[0])]  # structure is never missing
        for index in range(1, len(values)):
            missing, known = draws[f"missing_{index}_rows"], draws[f"known_{index}_rows"]
            there = tokens.available[index, known]  # padded rows are of no entity: not there
            estimates = [
                self._mean_of_nearest(structure[block], structure[known], values[index, known], there)
                for block in missing.split(BLOCK)
            ]
            filled.append(torch.zeros_like(values[0]).index_copy(0, missing, torch.cat(estimates)))
        return Imputation(torch.stack(filled), torch.zeros_like(values[..., 0]))

    def _mean_of_nearest(self, queries: Tensor, keys: Tensor, tokens: Tensor, there: Tensor) -> Tensor:
        """Average the tokens of the nearest keys.

        Args:
            queries: unit structure tokens, [num_queries, dim].
            keys: unit structure tokens, [num_keys, dim].
            tokens: of the modality, [num_keys, dim].
            there: bool [num_keys], keys that count.

        Returns:
            [num_queries, dim], zero if there are no keys.
        """
        similarity = (queries @ keys.T).masked_fill(~there, -torch.inf)  # [num_queries, num_keys]
        near = similarity.topk(min(self.num_neighbours, len(keys)))
        counts = torch.isfinite(near.values).to(tokens.dtype)  # [num_queries, num_neighbours]
        total = (tokens[near.indices] * counts.unsqueeze(-1)).sum(1)
        return total / counts.sum(1, keepdim=True).clamp(min=1)
