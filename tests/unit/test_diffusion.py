"""HidE: the CSDI rule, the sampler and its uncertainty (method.md eq. 4 to 7)."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from experiments import generator, impute, impute_step, small_config, token_table
from fedsim.models.client_model import ClientModel
from fedsim.models.imputers import Imputation, TokenTable, diffusion
from fedsim.models.imputers.conditions import random_condition
from fedsim.models.imputers.denoiser import Condition, step_modulation
from fedsim.models.imputers.diffusion import DiffusionImputer
from fedsim.models.imputers.mean import MeanImputer
from fedsim.models.optimizers import adam
from fedsim.models.parameters import Params, layer_norm
from fedsim.models.training import hide_tokens

NUM_TOKENS = 3
AVAILABLE = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1]]).bool()
MISSING = ~AVAILABLE


def _imputer(**overrides: Any) -> DiffusionImputer:
    return DiffusionImputer(small_config({f"diffusion.{k}": v for k, v in overrides.items()}), NUM_TOKENS)


def _loss(imputer: DiffusionImputer, params: Params, tokens: TokenTable, seed: int = 5) -> Tensor:
    draws = imputer.draw_denoising(tokens.available, generator(seed))
    return imputer.denoising_loss(params, tokens, tokens.means(), step_modulation(params, imputer.config.steps), draws)


@given(seed=st.integers(0, 9999), num_tokens=st.integers(2, 6), batch=st.integers(1, 40))
def test_the_condition_is_a_non_empty_proper_subset_of_the_available(seed: int, num_tokens: int, batch: int) -> None:
    """Eq. 6: c(e) is not empty, and leaves a target; nothing that is missing is ever condition or target."""
    draws = generator(seed)
    available = torch.rand(num_tokens, batch, generator=draws) < 0.6
    available[0] = available[1] = True
    known = random_condition(available, draws)
    assert not bool((known & ~available).any())
    assert bool((known.sum(0) >= 1).all())
    assert bool((known.sum(0) < available.sum(0)).all())


def test_every_subset_is_drawn() -> None:
    """Three available tokens have six non-empty proper subsets; each must come up, the two sizes alike often."""
    known = random_condition(torch.ones(3, 3000, dtype=torch.bool), generator())
    codes = (known * torch.tensor([[1], [2], [4]])).sum(0)
    share = torch.bincount(codes, minlength=8) / 3000
    assert share[0] == share[7] == 0
    assert bool((share[1:7] > 0.1).all())


@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
def test_a_missing_token_is_never_a_target(prediction: str) -> None:
    """Whatever stands in the place of a missing token, the loss and its gradient do not see it."""
    imputer = _imputer(prediction=prediction)
    params = imputer.init(generator())
    tokens = token_table(AVAILABLE)
    garbage = replace(tokens, values=tokens.values + 1e3 * MISSING.unsqueeze(-1))
    results = []
    for table in (tokens, garbage):
        leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
        loss = _loss(imputer, leaves, table)
        loss.backward()
        results.append([loss, *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_there_is_no_loss_without_two_available_tokens() -> None:
    imputer = _imputer()
    params = imputer.init(generator())
    tokens = token_table([[True, True], [False, False], [False, False]])
    step = impute_step(imputer, params, tokens, impute(imputer, params, tokens, generator()), generator())
    assert "diffusion" not in step.losses


def test_the_denoiser_learns_on_tokens_that_it_does_not_move() -> None:
    """Eq. 6 stops the gradient at the tokens: the entity table and projections learn from links alone."""
    imputer = _imputer()
    params = imputer.init(generator())
    tokens = token_table(AVAILABLE)
    values = tokens.values.clone().requires_grad_()
    table = replace(tokens, values=values)
    made = Imputation(values.detach(), torch.zeros(NUM_TOKENS, 6))
    step = impute_step(imputer, params, table, made, generator())
    assert "diffusion" in step.losses
    assert not step.losses["diffusion"].requires_grad, "no leaf is left once the tokens are detached"
    assert step.values is not None
    assert not step.values.requires_grad


def test_tokens_hidden_for_an_epoch_are_imputed_but_stay_targets() -> None:
    """What an epoch hides is filled like a missing token; structure is never hidden; L_diff still sees all tokens."""
    tokens = token_table(AVAILABLE)
    model = ClientModel(small_config({"diffusion.hide_rate": 0.5}), {"image": 8, "text": 12})
    hidden = hide_tokens(model, 6, generator(3))
    assert hidden is not None
    assert not hidden[0].any()
    assert 0 < int(hidden.sum()) < hidden[1:].numel()
    seen = tokens.without(hidden)
    assert torch.equal(seen.available, AVAILABLE & ~hidden)
    made = impute(model.imputer, model.imputer.init(generator()), seen, generator())
    assert bool((made.values[~seen.available].abs().sum(-1) > 0).all())
    assert hide_tokens(ClientModel(small_config({"model.imputer": "zero"}), {"text": 12}), 6, generator()) is None


def test_min_snr_weights_by_hand() -> None:
    """The weight of an x_0 error is min(SNR, 5), that of an epsilon error min(SNR, 5) / SNR.

    K = 1 has one step with abar = 1e-5, so SNR = 1e-5 / (1 - 1e-5), and the weights are that and 1.
    """
    snr = 1e-5 / (1 - 1e-5)
    tokens = token_table(AVAILABLE)
    for prediction, factor in (("x0", snr), ("epsilon", 1.0)):
        plain = _imputer(steps=1, sampling_steps=1, prediction=prediction, min_snr=None)
        weighted = _imputer(steps=1, sampling_steps=1, prediction=prediction, min_snr=5.0)
        params = plain.init(generator())
        ratio = float(_loss(weighted, params, tokens) / _loss(plain, params, tokens))
        assert math.isclose(ratio, factor, rel_tol=1e-3)


class PerfectDenoiser:
    """Knows x_0; its `step_modulation` gives the noise level of each step, so that it can answer with epsilon too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, imputer: DiffusionImputer, truth: Tensor) -> None:
        self.imputer, self.truth = imputer, truth  # [num_tokens, batch, dim], of the entities that lack a token
        self.inputs: list[tuple[Condition, Tensor]] = []
        monkeypatch.setattr(diffusion, "denoise", self.denoise)
        monkeypatch.setattr(
            diffusion, "step_modulation", lambda params, steps, times: imputer.levels[times].unsqueeze(1)
        )

    def denoise(self, params: Params, condition: Condition, noisy: Tensor, level: Tensor) -> Tensor:
        self.inputs.append((condition, noisy))
        clean = self.truth.repeat(1, noisy.shape[1] // self.truth.shape[1], 1)
        if self.imputer.config.prediction == "x0":
            return clean - condition.start
        return (noisy - level.sqrt() * clean) / (1 - level).sqrt()


@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("steps", "sampling_steps"), [(1, 1), (10, 3), (50, 50)])
def test_a_perfect_denoiser_recovers_x_0(
    prediction: str, schedule: str, steps: int, sampling_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then all draws agree, on the truth, and the uncertainty is zero; at the floor of abar epsilon costs 1e-4."""
    imputer = _imputer(prediction=prediction, schedule=schedule, steps=steps, sampling_steps=sampling_steps)
    truth = torch.randn(NUM_TOKENS, 6, 8, generator=generator(3))
    tokens = replace(token_table(AVAILABLE), values=truth * AVAILABLE.unsqueeze(-1))
    rows = MISSING.any(0)
    PerfectDenoiser(monkeypatch, imputer, truth[:, rows])
    made = impute(imputer, imputer.init(generator()), tokens, generator())
    assert torch.allclose(made.values[MISSING], truth[MISSING], atol=1e-3)
    assert float(made.uncertainty.abs().max()) < 1e-3


def test_available_tokens_are_inserted_clean_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noisy input of an available token is zero at each step, and its clean value is in the condition."""
    imputer = _imputer(num_draws=1)
    params = imputer.init(generator())
    tokens = token_table(AVAILABLE)
    rows = MISSING.any(0)
    perfect = PerfectDenoiser(monkeypatch, imputer, torch.zeros(NUM_TOKENS, int(rows.sum()), 8))
    seen = []
    real = diffusion.encode_condition
    monkeypatch.setattr(diffusion, "encode_condition", lambda p, inputs: seen.append(inputs) or real(p, inputs))
    impute(imputer, params, tokens, generator())
    assert len(perfect.inputs) == imputer.config.sampling_steps
    for _, noisy in perfect.inputs:
        assert torch.equal(noisy[AVAILABLE[:, rows]], torch.zeros_like(noisy[AVAILABLE[:, rows]]))
        assert bool((noisy[MISSING[:, rows]] != 0).any())
    assert torch.equal(seen[0].known, AVAILABLE[:, rows])
    assert torch.equal(seen[0].noised, MISSING[:, rows])
    assert torch.equal(seen[0].clean, tokens.values[:, rows])


def test_several_draws_give_an_uncertainty_where_something_is_missing() -> None:
    tokens = token_table(AVAILABLE)
    one, two = _imputer(num_draws=1), _imputer(num_draws=2)
    params = one.init(generator())
    assert float(impute(one, params, tokens, generator()).uncertainty.abs().max()) == 0.0
    made = impute(two, params, tokens, generator())
    assert bool((made.uncertainty[MISSING] > 0).all())
    assert torch.equal(made.uncertainty[AVAILABLE], torch.zeros(int(AVAILABLE.sum())))
    assert torch.equal(impute(two, params, tokens, generator()).values, made.values), "draws follow the generator"
    assert not torch.equal(impute(two, params, tokens, generator(1)).values, made.values)


def test_imputed_values_are_the_mean_of_the_draws() -> None:
    imputer = _imputer(num_draws=3)
    params = imputer.init(generator())
    tokens = token_table(AVAILABLE[:, MISSING.any(0)])
    draws = imputer._sample(
        params, tokens, tokens.means(), imputer.draw_imputation(tokens.available, generator(4))["noise"]
    )
    made = impute(imputer, params, tokens, generator(4))
    assert torch.allclose(made.values, draws.mean(1))
    deviation = draws.std(1, correction=0).square().mean(-1).sqrt()
    assert torch.allclose(made.uncertainty, deviation * ~tokens.available, atol=1e-6)


def test_prototypes_condition_the_imputation_only_where_they_may() -> None:
    """A prototype of a missing token changes it; beside an available token, or switched off, it is not read."""
    tokens = token_table(AVAILABLE)
    values = torch.randn(tokens.values.shape, generator=generator(8))
    with_missing = TokenTable(tokens.values, AVAILABLE, values * MISSING.unsqueeze(-1), MISSING)
    with_all = TokenTable(tokens.values, AVAILABLE, values, torch.ones_like(AVAILABLE))
    imputer = _imputer()
    params = imputer.init(generator())
    plain, told, told_more = (
        impute(imputer, params, table, generator()).values for table in (tokens, with_missing, with_all)
    )
    assert bool((plain[MISSING] != told[MISSING]).any(-1).all())
    assert torch.equal(told, told_more)
    blind = _imputer(use_prototypes=False)
    assert torch.equal(impute(blind, params, with_all, generator()).values, plain)


def test_an_entity_that_nobody_has_shown_takes_the_mean_if_asked() -> None:
    """`unseen: mean`: entity 3 has no modality; with a prototype of one it is drawn, as all others always are."""
    tokens = token_table(AVAILABLE)
    has = torch.zeros_like(AVAILABLE)
    has[2, 3] = True
    told = TokenTable(tokens.values, AVAILABLE, torch.ones_like(tokens.values) * has.unsqueeze(-1), has)
    drawer, careful, blind = (
        _imputer(link_rows=99, **settings)
        for settings in ({}, {"unseen": "mean"}, {"unseen": "mean", "use_prototypes": False})
    )
    params = drawer.init(generator())
    drawn = impute(drawer, params, tokens, generator())
    for imputer, table in ((careful, tokens), (blind, told)):
        made = impute(imputer, params, table, generator())
        assert torch.equal(made.values[1:, 3], tokens.means()[1:])
        assert not made.uncertainty[:, 3].any()
        others = torch.arange(6) != 3
        assert torch.equal(made.values[:, others], drawn.values[:, others])
        assert torch.equal(made.uncertainty[:, others], drawn.uncertainty[:, others])
        step = impute_step(imputer, params, table, made, generator())
        estimate = impute_step(drawer, params, tokens, made, generator())
        assert step.rows is not None
        assert step.values is not None
        assert estimate.values is not None
        place = step.rows == 3
        assert torch.equal(step.values[1:, place], made.values[1:, 3:4])
        assert torch.equal(step.values[:, ~place], estimate.values[:, ~place])
        assert float(step.losses.get("prototype", torch.zeros(()))) == 0.0, "a prototype that is not used pulls nothing"
    made, drawn = (impute(imputer, params, told, generator()) for imputer in (careful, drawer))
    assert torch.equal(made.values, drawn.values)
    assert torch.equal(made.uncertainty, drawn.uncertainty)


def test_prototypes_pull_the_one_step_estimate() -> None:
    """Eq. 10: the term is there only with a weight and a prototype, and its gradient reaches the denoiser."""
    prototypes = torch.randn(NUM_TOKENS, 6, 8, generator=generator(8))
    tokens = token_table(AVAILABLE)
    told = TokenTable(tokens.values, AVAILABLE, prototypes, MISSING)
    for weight, table, expected in ((0.5, told, True), (0.0, told, False), (0.5, tokens, False)):
        imputer = DiffusionImputer(
            small_config({"distillation.prototype": weight, "diffusion.link_rows": 99}), NUM_TOKENS
        )
        leaves = {name: value.requires_grad_() for name, value in imputer.init(generator()).items()}
        made = impute(imputer, leaves, table, generator())
        step = impute_step(imputer, leaves, table, made, generator())
        assert ("prototype" in step.losses) == expected
        assert step.values is not None
        assert step.values.requires_grad
        if expected:
            assert 0 <= float(step.losses["prototype"].detach()) <= 2 * weight
            assert step.losses["prototype"].requires_grad


def test_hide_learns_more_than_the_mean() -> None:
    """Two tokens of one latent: after a few hundred steps the imputed token is much nearer than the mean token.

    The tokens are functions of each other, so a perfect imputer has no error; the mean has that of unit variance.
    """
    draws = generator(11)
    latent = torch.randn(300, 4, generator=draws)
    values = torch.stack([layer_norm(latent @ torch.randn(4, 8, generator=draws)) for _ in range(2)])
    available = torch.ones(2, 300, dtype=torch.bool)
    available[1, 200:] = False
    tokens = TokenTable(values * available.unsqueeze(-1), available)
    config = small_config(
        {"diffusion.hidden": 48, "diffusion.num_blocks": 2, "diffusion.batch_size": 64, "diffusion.num_draws": 4}
    )
    imputer = DiffusionImputer(config, 2)
    params = imputer.init(draws)
    state: Params = {}
    for _ in range(400):
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        step_draws = imputer.draw_denoising(available, draws)
        loss = imputer.denoising_loss(
            leaves, tokens, tokens.means(), step_modulation(leaves, config.diffusion.steps), step_draws
        )
        loss.backward()
        grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        adam(params, grads, state, 0.003)
    errors = [
        float((impute(maker, params, tokens, generator()).values[1, 200:] - values[1, 200:]).square().mean())
        for maker in (imputer, MeanImputer(config, 2))
    ]
    assert errors[0] < 0.5 * errors[1]
