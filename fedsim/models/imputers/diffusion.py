"""HidE: hyper-modal imputation diffusion embedding (method.md section 4).

Source: the abstract of arXiv 2506.22036; the training rule is CSDI's (Tashiro et al., NeurIPS 2021), the sampler
DDIM (Song et al., ICLR 2021). Everything below the abstract's level is our inference.

Symbols: x_0 `clean`, x_k `noisy`, abar `level`, c `known`, o `available`, g = o - c `target`, K `steps`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.models.imputers.base import Imputation, ImputerStep, TokenTable
from fedsim.models.imputers.denoiser import (
    Condition,
    DenoiserInput,
    denoise,
    encode_condition,
    init_denoiser,
    step_modulation,
)
from fedsim.models.imputers.schedule import add_noise, clean_from_noise, ddim_step, sampling_times, signal_levels
from fedsim.models.parameters import Params


class DiffusionImputer:
    """One diffusion over all tokens of an entity, conditioned on the ones that are available."""

    def __init__(self, config: Config, num_tokens: int) -> None:
        """Keep the settings and the noise schedule."""
        self.config = config.diffusion
        self.dim = config.model.dim
        self.hide_rate = self.config.hide_rate
        self.prototype_weight = config.distillation.prototype
        self.num_tokens = num_tokens
        self.levels = signal_levels(self.config.schedule, self.config.steps)  # [steps + 1]
        self.times = sampling_times(self.config.steps, self.config.sampling_steps)

    def init(self, generator: torch.Generator) -> Params:
        """Make the denoiser's parameters."""
        return init_denoiser(self.num_tokens, self.dim, self.config.hidden, self.config.num_blocks, generator)

    def impute(self, params: Mapping[str, Tensor], tokens: TokenTable, generator: torch.Generator) -> Imputation:
        """Fill missing tokens by DDIM from noise, the available tokens given (eq. 7); mean and deviation of draws."""
        values = torch.zeros_like(tokens.values)
        uncertainty = torch.zeros_like(tokens.values[..., 0])
        rows = (~tokens.available).any(0).nonzero().squeeze(1)  # [batch]
        if len(rows) == 0:
            return Imputation(values, uncertainty)
        with torch.no_grad():
            draws = self._sample(params, _take_rows(tokens, rows), generator)  # [num_draws, num_tokens, batch, dim]
            mean = draws.mean(0)
            values[:, rows] = mean
            uncertainty[:, rows] = (draws - mean).square().mean((0, -1)).sqrt()
        return Imputation(values, uncertainty * (~tokens.available))

    def _sample(self, params: Mapping[str, Tensor], tokens: TokenTable, generator: torch.Generator) -> Tensor:
        """Run the sampler; result [num_draws, num_tokens, batch, dim]."""
        num_draws, (num_tokens, batch, dim) = self.config.num_draws, tokens.values.shape
        missing = ~tokens.available
        repeated = TokenTable(
            tokens.values.repeat(1, num_draws, 1),
            tokens.available.repeat(1, num_draws),
            tokens.prototypes.repeat(1, num_draws, 1),
            tokens.has_prototype.repeat(1, num_draws),
        )
        condition = encode_condition(params, self._inputs(repeated, repeated.available, ~repeated.available))
        noise = torch.randn(num_tokens, num_draws * batch, dim, generator=generator).to(tokens.values)
        free = missing.repeat(1, num_draws).unsqueeze(-1)  # the available tokens are re-inserted at every step
        modulation = step_modulation(params, self.config.steps)
        levels = self.levels.to(tokens.values)
        noisy, clean = noise * free, noise
        for time, next_time in zip(self.times, self.times[1:], strict=False):
            output = denoise(params, condition, noisy, modulation[time].unsqueeze(0))
            clean = self._clean(output, condition, noisy, levels[time])
            if next_time > 0:
                noisy = ddim_step(noisy, clean, levels[time], levels[next_time]) * free
        return clean.view(num_tokens, num_draws, batch, dim).transpose(0, 1)

    def training_step(
        self,
        params: Mapping[str, Tensor],
        tokens: TokenTable,
        seen: TokenTable,
        imputation: Imputation,
        generator: torch.Generator,
    ) -> ImputerStep:
        """Give L_diff (eq. 6), one-step estimates for some missing tokens, and their pull to prototypes (eq. 10)."""
        detached = tokens.detached()
        modulation = step_modulation(params, self.config.steps)
        losses: dict[str, Tensor] = {}
        loss = self.denoising_loss(params, detached, modulation, generator)
        if loss is not None:
            losses["diffusion"] = self.config.weight * loss
        rows, values = self._one_step_estimate(params, seen.detached(), imputation, modulation, generator)
        if rows is not None and values is not None and self.prototype_weight > 0:
            wanted = (tokens.has_prototype & ~seen.available)[:, rows]  # [num_tokens, num_rows]
            if wanted.any():
                cosine = torch.cosine_similarity(values, detached.prototypes[:, rows], dim=-1)
                losses["prototype"] = self.prototype_weight * (1 - cosine)[wanted].mean()
        return ImputerStep(losses, rows, values)

    def denoising_loss(
        self, params: Mapping[str, Tensor], tokens: TokenTable, modulation: Tensor, generator: torch.Generator
    ) -> Tensor | None:
        """Return L_diff on a random batch of entities (eq. 6); None if no entity has two available tokens."""
        eligible = (tokens.available.sum(0) >= 2).nonzero().squeeze(1)
        if len(eligible) == 0:
            return None
        size = min(self.config.batch_size, len(eligible))
        picked = torch.randint(len(eligible), (size,), generator=generator).to(eligible.device)
        batch = _take_rows(tokens, eligible[picked])
        known = random_condition(batch.available, generator)
        target = batch.available & ~known
        times = torch.randint(1, self.config.steps + 1, (size,), generator=generator).to(eligible.device)
        keep_prototype = (torch.rand(target.shape, generator=generator) < 0.5).to(target.device)
        inputs = self._inputs(batch, known, target, keep_prototype)
        noise = torch.randn(batch.values.shape, generator=generator).to(batch.values)
        level = self.levels.to(batch.values)[times].unsqueeze(1)  # [batch, 1]
        noisy = add_noise(batch.values, noise, level) * target.unsqueeze(-1)
        condition = encode_condition(params, inputs)
        output = denoise(params, condition, noisy, modulation[times])
        if self.config.prediction == "x0":
            error = (output + condition.start - batch.values).square().mean(-1)  # [num_tokens, batch]
        else:
            error = (output - noise).square().mean(-1)
        if self.config.min_snr is not None:
            snr = level / (1 - level).clamp(min=1e-5)
            weight = snr.clamp(max=self.config.min_snr)
            error = error * (weight if self.config.prediction == "x0" else weight / snr).T
        return (error * target).sum() / target.sum()

    def _one_step_estimate(
        self,
        params: Mapping[str, Tensor],
        tokens: TokenTable,
        imputation: Imputation,
        modulation: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Noise the cached imputation to a random step and estimate x_0 once, so that links reach the denoiser."""
        missing = (~tokens.available).any(0).nonzero().squeeze(1)
        if len(missing) == 0 or self.config.link_rows == 0:
            return None, None
        size = min(self.config.link_rows, len(missing))
        rows = missing[torch.randperm(len(missing), generator=generator)[:size].to(missing.device)]
        batch = _take_rows(tokens, rows)
        times = torch.randint(1, self.config.steps + 1, (size,), generator=generator).to(rows.device)
        noise = torch.randn(batch.values.shape, generator=generator).to(batch.values)
        level = self.levels.to(batch.values)[times].unsqueeze(1)
        free = ~batch.available
        noisy = add_noise(imputation.values[:, rows], noise, level) * free.unsqueeze(-1)
        condition = encode_condition(params, self._inputs(batch, batch.available, free))
        output = denoise(params, condition, noisy, modulation[times])
        return rows, self._clean(output, condition, noisy, level)

    def _clean(self, output: Tensor, condition: Condition, noisy: Tensor, level: Tensor) -> Tensor:
        """Turn the denoiser's output into an estimate of x_0, [num_tokens, batch, dim]."""
        if self.config.prediction == "x0":
            return output + condition.start
        return clean_from_noise(noisy, output, level)

    def _inputs(
        self, tokens: TokenTable, known: Tensor, noised: Tensor, keep_prototype: Tensor | None = None
    ) -> DenoiserInput:
        """Assemble the denoiser's input; prototypes stand only beside tokens that are not known."""
        has_prototype = tokens.has_prototype & ~known
        if not self.config.use_prototypes:
            has_prototype = torch.zeros_like(has_prototype)
        elif keep_prototype is not None:
            has_prototype = has_prototype & keep_prototype
        return DenoiserInput(tokens.values, known, noised, tokens.prototypes, has_prototype)


def random_condition(available: Tensor, generator: torch.Generator) -> Tensor:
    """Draw c(e): a random non-empty proper subset of the available tokens (eq. 6).

    Args:
        available: bool [num_tokens, batch], at least two per entity.
        generator: CPU generator.

    Returns:
        bool [num_tokens, batch].
    """
    draw = torch.rand(available.shape, generator=generator).to(available.device)
    threshold = torch.rand(available.shape[1], generator=generator).to(available.device)
    known = available & (draw < threshold)
    first = draw.masked_fill(~available, 2.0).argmin(0, keepdim=True)
    last = draw.masked_fill(~available, -1.0).argmax(0, keepdim=True)
    known = known.scatter(0, first, torch.ones_like(known[:1]))
    return known.scatter(0, last, torch.zeros_like(known[:1]))


def _take_rows(tokens: TokenTable, rows: Tensor) -> TokenTable:
    return TokenTable(
        tokens.values[:, rows], tokens.available[:, rows], tokens.prototypes[:, rows], tokens.has_prototype[:, rows]
    )
