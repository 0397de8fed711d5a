"""HidE's denoiser: what it may look at, and what it must not."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from experiments import generator
from fedsim.models.imputers.denoiser import (
    DenoiserInput,
    denoise,
    encode_condition,
    flatten_tokens,
    init_denoiser,
    step_modulation,
)
from fedsim.models.parameters import Params

NUM_TOKENS, BATCH, DIM, STEPS = 3, 5, 4, 10


@pytest.fixture
def params() -> Params:
    return init_denoiser(NUM_TOKENS, DIM, 16, 2, generator())


@pytest.fixture
def inputs() -> DenoiserInput:
    """Token 0 is known, token 1 noised, token 2 hidden; token 1 of the even entities has a prototype."""
    state = torch.zeros(NUM_TOKENS, BATCH, dtype=torch.bool)
    known, noised, has_prototype = state.clone(), state.clone(), state.clone()
    known[0], noised[1], has_prototype[1, ::2] = True, True, True
    values = torch.randn(2, NUM_TOKENS, BATCH, DIM, generator=generator(1))
    means = torch.randn(NUM_TOKENS, DIM, generator=generator(3))
    return DenoiserInput(values[0], known, noised, means, values[1], has_prototype)


def _run(params: Params, inputs: DenoiserInput, step: int = 3, seed: int = 2) -> Tensor:
    noisy = torch.randn(inputs.clean.shape, generator=generator(seed)) * inputs.noised.unsqueeze(-1)
    modulation = step_modulation(params, STEPS)[step].unsqueeze(0)
    return denoise(params, encode_condition(params, inputs), noisy, modulation)


def test_shapes(params: Params, inputs: DenoiserInput) -> None:
    assert step_modulation(params, STEPS).shape == (STEPS + 1, 2 * 3 * 16)
    out = _run(params, inputs)
    assert out.shape == (NUM_TOKENS, BATCH, DIM)
    assert bool(torch.isfinite(out).all())


def test_tokens_lie_side_by_side() -> None:
    """Two tokens (1, 2) and (3, 4) of one entity become (1, 2, 3, 4)."""
    tokens = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    assert torch.equal(flatten_tokens(tokens), torch.tensor([[1.0, 2.0, 3.0, 4.0]]))


def test_only_known_tokens_are_read(params: Params, inputs: DenoiserInput) -> None:
    """The clean value of a noised or hidden token is the answer: nothing may depend on it."""
    other = inputs.clean.clone()
    other[1:] += 100.0
    assert torch.equal(_run(params, replace(inputs, clean=other)), _run(params, inputs))
    other[0] += 1.0
    assert not torch.equal(_run(params, replace(inputs, clean=other)), _run(params, inputs))


def test_only_flagged_prototypes_are_read(params: Params, inputs: DenoiserInput) -> None:
    other = inputs.prototypes + 100.0 * (~inputs.has_prototype).unsqueeze(-1)
    assert torch.equal(_run(params, replace(inputs, prototypes=other)), _run(params, inputs))
    changed = _run(params, replace(inputs, prototypes=inputs.prototypes + 1.0)) != _run(params, inputs)
    assert changed.any(-1).any(0).tolist() == [True, False, True, False, True]


def test_a_prediction_starts_from_the_prototype_or_the_mean(params: Params, inputs: DenoiserInput) -> None:
    """Token 1 has prototypes at even entities; token 0 is known, and nothing of it is predicted."""
    start = encode_condition(params, inputs).start
    assert inputs.prototypes is not None
    assert torch.equal(start[0], torch.zeros(BATCH, DIM))
    assert torch.equal(start[1, ::2], inputs.prototypes[1, ::2])
    assert torch.equal(start[1, 1::2], inputs.means[1].expand(2, DIM))
    assert torch.equal(start[2], inputs.means[2].expand(BATCH, DIM))
    alone = encode_condition(params, replace(inputs, prototypes=None, has_prototype=None)).start
    assert torch.equal(alone[1:], inputs.means[1:].unsqueeze(1).expand(2, BATCH, DIM))


def test_the_state_of_a_token_and_the_step_matter(params: Params, inputs: DenoiserInput) -> None:
    base = _run(params, inputs)
    noised = inputs.noised.clone()
    noised[2] = True
    noisy = torch.randn(inputs.clean.shape, generator=generator(2)) * inputs.noised.unsqueeze(-1)
    modulation = step_modulation(params, STEPS)[3].unsqueeze(0)
    told = denoise(params, encode_condition(params, replace(inputs, noised=noised)), noisy, modulation)
    assert not torch.equal(told, base), "hidden and noised differ even where the noisy value is zero"
    assert not torch.equal(_run(params, inputs, step=4), base)
    assert not torch.equal(_run(params, inputs, seed=9), base)


def test_entities_do_not_see_each_other(params: Params, inputs: DenoiserInput) -> None:
    """Each entity's prediction is its own, so any batching gives the same."""
    order = torch.tensor([3, 1, 4, 0, 2])
    noisy = torch.randn(inputs.clean.shape, generator=generator(2)) * inputs.noised.unsqueeze(-1)
    modulation = step_modulation(params, STEPS)[torch.tensor([1, 2, 3, 4, 5])]
    whole = denoise(params, encode_condition(params, inputs), noisy, modulation)
    turned = DenoiserInput(
        inputs.clean[:, order],
        inputs.known[:, order],
        inputs.noised[:, order],
        inputs.means,
        inputs.prototypes[:, order],
        inputs.has_prototype[:, order],
    )
    parts = denoise(params, encode_condition(params, turned), noisy[:, order], modulation[order])
    assert torch.allclose(parts, whole[:, order], atol=1e-6)


def test_every_parameter_gets_a_gradient(params: Params, inputs: DenoiserInput) -> None:
    leaves = {name: value.requires_grad_() for name, value in params.items()}
    _run(leaves, inputs).square().sum().backward()
    missing = [name for name, leaf in leaves.items() if leaf.grad is None or not bool(torch.isfinite(leaf.grad).all())]
    assert missing == []
