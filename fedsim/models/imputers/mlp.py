"""MLP imputation: a missing token is a nonlinear function of the entity's other tokens, by regression.

What HidE comes down to without noise and steps: one pass of a network from the known tokens to all, trained by the same
masking rule (method.md eq. 6).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.models.imputers.base import Draws
from fedsim.models.imputers.conditions import mean_of_targets
from fedsim.models.imputers.learned import LearnedImputer
from fedsim.models.imputers.networks import as_tokens, known_input, known_width, perceptron, perceptron_init
from fedsim.models.parameters import Params


class MLPImputer(LearnedImputer):
    """One network for all masks, whose error is the squared distance to the tokens that it is not told."""

    def init(self, generator: torch.Generator) -> Params:
        """Make the network."""
        width = self.num_tokens * self.dim
        return perceptron_init(
            "imputer.network", known_width(self.num_tokens, self.dim), self.config.hidden, width, generator
        )

    def estimate(self, params: Mapping[str, Tensor], values: Tensor, known: Tensor, noise: Tensor) -> Tensor:
        """Pass the known tokens through the network."""
        return as_tokens(perceptron(params, "imputer.network", known_input(values, known)), self.num_tokens)

    def losses(self, params: Mapping[str, Tensor], values: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Return the mean squared error of the targets."""
        output = self.estimate(params, values, draws["known"], draws["noise"])
        error = (output - values).square().mean(-1)  # [num_tokens, batch]
        return {"recovery": self.config.weight * mean_of_targets(error, draws["target"])}
