"""Every registered fusion (method.md eq. 2)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments import generator, token_table
from fedsim.models.fusion import FUSIONS, GateFusion


@pytest.mark.parametrize("name", FUSIONS)
@given(seed=st.integers(0, 9999), num_tokens=st.integers(1, 4), num_entities=st.integers(1, 9))
def test_every_fusion_gives_finite_embeddings_and_gradients(
    name: str, seed: int, num_tokens: int, num_entities: int
) -> None:
    fusion = FUSIONS[name]
    available = torch.rand(num_tokens, num_entities, generator=generator(seed)) < 0.5
    tokens = token_table(torch.ones_like(available), seed=seed).values.requires_grad_()
    params = fusion.init(num_tokens, 8, 4, generator(seed))
    leaves = {key: value.requires_grad_() for key, value in params.items()}
    assert all(key.startswith("fusion.") for key in leaves)
    uncertainty = torch.rand(available.shape, generator=generator(seed)) * ~available
    fused = fusion.fuse(leaves, tokens, available.float(), uncertainty)
    assert fused.shape == (fusion.num_parts(num_tokens), num_entities, 8)
    grads = torch.autograd.grad(fused.square().sum(), [tokens, *leaves.values()])
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)


def test_the_gate_starts_with_the_mean_by_hand() -> None:
    """All gates are 1/2 at the start: of the tokens 1 and 3 it makes 2."""
    gate = GateFusion()
    params = gate.init(2, 4, 3, generator())
    tokens = torch.stack([torch.full((5, 4), 1.0), torch.full((5, 4), 3.0)])
    fused = gate.fuse(params, tokens, torch.ones(2, 5), torch.zeros(2, 5))
    assert torch.allclose(fused, torch.full((1, 5, 4), 2.0))


def test_the_gate_by_hand() -> None:
    """Bias_out (ln 3, 0) gives gates (3/4, 1/4): 0.75 * 1 + 0.25 * 5 = 2."""
    gate = GateFusion()
    params = gate.init(2, 1, 3, generator())
    params["fusion.bias_out"][0] = torch.log(torch.tensor(3.0))
    tokens = torch.tensor([[[1.0]], [[5.0]]])
    assert torch.allclose(gate.fuse(params, tokens, torch.ones(2, 1), torch.zeros(2, 1)), torch.tensor([[[2.0]]]))


def test_the_gate_can_trust_an_imputed_token_less() -> None:
    """With weights on them, availability and uncertainty both move the result."""
    gate = GateFusion()
    params = gate.init(2, 4, 3, generator())
    params["fusion.weight_out"] = torch.randn(2, 3, 1, generator=generator(1))
    tokens = torch.randn(2, 1, 4, generator=generator(2))
    flags, sure = torch.ones(2, 1), torch.zeros(2, 1)
    missing, unsure = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [0.7]])
    known = gate.fuse(params, tokens, flags, sure)
    imputed = gate.fuse(params, tokens, missing, sure)
    assert not torch.allclose(known, imputed)
    assert not torch.allclose(imputed, gate.fuse(params, tokens, missing, unsure))


def test_split_keeps_the_tokens_and_none_the_structure() -> None:
    tokens = torch.randn(3, 5, 4, generator=generator())
    flags = torch.ones(3, 5)
    assert torch.equal(FUSIONS["split"].fuse({}, tokens, flags, flags), tokens)
    assert torch.equal(FUSIONS["none"].fuse({}, tokens, flags, flags), tokens[:1])
