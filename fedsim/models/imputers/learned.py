"""What the learned imputers beside HidE share: the batch, the draws, the mean of draws and the link gradient.

They learn on the conditions of eq. 6, as HidE does. The server's prototypes are not among their inputs: MMFedE, the
method they are compared in, has none.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.models.imputers.base import Draws, Imputation, ImputerStep, TokenTable
from fedsim.models.imputers.conditions import draw_conditions, draw_link_rows
from fedsim.models.parameters import Params


class LearnedImputer(ABC):
    """A network from the known tokens, and noise, to all tokens.

    Attributes:
        noise_dim: width of the noise of one draw; 0 if nothing is drawn, and then one draw is all.
    """

    def __init__(self, config: Config, num_tokens: int, noise_dim: int = 0) -> None:
        """Keep the settings."""
        self.config = config.imputer
        self.dim, self.num_tokens, self.noise_dim = config.model.dim, num_tokens, noise_dim
        self.num_draws = self.config.num_draws if noise_dim > 0 else 1
        self.hide_rate = self.config.hide_rate
        self.each_epoch = self.config.impute_each == "epoch"

    @abstractmethod
    def init(self, generator: torch.Generator) -> Params:
        """Make the initial parameters."""

    @abstractmethod
    def estimate(self, params: Mapping[str, Tensor], values: Tensor, known: Tensor, noise: Tensor) -> Tensor:
        """Estimate all tokens of entities, by one draw.

        Args:
            params: the imputer's parameters.
            values: [num_tokens, batch, dim], read where `known`.
            known: bool [num_tokens, batch].
            noise: standard normal, [batch, noise_dim].

        Returns:
            [num_tokens, batch, dim].
        """

    @abstractmethod
    def losses(self, params: Mapping[str, Tensor], values: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Give the weighted loss terms, by name.

        Args:
            params: the imputer's parameters.
            values: tokens of the drawn entities, without gradient, [num_tokens, batch, dim].
            draws: of `draw_conditions`, and ``noise`` [batch, noise_dim]; padded entities have no target.
        """

    def draw_imputation(self, available: Tensor, generator: torch.Generator) -> Draws:
        """Draw the noise of all entities that lack a token, [num_draws, num_rows, noise_dim]."""
        rows = (~available).any(0).nonzero().squeeze(1)
        return {"rows": rows, "noise": torch.randn(self.num_draws, len(rows), self.noise_dim, generator=generator)}

    def impute(self, params: Mapping[str, Tensor], tokens: TokenTable, draws: Draws) -> Imputation:
        """Estimate the tokens from the available ones; mean and deviation of the draws."""
        with torch.no_grad():
            batch = tokens.take(draws["rows"])
            samples = [self.estimate(params, batch.values, batch.available, noise) for noise in draws["noise"]]
            return Imputation.of_draws(tokens, draws["rows"], torch.stack(samples, 1))

    def draw_step(self, available: Tensor, seen: Tensor, generator: torch.Generator) -> Draws:
        """Draw a batch by eq. 6, and the entities whose links reach the imputer; each with noise."""
        draws = draw_conditions(available, self.config.batch_size, generator)
        draws["noise"] = torch.randn(len(draws["rows"]), self.noise_dim, generator=generator)
        if self.config.link_rows > 0:
            draws["link_rows"] = draw_link_rows(seen, self.config.link_rows, generator)
            draws["link_noise"] = torch.randn(len(draws["link_rows"]), self.noise_dim, generator=generator)
        return draws

    def training_step(
        self,
        params: Mapping[str, Tensor],
        tokens: TokenTable,
        seen: TokenTable,
        imputation: Imputation,
        draws: Draws,
    ) -> ImputerStep:
        """Give the loss terms on detached tokens, and estimates for some missing tokens, with gradient."""
        losses: dict[str, Tensor] = {}
        if draws["rows"].shape[-1] > 0:
            losses = self.losses(params, tokens.detached().take(draws["rows"]).values, draws)
        if "link_rows" not in draws or draws["link_rows"].shape[-1] == 0:
            return ImputerStep(losses)
        batch = seen.detached().take(draws["link_rows"])
        values = self.estimate(params, batch.values, batch.available, draws["link_noise"])
        return ImputerStep(losses, draws["link_rows"], values)
