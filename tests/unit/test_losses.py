"""Every registered loss, and N3, against numbers derived by hand."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from experiments import generator, small_config
from fedsim.config import TrainingConfig
from fedsim.models.losses import LOSSES, decision_entropy, n3_penalty


def _settings(**overrides: Any) -> TrainingConfig:
    return small_config({f"training.{key}": value for key, value in overrides.items()}).training


@pytest.mark.parametrize("name", LOSSES)
@given(
    seed=st.integers(0, 9999), batch=st.integers(1, 6), num=st.integers(2, 9), scale=st.sampled_from([0.0, 1.0, 80.0])
)
def test_every_loss_is_finite_and_wants_the_truth_higher(
    name: str, seed: int, batch: int, num: int, scale: float
) -> None:
    logits = (torch.randn(batch, num, generator=generator(seed)) * scale).requires_grad_()
    target = torch.zeros(batch, dtype=torch.int64)
    weight = torch.rand(batch, generator=generator(seed))
    loss = LOSSES[name](logits, target, weight, _settings())
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.shape == ()
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(grad).all())
    assert bool((grad[:, 0] <= 0).all()), "raising the true score never raises the loss"
    assert bool((grad[:, 1:] >= 0).all())


def test_one_vs_all_by_hand() -> None:
    """Four equal scores: -ln(1/4) = 1.386294. Scores (ln 3, 0), the first is true: -ln(3/4) = 0.287682.

    With label smoothing 0.2 over two: 0.9 * 0.287682 + 0.1 * ln 4 = 0.397543.
    """
    loss = LOSSES["one_vs_all"]
    first = torch.zeros(1, dtype=torch.int64)
    skewed = torch.tensor([[math.log(3), 0.0]])
    one = torch.ones(1)
    assert math.isclose(float(loss(torch.zeros(1, 4), first, one, _settings())), 1.386294, rel_tol=1e-6)
    assert math.isclose(float(loss(skewed, first, one, _settings())), 0.287682, rel_tol=1e-5)
    assert math.isclose(float(loss(skewed, first, one, _settings(label_smoothing=0.2))), 0.397543, rel_tol=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_one_vs_all_equals_torch(label_smoothing: float) -> None:
    logits = torch.randn(6, 9, generator=generator(), dtype=torch.float64) * 50
    logits.requires_grad_()
    target = torch.randint(9, (6,), generator=generator(1))
    weight = torch.full((6,), 1 / 6, dtype=torch.float64)
    loss = LOSSES["one_vs_all"](logits, target, weight, _settings(label_smoothing=label_smoothing))
    expected = functional.cross_entropy(logits, target, label_smoothing=label_smoothing)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weighting", ["belief", "entropy"])
@given(seed=st.integers(0, 9999), label_smoothing=st.sampled_from([0.0, 0.2]), temperature=st.sampled_from([0.0, 1.0]))
def test_padding_changes_nothing(
    name: str, weighting: str, seed: int, label_smoothing: float, temperature: float
) -> None:
    """Two stacked clients, one with fewer queries and candidates, give each client's own loss and gradient."""
    settings = _settings(
        label_smoothing=label_smoothing, adversarial_temperature=temperature, negative_weighting=weighting
    )
    logits = torch.randn(2, 5, 8, generator=generator(seed), dtype=torch.float64)
    target = torch.randint(4, (2, 5), generator=generator(seed)) if name == "one_vs_all" else torch.zeros(2, 5).long()
    weight = torch.rand(2, 5, generator=generator(seed), dtype=torch.float64)
    real = torch.ones(2, 8, dtype=torch.bool)
    logits[1, :, 6:], real[1, 6:], weight[1, 3:] = -1e6, False, 0.0
    logits.requires_grad_()
    loss = LOSSES[name](logits, target, weight, settings, real)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    for client, queries, candidates in ((0, 5, 8), (1, 3, 6)):
        own = logits.detach()[client, :queries, :candidates].requires_grad_()
        alone = LOSSES[name](own, target[client, :queries], weight[client, :queries], settings)
        (own_grad,) = torch.autograd.grad(alone, own)
        torch.testing.assert_close(loss[client], alone)
        torch.testing.assert_close(grad[client, :queries, :candidates], own_grad)
        rest = grad[client].clone()
        rest[:queries, :candidates] = 0
        assert bool((rest == 0).all()), "padding gets no gradient"


def test_sampled_softmax_is_cross_entropy_over_its_candidates() -> None:
    """Scores (ln 3, 0, 0), the answer's first: -ln(3/5) = 0.510826. Left out, the third counts nothing: -ln(3/4)."""
    loss, answer = LOSSES["sampled_softmax"], torch.zeros(1, dtype=torch.int64)
    for scores, expected in (([math.log(3), 0.0, 0.0], 0.510826), ([math.log(3), 0.0, -1e6], 0.287682)):
        value = float(loss(torch.tensor([scores]), answer, torch.ones(1), _settings()))
        assert math.isclose(value, expected, rel_tol=1e-5)


def test_what_sampled_softmax_leaves_out_has_no_share_of_the_smoothing() -> None:
    """With a candidate left out, loss and gradient are those of the candidates that are left."""
    loss, answer, settings = (
        LOSSES["sampled_softmax"],
        torch.zeros(1, dtype=torch.int64),
        _settings(label_smoothing=0.1),
    )
    whole = torch.tensor([[1.0, 0.0, -1e6, 0.5]], requires_grad=True)
    left = torch.tensor([[1.0, 0.0, 0.5]], requires_grad=True)
    value, expected = (loss(logits, answer, torch.ones(1), settings) for logits in (whole, left))
    torch.testing.assert_close(value, expected)
    (found,), (wanted,) = torch.autograd.grad(value, whole), torch.autograd.grad(expected, left)
    torch.testing.assert_close(found[:, [0, 1, 3]], wanted)
    assert float(found[0, 2]) == 0


def test_self_adversarial_by_hand() -> None:
    """Half the sum of the positive's and the weighted negatives' terms, with gamma = 1.

    The positive has -1: -ln sigmoid(0) = 0.693147. The negatives 0 and ln 3 weigh 1/4 and 3/4 at temperature 1:
    softplus(1) / 4 + 3 softplus(1 + ln 3) / 4 = 0.328315 + 1.660712 = 1.989028. Half of both: 1.341088.

    At temperature 0 both weigh 1/2: (1.313262 + 2.214283) / 2 = 1.763773, and the loss is 1.228460.
    """
    logits = torch.tensor([[-1.0, 0.0, math.log(3)]])
    target = torch.zeros(1, dtype=torch.int64)
    for temperature, expected in ((1.0, 1.341088), (0.0, 1.228460)):
        settings = _settings(margin=1.0, adversarial_temperature=temperature)
        assert math.isclose(
            float(LOSSES["self_adversarial"](logits, target, torch.ones(1), settings)), expected, rel_tol=1e-5
        )


def test_entropy_weighting_by_hand() -> None:
    """Gamma = 1; the negatives -1 and ln 3 - 1 are taken for true with probability 1/2 and 3/4.

    Entropies ln 2 = 0.693147 and ln 4 - 3/4 ln 3 = 0.562335; at temperature 10 the weights are
    softmax(6.931472, 5.623351) = 0.787194 and 0.212806. Terms: softplus(0) = 0.693147, softplus(ln 3) = 1.386294;
    0.787194 * 0.693147 + 0.212806 * 1.386294 = 0.840653. The positive -1 has 0.693147. Half of both: 0.766900.
    """
    settings = _settings(margin=1.0, adversarial_temperature=10.0, negative_weighting="entropy")
    logits = torch.tensor([[-1.0, -1.0, math.log(3) - 1]])
    loss = LOSSES["self_adversarial"](logits, torch.zeros(1, dtype=torch.int64), torch.ones(1), settings)
    assert math.isclose(float(loss), 0.766900, rel_tol=1e-5)


def test_entropy_weights_carry_no_gradient() -> None:
    """The gradient of a negative is its share / 2 * sigmoid(gamma + s), gamma = 1 and s = 0 for all three."""
    settings = _settings(margin=1.0, adversarial_temperature=3.0, negative_weighting="entropy")
    logits = torch.zeros(1, 4, requires_grad=True)
    loss = LOSSES["self_adversarial"](logits, torch.zeros(1, dtype=torch.int64), torch.ones(1), settings)
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(grad[0, 1:], torch.full((3,), 1 / (1 + math.exp(-1)) / 6))


def test_the_unsure_negative_weighs_most_and_padding_nothing() -> None:
    """Of -30, -10 and 10 with gamma = 10 the model is unsure of -10 alone; a padded one would weigh like the sure."""
    settings = _settings(margin=10.0, adversarial_temperature=20.0, negative_weighting="entropy")
    logits = torch.tensor([[0.0, -30.0, -10.0, 10.0, -1e6]], requires_grad=True)
    real = torch.tensor([True, True, True, True, False])
    loss = LOSSES["self_adversarial"](logits, torch.zeros(1, dtype=torch.int64), torch.ones(1), settings, real)
    (grad,) = torch.autograd.grad(loss, logits)
    shares = 2 * grad[0, 1:] / torch.sigmoid(10 + logits.detach()[0, 1:]).clamp(min=1e-30)
    assert int(shares.argmax()) == 1
    assert float(shares[1]) > 0.99
    assert float(grad[0, 4]) == 0.0


@given(logit=st.floats(-1e6, 1e6))
def test_entropy_of_a_decision(logit: float) -> None:
    """Between 0 and ln 2, and the same for yes and no."""
    entropy = decision_entropy(torch.tensor([logit, -logit]))
    assert 0 <= float(entropy[0]) <= math.log(2) + 1e-6
    assert float(entropy[0]) == float(entropy[1])
    assert math.isclose(float(decision_entropy(torch.tensor(0.0))), math.log(2), rel_tol=1e-6)


def test_n3_by_hand() -> None:
    """(3, 4) is one complex number of size 5: 125; as two reals it is 27 + 64 = 91. Three such vectors: 3 times."""
    vector = torch.tensor([[3.0, 4.0]])
    assert math.isclose(float(n3_penalty(vector, vector, vector, complex_pairs=True)), 375.0, rel_tol=1e-6)
    assert math.isclose(float(n3_penalty(vector, vector, vector, complex_pairs=False)), 273.0, rel_tol=1e-6)


def test_n3_has_a_finite_gradient_at_zero() -> None:
    zero = torch.zeros(1, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(n3_penalty(zero, zero, zero, complex_pairs=True), zero)
    assert bool(torch.isfinite(grad).all())
