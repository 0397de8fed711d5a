"""The imputers that learn nothing by gradient: nearest neighbours and ridge regression."""

from typing import Any

import pytest
import torch
from torch import Tensor

from experiments import generator, impute, small_config, token_table
from fedsim.errors import ConfigError
from fedsim.models.imputers import TokenTable, nearest
from fedsim.models.imputers.nearest import NearestImputer
from fedsim.models.imputers.ridge import RidgeImputer
from fedsim.models.parameters import layer_norm


def _nearest(num_tokens: int = 2, **overrides: Any) -> NearestImputer:
    return NearestImputer(small_config({f"imputer.{k}": v for k, v in overrides.items()}), num_tokens)


def _ridge(num_tokens: int = 2, **overrides: Any) -> RidgeImputer:
    return RidgeImputer(small_config({f"imputer.{k}": v for k, v in overrides.items()}), num_tokens)


@pytest.mark.parametrize(
    ("num_neighbours", "expected"), [(1, [2.0, 4.0]), (2, [3.0, 3.0]), (3, [4.0, 2.0]), (9, [4.0, 2.0])]
)
def test_the_nearest_by_hand(num_neighbours: int, expected: list[float]) -> None:
    """The first entity points to (1, 0). Those with a text have cosines 0.8, 0 and -1 with it; (1, 0.6) has no text.

    Texts, nearest first: (2, 4), (4, 2), (6, 0). Means of the first 1, 2, 3: (2, 4), (3, 3), (4, 2); a fourth does not
    exist.
    """
    structure = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [8.0, 6.0], [0.0, 1.0], [1.0, 0.6]])
    text = torch.tensor([[0.0, 0.0], [6.0, 0.0], [2.0, 4.0], [4.0, 2.0], [0.0, 0.0]])
    available = torch.tensor([[True] * 5, [False, True, True, True, False]])
    made = impute(
        _nearest(num_neighbours=num_neighbours), {}, TokenTable(torch.stack([structure, text]), available), generator()
    )
    assert made.values[1, 0].tolist() == pytest.approx(expected)
    assert float(made.uncertainty.max()) == 0.0


def test_neighbours_are_found_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 missing entities give what one block gives; no block is larger."""
    available = torch.rand(3, 30, generator=generator()) < 0.4
    available[0] = True
    tokens = token_table(available)
    whole = impute(_nearest(3), {}, tokens, generator())
    monkeypatch.setattr(nearest, "BLOCK", 4)
    sizes: list[int] = []

    class Spy(NearestImputer):
        def _mean_of_nearest(self, queries: Tensor, keys: Tensor, tokens: Tensor, there: Tensor) -> Tensor:
            sizes.append(len(queries))
            return super()._mean_of_nearest(queries, keys, tokens, there)

    blocks = impute(Spy(small_config(), 3), {}, tokens, generator())
    assert torch.allclose(blocks.values, whole.values, atol=1e-6)
    assert max(sizes) == 4
    assert sum(sizes) == int((~available).sum())


def test_the_ridge_imputer_by_hand() -> None:
    """Structure (-1), (0), (1), (2) and texts (-2), (0), (2): slope 4 / (2 + 2) = 1 with lambda 2, so the last is 2."""
    values = torch.tensor([[[-1.0], [0.0], [1.0], [2.0]], [[-2.0], [0.0], [2.0], [0.0]]])
    tokens = TokenTable(values, torch.tensor([[True] * 4, [True, True, True, False]]))
    made = impute(_ridge(ridge_strength=2.0), {}, tokens, generator())
    assert made.values[1, 3].tolist() == [pytest.approx(2.0)]


def test_ridge_recovers_what_is_linear_in_several_tokens() -> None:
    """The third token is a linear function of the first two; where the second is missing, less is known."""
    draws = generator(3)
    first, second = torch.randn(2, 400, 8, generator=draws)
    third = layer_norm(first) @ torch.randn(8, 8, generator=draws) + second @ torch.randn(8, 8, generator=draws)
    values = torch.stack([layer_norm(first), second, third])
    available = torch.ones(3, 400, dtype=torch.bool)
    available[2, :100] = False
    available[1, :50] = False
    tokens = TokenTable(values * available.unsqueeze(-1), available)
    made = impute(_ridge(3, ridge_strength=0.01), {}, tokens, generator()).values[2]
    error = (made - third).square().mean(-1)
    assert float(error[50:100].max()) < 1e-3
    assert float(error[:50].mean()) > 1.0


@pytest.mark.parametrize("maker", [_nearest, _ridge])
def test_a_client_without_the_modality_gets_zeros(maker: Any) -> None:
    made = impute(maker(), {}, token_table([[True] * 5, [False] * 5]), generator())
    assert float(made.values.abs().max()) == 0.0


@pytest.mark.parametrize("maker", [_nearest, _ridge])
def test_when_to_impute(maker: Any) -> None:
    assert not maker().each_epoch
    assert maker(impute_each="epoch").each_epoch
    assert maker(hide_rate=0.3).hide_rate == 0.3


@pytest.mark.parametrize(("field", "value"), [("ridge_strength", 0), ("num_neighbours", 0), ("hide_rate", 1.0)])
def test_a_setting_that_cannot_be_is_named(field: str, value: float) -> None:
    """Without a penalty there are clients whose regression has no solution."""
    with pytest.raises(ConfigError, match=rf"config field 'imputer\.{field}' = {value}: .*should be"):
        small_config({f"imputer.{field}": value})
