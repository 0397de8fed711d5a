"""GAN imputation after MACO: a generator of missing tokens, a discriminator, and a contrast with structure.

Source: Zhang et al., "MACO: A Modality Adversarial and Contrastive Framework for Modality-missing Multi-modal Knowledge
Graph Completion", NLPCC 2023: "MACO trains a generator and discriminator adversarially to generate missing modality
features [...] we design a cross-modal contrastive loss to improve the performance of the generator". The rest is our
inference: the generator is told the known tokens besides noise; its error against the true token is a term of its own;
generated tokens are standardised like true ones; the contrast is taken between projections, which learn on true pairs;
both players take one step together.

Symbols: G `estimate`, D `_judge`, z `noise`, tau `TEMPERATURE`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from fedsim.config import Config
from fedsim.models.imputers.base import Draws
from fedsim.models.imputers.conditions import mean_of_targets
from fedsim.models.imputers.learned import LearnedImputer
from fedsim.models.imputers.networks import as_tokens, known_input, known_width, perceptron, perceptron_init
from fedsim.models.parameters import Params, layer_norm, linear, linear_init

TEMPERATURE = 0.5
GENERATOR = "imputer.generator."


class GANImputer(LearnedImputer):
    """Generate modality tokens that a discriminator cannot tell from true ones beside the entity's structure."""

    def __init__(self, config: Config, num_tokens: int) -> None:
        """Keep the settings; a draw is one of the generator's noise."""
        super().__init__(config, num_tokens, noise_dim=config.imputer.latent)

    def init(self, generator: torch.Generator) -> Params:
        """Make generator, discriminator and the contrast's projections."""
        width, hidden, latent = self.num_tokens * self.dim, self.config.hidden, self.config.latent
        generator_in = known_width(self.num_tokens, self.dim) + self.noise_dim
        pair = 2 * self.dim + self.num_tokens - 1
        params = perceptron_init("imputer.generator", generator_in, hidden, width, generator, scale=0.5)
        params |= perceptron_init("imputer.discriminator", pair, hidden, 1, generator)
        params |= linear_init("imputer.contrast_structure", self.dim, latent, generator)
        for index in range(1, self.num_tokens):
            params |= linear_init(f"imputer.contrast_{index}", self.dim, latent, generator)
        return params

    def estimate(self, params: Mapping[str, Tensor], values: Tensor, known: Tensor, noise: Tensor) -> Tensor:
        """Generate tokens of zero mean and unit variance from the known ones and noise."""
        inputs = torch.cat([known_input(values, known), noise], 1)
        return layer_norm(as_tokens(perceptron(params, "imputer.generator", inputs), self.num_tokens))

    def losses(self, params: Mapping[str, Tensor], values: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Return both players' terms; each sees the other's parameters as constants, so one step serves both.

        Structure is never missing, so the adversarial game and the contrast are played for modality tokens alone.
        """
        fake = self.estimate(params, values, draws["known"], draws["noise"])
        error = (fake - values).square().mean(-1)  # [num_tokens, batch]
        target, structure = draws["target"][1:], values[0]
        fixed = {name: value.detach() for name, value in params.items() if not name.startswith(GENERATOR)}
        both = torch.cat([values[1:], fake[1:].detach()], 1)
        true_logit, fake_logit = self._judge(params, both, structure.repeat(2, 1)).chunk(2, 1)
        caught = functional.softplus(-true_logit) + functional.softplus(fake_logit)
        convincing = functional.softplus(-self._judge(fixed, fake[1:], structure))  # non-saturating
        contrast = self._contrast(params, values[1:], structure, draws) + self._contrast(
            fixed, fake[1:], structure, draws
        )
        return {
            "recovery": self.config.weight * mean_of_targets(error, draws["target"]),
            "discriminator": mean_of_targets(caught, target),
            "adversarial": self.config.adversarial_weight * mean_of_targets(convincing, target),
            "contrast": self.config.contrastive_weight * contrast,
        }

    def _judge(self, params: Mapping[str, Tensor], tokens: Tensor, structure: Tensor) -> Tensor:
        """Return the logit that modality tokens are true, beside the entity's structure.

        Args:
            params: the discriminator's parameters.
            tokens: [num_tokens - 1, batch, dim].
            structure: [batch, dim].

        Returns:
            [num_tokens - 1, batch].
        """
        which = torch.eye(len(tokens), dtype=tokens.dtype, device=tokens.device).unsqueeze(1)
        pairs = [tokens, structure.expand_as(tokens), which.expand(-1, tokens.shape[1], -1)]
        return perceptron(params, "imputer.discriminator", torch.cat(pairs, -1)).squeeze(-1)

    def _contrast(self, params: Mapping[str, Tensor], tokens: Tensor, structure: Tensor, draws: Draws) -> Tensor:
        """Return the cross-entropy of finding an entity's token by its structure, among the targets of the batch.

        Args:
            params: the projections' parameters.
            tokens: [num_tokens - 1, batch, dim].
            structure: [batch, dim].
            draws: of the step; an entity that was drawn twice is no wrong answer to itself.
        """
        query = functional.normalize(linear(params, "imputer.contrast_structure", structure), dim=-1)
        projected = [linear(params, f"imputer.contrast_{index}", item) for index, item in enumerate(tokens, start=1)]
        keys = functional.normalize(torch.stack(projected), dim=-1)  # [num_tokens - 1, batch, latent]
        logits = query @ keys.transpose(1, 2) / TEMPERATURE  # [num_tokens - 1, batch, batch]
        rows, target = draws["rows"], draws["target"][1:]
        itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        other = target.unsqueeze(1) & (rows.unsqueeze(0) != rows.unsqueeze(1))
        logits = logits.masked_fill(~(other | itself), -1e4)
        return mean_of_targets(-logits.log_softmax(-1).diagonal(dim1=1, dim2=2), target)
