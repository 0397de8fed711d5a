"""HidE: hyper-modal imputation diffusion embedding (method.md section 4).

Source: the abstract of arXiv 2506.22036; the training rule is CSDI's (Tashiro et al., NeurIPS 2021), the sampler
DDIM (Song et al., ICLR 2021). Everything below the abstract's level is our inference.

Symbols: x_0 `clean`, x_k `noisy`, abar `level`, c `known`, o `available`, g = o - c `target`, K `steps`.
"""

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.models.imputers.base import Draws, Imputation, ImputerStep, TokenTable
from fedsim.models.imputers.conditions import draw_conditions, draw_link_rows, mean_of_targets
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
        self.each_epoch = self.config.impute_each == "epoch"
        self.prototype_weight = config.distillation.prototype
        self.num_tokens = num_tokens
        self.levels = signal_levels(self.config.schedule, self.config.steps)  # [steps + 1]
        self.times = sampling_times(self.config.steps, self.config.sampling_steps)

    def init(self, generator: torch.Generator) -> Params:
        """Make the denoiser's parameters."""
        return init_denoiser(self.num_tokens, self.dim, self.config.hidden, self.config.num_blocks, generator)

    def draw_imputation(self, available: Tensor, generator: torch.Generator) -> Draws:
        """Draw the sampler's starts for all entities that lack a token, [num_tokens, num_draws, num_rows, dim]."""
        rows = (~available).any(0).nonzero().squeeze(1)
        shape = (len(available), self.config.num_draws, len(rows), self.dim)
        return {"rows": rows, "noise": torch.randn(shape, generator=generator)}

    def impute(self, params: Mapping[str, Tensor], tokens: TokenTable, draws: Draws) -> Imputation:
        """Fill missing tokens by DDIM from noise, the available tokens given (eq. 7); mean and deviation of draws."""
        rows, means = draws["rows"], tokens.means()
        with torch.no_grad():
            # [num_tokens, num_draws, num_rows, dim]
            samples = self._sample(params, tokens.take(rows), means, draws["noise"])
        imputation = Imputation.of_draws(tokens, rows, samples)
        if self.config.unseen == "draw":
            return imputation
        seen = self._seen(tokens)
        values = torch.where(seen.unsqueeze(-1), imputation.values, means.unsqueeze(1))
        return Imputation(values, imputation.uncertainty * seen)

    def _seen(self, tokens: TokenTable) -> Tensor:
        """Tell of which entities the client, or a prototype in use, tells a modality token, bool [num_entities]."""
        seen = tokens.available[1:].any(0)
        if tokens.has_prototype is None or not self.config.use_prototypes:
            return seen
        return seen | tokens.has_prototype[1:].any(0)

    def _sample(self, params: Mapping[str, Tensor], tokens: TokenTable, means: Tensor, noise: Tensor) -> Tensor:
        """Run the sampler from noise [num_tokens, num_draws, batch, dim]; result of the same shape."""
        num_tokens, num_draws, batch, dim = noise.shape
        condition = encode_condition(params, self._inputs(tokens, means, tokens.available, ~tokens.available))
        condition = condition.repeat(num_draws)
        free = (~tokens.available).repeat(1, num_draws).unsqueeze(-1)  # the others are re-inserted at every step
        modulation = step_modulation(params, self.config.steps, self.times)  # [S + 1, ...]
        levels = self.levels.to(tokens.values)
        clean = noise.reshape(num_tokens, num_draws * batch, dim)
        noisy = clean * free
        for place, (time, next_time) in enumerate(itertools.pairwise(self.times)):
            output = denoise(params, condition, noisy, modulation[place].unsqueeze(0))
            clean = self._clean(output, condition, noisy, levels[time])
            if next_time > 0:
                noisy = ddim_step(noisy, clean, levels[time], levels[next_time]) * free
        return clean.view(num_tokens, num_draws, batch, dim)

    def draw_step(self, available: Tensor, seen: Tensor, generator: torch.Generator) -> Draws:
        """Draw a batch of eq. 6, and the entities whose links reach the denoiser with their steps and noise."""
        draws = self.draw_denoising(available, generator)
        if self.config.link_rows > 0:
            draws["link_rows"] = draw_link_rows(seen, self.config.link_rows, generator)
            size = len(draws["link_rows"])
            draws["link_times"] = torch.randint(1, self.config.steps + 1, (size,), generator=generator)
            draws["link_noise"] = torch.randn(len(available), size, self.dim, generator=generator)
        return draws

    def draw_denoising(self, available: Tensor, generator: torch.Generator) -> Draws:
        """Draw a batch of entities with two available tokens or more, what is known of each, step and noise (eq. 6)."""
        draws = draw_conditions(available, self.config.batch_size, generator)
        size = len(draws["rows"])
        return draws | {
            "times": torch.randint(1, self.config.steps + 1, (size,), generator=generator),
            "keep_prototype": torch.rand(draws["known"].shape, generator=generator) < 0.5,
            "noise": torch.randn(len(available), size, self.dim, generator=generator),
        }

    def training_step(
        self,
        params: Mapping[str, Tensor],
        tokens: TokenTable,
        seen: TokenTable,
        imputation: Imputation,
        draws: Draws,
    ) -> ImputerStep:
        """Give L_diff (eq. 6), one-step estimates for some missing tokens, and their pull to prototypes (eq. 10)."""
        detached = tokens.detached()
        modulation, means = step_modulation(params, self.config.steps), tokens.means()
        losses: dict[str, Tensor] = {}
        if draws["rows"].shape[-1] > 0:
            losses["diffusion"] = self.config.weight * self.denoising_loss(params, detached, means, modulation, draws)
        if "link_rows" not in draws or draws["link_rows"].shape[-1] == 0:
            return ImputerStep(losses)
        rows = draws["link_rows"]
        values = self._one_step_estimate(params, seen.detached(), means, imputation, modulation, draws)
        if self.prototype_weight > 0 and tokens.prototypes is not None and tokens.has_prototype is not None:
            wanted = (tokens.has_prototype & ~seen.available)[:, rows]  # [num_tokens, num_rows]
            if self.config.unseen == "mean":
                wanted = wanted & self._seen(seen.take(rows))
            wanted = wanted.to(values.dtype)
            cosine = torch.cosine_similarity(values, tokens.prototypes[:, rows], dim=-1)
            pull = ((1 - cosine) * wanted).sum() / wanted.sum().clamp(min=1)
            losses["prototype"] = self.prototype_weight * pull
        return ImputerStep(losses, rows, values)

    def denoising_loss(
        self, params: Mapping[str, Tensor], tokens: TokenTable, means: Tensor, modulation: Tensor, draws: Draws
    ) -> Tensor:
        """Return L_diff on the drawn batch of entities (eq. 6)."""
        batch, known, target = tokens.take(draws["rows"]), draws["known"], draws["target"]
        level = self.levels.to(batch.values)[draws["times"]].unsqueeze(1)  # [batch, 1]
        noisy = add_noise(batch.values, draws["noise"], level) * target.unsqueeze(-1)
        condition = encode_condition(params, self._inputs(batch, means, known, target, draws["keep_prototype"]))
        output = denoise(params, condition, noisy, modulation[draws["times"]])
        if self.config.prediction == "x0":
            error = (output + condition.start - batch.values).square().mean(-1)  # [num_tokens, batch]
        else:
            error = (output - draws["noise"]).square().mean(-1)
        if self.config.min_snr is not None:
            snr = level / (1 - level).clamp(min=1e-5)
            weight = snr.clamp(max=self.config.min_snr)
            error = error * (weight if self.config.prediction == "x0" else weight / snr).T
        return mean_of_targets(error, target)

    def _one_step_estimate(
        self,
        params: Mapping[str, Tensor],
        tokens: TokenTable,
        means: Tensor,
        imputation: Imputation,
        modulation: Tensor,
        draws: Draws,
    ) -> Tensor:
        """Noise the cached imputation to a random step and estimate x_0 once, so that links reach the denoiser."""
        rows, times = draws["link_rows"], draws["link_times"]
        batch = tokens.take(rows)
        level = self.levels.to(batch.values)[times].unsqueeze(1)
        free = ~batch.available
        noisy = add_noise(imputation.values[:, rows], draws["link_noise"], level) * free.unsqueeze(-1)
        condition = encode_condition(params, self._inputs(batch, means, batch.available, free))
        output = denoise(params, condition, noisy, modulation[times])
        estimate = self._clean(output, condition, noisy, level)
        if self.config.unseen == "draw":
            return estimate
        return torch.where(self._seen(batch).unsqueeze(-1), estimate, imputation.values[:, rows])

    def _clean(self, output: Tensor, condition: Condition, noisy: Tensor, level: Tensor) -> Tensor:
        """Turn the denoiser's output into an estimate of x_0, [num_tokens, batch, dim]."""
        if self.config.prediction == "x0":
            return output + condition.start
        return clean_from_noise(noisy, output, level)

    def _inputs(
        self,
        tokens: TokenTable,
        means: Tensor,
        known: Tensor,
        noised: Tensor,
        keep_prototype: Tensor | None = None,
    ) -> DenoiserInput:
        """Assemble the denoiser's input; prototypes stand only beside tokens that are not known."""
        if tokens.prototypes is None or tokens.has_prototype is None or not self.config.use_prototypes:
            return DenoiserInput(tokens.values, known, noised, means)
        has_prototype = tokens.has_prototype & ~known
        if keep_prototype is not None:
            has_prototype = has_prototype & keep_prototype
        return DenoiserInput(tokens.values, known, noised, means, tokens.prototypes, has_prototype)
