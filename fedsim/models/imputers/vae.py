"""VAE imputation: a latent of the known tokens, from which all tokens are decoded.

Source: Kingma and Welling, ICLR 2014; beta from Higgins et al., ICLR 2017; one encoder of whatever is known, with
zeros and flags for the rest, after Nazabal et al. (HI-VAE), Pattern Recognition 2020. That the decoder is judged on the
tokens that the encoder is not told (method.md eq. 6) is our choice: it is what an imputation is asked for.

Symbols: z `latent`, mu `mean`, log sigma^2 `log_variance`, beta `kl_weight`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.models.imputers.base import Draws
from fedsim.models.imputers.conditions import mean_of_targets
from fedsim.models.imputers.learned import LearnedImputer
from fedsim.models.imputers.networks import as_tokens, known_input, known_width, perceptron, perceptron_init
from fedsim.models.parameters import Params

LOG_VARIANCE_LIMIT = 8.0


class VAEImputer(LearnedImputer):
    """q(z | known tokens) = N(mu, sigma^2), p(z) = N(0, I), and a Gaussian decoder of unit variance."""

    def __init__(self, config: Config, num_tokens: int) -> None:
        """Keep the settings; a draw is one of the latent."""
        super().__init__(config, num_tokens, noise_dim=config.imputer.latent)

    def init(self, generator: torch.Generator) -> Params:
        """Make encoder and decoder."""
        width, hidden, latent = self.num_tokens * self.dim, self.config.hidden, self.config.latent
        encoder_in = known_width(self.num_tokens, self.dim)
        params = perceptron_init("imputer.encoder", encoder_in, hidden, 2 * latent, generator, scale=0.5)
        return params | perceptron_init("imputer.decoder", latent, hidden, width, generator)

    def estimate(self, params: Mapping[str, Tensor], values: Tensor, known: Tensor, noise: Tensor) -> Tensor:
        """Encode, draw and decode."""
        return self._decode(params, *self._encode(params, values, known), noise)

    def losses(self, params: Mapping[str, Tensor], values: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Return the error of the targets and the divergence, both per number of a token."""
        mean, log_variance = self._encode(params, values, draws["known"])
        output = self._decode(params, mean, log_variance, draws["noise"])
        error = (output - values).square().mean(-1)  # [num_tokens, batch]
        divergence = gaussian_divergence(mean, log_variance) / self.dim  # [batch]
        real = draws["target"].any(0)
        return {
            "recovery": self.config.weight * mean_of_targets(error, draws["target"]),
            "divergence": self.config.weight * self.config.kl_weight * mean_of_targets(divergence, real),
        }

    def _encode(self, params: Mapping[str, Tensor], values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of the latent, [batch, latent] each."""
        mean, log_variance = perceptron(params, "imputer.encoder", known_input(values, known)).chunk(2, -1)
        return mean, LOG_VARIANCE_LIMIT * torch.tanh(log_variance / LOG_VARIANCE_LIMIT)

    def _decode(self, params: Mapping[str, Tensor], mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
        """Draw the latent and decode it, [num_tokens, batch, dim]."""
        latent = mean + torch.exp(log_variance / 2) * noise
        return as_tokens(perceptron(params, "imputer.decoder", latent), self.num_tokens)


def gaussian_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_variance)) || N(0, I)), [batch, latent] to [batch]."""
    return (mean.square() + log_variance.exp() - log_variance - 1).sum(-1) / 2
