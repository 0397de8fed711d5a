"""The imputers that learn by gradient beside HidE: mlp, vae and gan."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments import generator, impute, impute_step, small_config, token_table
from fedsim.models.imputers import IMPUTERS, TokenTable
from fedsim.models.imputers.conditions import draw_link_rows, mean_of_targets
from fedsim.models.imputers.gan import GANImputer
from fedsim.models.imputers.learned import LearnedImputer
from fedsim.models.imputers.mean import MeanImputer
from fedsim.models.imputers.networks import known_input
from fedsim.models.imputers.vae import gaussian_divergence
from fedsim.models.optimizers import adam
from fedsim.models.parameters import Params, layer_norm

LEARNED = ("mlp", "vae", "gan")
AVAILABLE = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1]]).bool()


def _imputer(name: str, num_tokens: int = 3, **overrides: Any) -> LearnedImputer:
    sizes = {"hidden": 16, "latent": 4, "batch_size": 16, "link_rows": 4}
    config = small_config({f"imputer.{k}": v for k, v in (sizes | overrides).items()})
    imputer = IMPUTERS[name](config, num_tokens)
    assert isinstance(imputer, LearnedImputer)
    return imputer


def _leaves(imputer: LearnedImputer) -> Params:
    return {name: value.requires_grad_() for name, value in imputer.init(generator()).items()}


def _losses(imputer: LearnedImputer, params: Params, tokens: TokenTable, seed: int = 5) -> dict[str, Tensor]:
    draws = imputer.draw_step(tokens.available, tokens.available, generator(seed))
    return imputer.losses(params, tokens.take(draws["rows"]).values, draws)


def _reached(term: Tensor, params: Params) -> set[str]:
    """Name the parameters that a term moves."""
    grads = torch.autograd.grad(term, list(params.values()), allow_unused=True, retain_graph=True)
    return {name for name, grad in zip(params, grads, strict=True) if grad is not None and float(grad.abs().max()) > 0}


@pytest.mark.parametrize("name", LEARNED)
def test_they_learn_more_than_the_mean(name: str) -> None:
    """Two tokens of one latent, each a function of the other: the imputed token comes much nearer than the mean."""
    draws = generator(11)
    latent = torch.randn(300, 4, generator=draws)
    values = torch.stack([layer_norm(latent @ torch.randn(4, 8, generator=draws)) for _ in range(2)])
    available = torch.ones(2, 300, dtype=torch.bool)
    available[1, 200:] = False
    tokens = TokenTable(values * available.unsqueeze(-1), available)
    imputer = _imputer(name, 2, hidden=48, latent=8, batch_size=64, kl_weight=0.01)
    params, state = imputer.init(draws), Params()
    for _ in range(150):
        leaves = {key: value.detach().requires_grad_() for key, value in params.items()}
        step = imputer.draw_step(available, available, draws)
        loss = torch.stack(list(imputer.losses(leaves, tokens.take(step["rows"]).values, step).values())).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        adam(params, dict(zip(leaves, grads, strict=True)), state, 0.01)
    errors = [
        float((impute(maker, params, tokens, generator()).values[1, 200:] - values[1, 200:]).square().mean())
        for maker in (imputer, MeanImputer(small_config(), 2))
    ]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("name", LEARNED)
def test_a_missing_token_is_never_a_target(name: str) -> None:
    """Whatever stands in the place of a missing token, no loss term sees it; and the tokens get no gradient."""
    imputer = _imputer(name)
    params = _leaves(imputer)
    tokens = token_table(AVAILABLE)
    garbage = TokenTable((tokens.values + 1e3 * ~AVAILABLE.unsqueeze(-1)).requires_grad_(), AVAILABLE)
    clean = _losses(imputer, params, tokens)
    step = impute_step(imputer, params, garbage, impute(imputer, params, garbage, generator(1)), generator(5))
    assert step.losses.keys() == clean.keys()
    for key, value in clean.items():
        assert step.losses[key].item() == pytest.approx(value.item(), abs=1e-6)
    total = torch.stack(list(step.losses.values())).sum() + torch.as_tensor(step.values).square().sum()
    assert torch.autograd.grad(total, garbage.values, allow_unused=True) == (None,)


@pytest.mark.parametrize("name", LEARNED)
def test_links_reach_the_imputer_by_the_estimates(name: str) -> None:
    imputer = _imputer(name)
    params = _leaves(imputer)
    tokens = token_table(AVAILABLE)
    step = impute_step(imputer, params, tokens, impute(imputer, params, tokens, generator(1)), generator(5))
    assert step.values is not None
    assert step.rows is not None
    assert len(step.rows) == 4
    reached = _reached((step.values * torch.randn(step.values.shape, generator=generator())).sum(), params)
    unused = {key for key in params if "discriminator" in key or "contrast" in key}
    assert reached == params.keys() - unused
    silent = _imputer(name, link_rows=0)
    assert impute_step(silent, params, tokens, impute(silent, params, tokens, generator()), generator()).rows is None


@pytest.mark.parametrize("name", LEARNED)
def test_the_deviation_of_the_draws_is_the_uncertainty(name: str) -> None:
    """By hand, from the draws one by one; a regression has one answer and no deviation."""
    imputer = _imputer(name, num_draws=3)
    params = imputer.init(generator())
    tokens = token_table(AVAILABLE)
    made = impute(imputer, params, tokens, generator(4))
    missing = ~AVAILABLE
    draws = imputer.draw_imputation(AVAILABLE, generator(4))
    batch = tokens.take(draws["rows"])
    samples = torch.stack([imputer.estimate(params, batch.values, batch.available, noise) for noise in draws["noise"]])
    assert len(samples) == (1 if name == "mlp" else 3)
    assert torch.allclose(made.values[:, draws["rows"]], samples.mean(0))
    deviation = samples.var(0, correction=0).mean(-1).sqrt()
    assert torch.allclose(made.uncertainty[:, draws["rows"]], deviation * ~batch.available, atol=1e-6)
    assert bool((made.uncertainty[missing] > 0).all()) == (name != "mlp")


@pytest.mark.parametrize("name", LEARNED)
def test_what_is_missing_is_told_from_what_is_zero(name: str) -> None:
    """A known token of zeros is not a missing one: the flags differ."""
    imputer = _imputer(name)
    params = imputer.init(generator())
    values, noise = torch.zeros(3, 1, 8), torch.zeros(1, imputer.noise_dim)
    params = {key: value + 0.1 if key.endswith("bias") else value for key, value in params.items()}
    known = torch.tensor([[True], [True], [False]])
    alone = torch.tensor([[True], [False], [False]])
    one, other = (imputer.estimate(params, values, mask, noise) for mask in (known, alone))
    assert not torch.allclose(one, other)


def test_the_divergence_by_hand() -> None:
    """KL(N(1, 1) || N(0, 1)) = 1/2 per dimension; KL(N(0, 4) || N(0, 1)) = (4 - log 4 - 1) / 2 = 0.80685."""
    found = gaussian_divergence(
        torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.log(torch.tensor([[1.0, 1.0], [4.0, 1.0]]))
    )
    assert found.tolist() == pytest.approx([1.0, 0.80685], abs=1e-5)


def test_the_terms_of_the_vae() -> None:
    """Beta weighs the divergence, and with beta 0 the latent is left alone."""
    tokens = token_table(AVAILABLE)
    plain, double = (_imputer("vae", kl_weight=weight) for weight in (0.5, 1.0))
    params = plain.init(generator())
    one, two = _losses(plain, params, tokens), _losses(double, params, tokens)
    assert float(two["divergence"]) == pytest.approx(2 * float(one["divergence"]))
    assert float(two["recovery"]) == float(one["recovery"])
    assert float(_losses(_imputer("vae", kl_weight=0.0), params, tokens)["divergence"]) == 0.0


def test_the_game_by_hand() -> None:
    """A discriminator of zeros says 1/2 to all: it loses 2 log 2, the generator weight * log 2.

    The projections of zeros find each of 4 entities with probability 1/4: the contrast is log 4, twice (true and
    generated); with the same entity drawn 4 times there is no wrong answer, and it is 0.
    """
    imputer = _imputer("gan", 2, adversarial_weight=0.5, contrastive_weight=1.0)
    params = imputer.init(generator())
    for key, value in params.items():
        if "generator" not in key:
            value.zero_()
    draws = {
        "rows": torch.arange(4),
        "known": torch.tensor([[True] * 4, [False] * 4]),
        "target": torch.tensor([[False] * 4, [True] * 4]),
        "noise": torch.zeros(4, imputer.noise_dim),
    }
    values = torch.randn(2, 4, 8, generator=generator())
    found = imputer.losses(params, values, draws)
    assert float(found["discriminator"]) == pytest.approx(2 * math.log(2))
    assert float(found["adversarial"]) == pytest.approx(0.5 * math.log(2))
    assert float(found["contrast"]) == pytest.approx(2 * math.log(4), rel=1e-5)
    same = imputer.losses(params, values, draws | {"rows": torch.zeros(4, dtype=torch.int64)})
    assert float(same["contrast"]) == pytest.approx(0.0, abs=1e-6)


def test_each_player_moves_its_own_parameters() -> None:
    imputer = _imputer("gan")
    params = _leaves(imputer)
    found = _losses(imputer, params, token_table([[True] * 9] * 3))
    players = {"recovery": {"generator"}, "discriminator": {"discriminator"}, "adversarial": {"generator"}}
    players["contrast"] = {"generator", "contrast_structure", "contrast_1", "contrast_2"}
    for term, names in players.items():
        assert {name.split(".")[1] for name in _reached(found[term], params)} == names, term


def test_a_structure_token_is_no_part_of_the_game() -> None:
    """Where structure alone is the target, nothing is generated for the discriminator."""
    imputer = _imputer("gan", 2)
    draws = {
        "rows": torch.arange(3),
        "known": torch.tensor([[False] * 3, [True] * 3]),
        "target": torch.tensor([[True] * 3, [False] * 3]),
        "noise": torch.zeros(3, imputer.noise_dim),
    }
    found = imputer.losses(imputer.init(generator()), torch.randn(2, 3, 8, generator=generator()), draws)
    assert float(found["recovery"]) > 0
    assert [float(found[term]) for term in ("discriminator", "adversarial", "contrast")] == [0.0, 0.0, 0.0]


def test_generated_tokens_are_standardised() -> None:
    imputer = GANImputer(small_config(), 3)
    tokens = token_table(AVAILABLE)
    made = imputer.estimate(
        imputer.init(generator()), tokens.values, AVAILABLE, torch.randn(6, 64, generator=generator())
    )
    assert torch.allclose(made.mean(-1), torch.zeros(3, 6), atol=1e-5)
    assert torch.allclose(made.var(-1, correction=0), torch.ones(3, 6), atol=0.05)


def test_the_input_is_known_tokens_and_flags() -> None:
    values = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    known = torch.tensor([[True], [False]])
    assert known_input(values, known).tolist() == [[1, 2, 0, 0, 1, 0]]


def test_the_mean_of_targets_by_hand() -> None:
    """Of errors 1, 2, 3, 4 the first and the last are targets: 2.5; without targets it is 0."""
    errors = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert float(mean_of_targets(errors, torch.eye(2).bool())) == 2.5
    assert float(mean_of_targets(errors, torch.zeros(2, 2).bool())) == 0.0


@pytest.mark.parametrize(("num_rows", "expected"), [(0, 0), (2, 2), (9, 5)])
def test_link_rows_lack_a_token_and_differ(num_rows: int, expected: int) -> None:
    rows = draw_link_rows(AVAILABLE, num_rows, generator())
    assert len(rows) == expected == len(rows.unique())
    assert not bool(AVAILABLE.all(0)[rows].any())
