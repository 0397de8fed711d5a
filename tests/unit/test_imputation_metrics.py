"""Imputation quality on the features kept aside (method.md section 7)."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from builders import tiny_graph
from experiments import generator, linear_graph, small_client, small_runtime
from fedsim.evaluation import imputation
from fedsim.evaluation.imputation import measure_imputation, token_quality
from fedsim.federated.client import Client


def test_quality_by_hand() -> None:
    """Of twelve unit vectors two are imputed: one is its true self (cosine 1, rank 1), one its opposite (cosine -1).

    The opposite has the 10 orthogonal ones above itself and one more, so rank 12, no hit: mean cosine 0, Hits@10 0.5.
    """
    true = torch.eye(12)
    hidden = torch.zeros(12, dtype=torch.bool)
    hidden[[3, 7]] = True
    estimate = torch.stack([2 * true[3], -true[7]])
    assert token_quality(estimate, true, hidden) == pytest.approx((0.0, 0.5))


def test_a_constant_estimate_shares_its_places() -> None:
    """Zeros tie with everybody: rank (12 + 1) / 2 = 6.5 of 12 is a hit, (30 + 1) / 2 = 15.5 of 30 is none."""
    for num, hits in ((12, 1.0), (30, 0.0)):
        true = torch.eye(num)
        hidden = torch.arange(num) == 0
        assert token_quality(torch.zeros(1, num), true, hidden) == (0.0, hits)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    true, hidden = torch.randn(40, 6, generator=generator()), torch.arange(40) % 2 == 0
    estimate = true[hidden] + torch.randn(20, 6, generator=generator(1))
    whole = token_quality(estimate, true, hidden)
    monkeypatch.setattr(imputation, "BLOCK", 3)
    assert token_quality(estimate, true, hidden) == pytest.approx(whole)
    assert 0 < whole[1] < 1


def _trained(**overrides: object) -> Client:
    runtime = small_runtime({"data.num_clients": 1, "data.missing_rate": 0.3, **overrides}, linear_graph())
    runtime.train(1, [0])
    return runtime.clients[0]


def test_every_modality_and_imputer_is_measured() -> None:
    client = _trained()
    found = measure_imputation(client, 1)
    expected = {
        f"{modality}/{imputer}/{metric}"
        for modality in ("text", "image")
        for imputer in ("diffusion", "mean", "ridge", "mlp")
        for metric in ("cosine", "hits_at_10")
    }
    assert set(found) == expected
    assert all(-1 <= value <= 1 for value in found.values())


def test_ridge_sees_what_is_linear_and_the_mean_does_not() -> None:
    """Image features are a linear function of the text's here, so regression must beat the mean."""
    found = measure_imputation(_trained(**{"data.missing_rate": {"image": 0.3}}), 1)
    assert set(found) == {
        f"image/{imputer}/{metric}"
        for imputer in ("diffusion", "mean", "ridge", "mlp")
        for metric in ("cosine", "hits_at_10")
    }
    assert found["image/ridge/cosine"] > found["image/mean/cosine"] + 0.1


def test_an_imputer_stands_beside_the_fit_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ridge imputer's row is its own; with the same penalty it is what the measure fits."""
    monkeypatch.setattr(imputation, "RIDGE_ALPHAS", (10.0,))
    found = measure_imputation(_trained(**{"model.imputer": "ridge", "imputer.ridge_strength": 10.0}), 1)
    for metric in ("cosine", "hits_at_10"):
        assert found[f"text/ridge/{metric}"] == pytest.approx(found[f"text/ridge_fitted/{metric}"], abs=1e-4)
    other = measure_imputation(_trained(**{"model.imputer": "ridge", "imputer.ridge_strength": 1e4}), 1)
    assert abs(other["text/ridge/cosine"] - other["text/ridge_fitted/cosine"]) > 0.01
    assert {"text/mlp/cosine", "text/mlp_fitted/cosine"} <= measure_imputation(
        _trained(**{"model.imputer": "mlp"}), 1
    ).keys()


@pytest.mark.parametrize("overrides", [{"data.missing_rate": 0.0}, {"data.missing_rate": 1.0}, {"data.modalities": []}])
def test_nothing_hidden_or_nothing_visible_is_not_measured(overrides: dict[str, object]) -> None:
    client = small_client({"federation.strategy": "local", **overrides})
    assert measure_imputation(client, 1) == {}


@pytest.mark.parametrize("num_visible", [1, 2, 6])
def test_few_visible_rows_are_enough(num_visible: int) -> None:
    client = small_client({"federation.strategy": "local", "data.missing_rate": 0.0}, tiny_graph())
    item = client.data.features["text"]
    visible = np.zeros(len(item.rows), dtype=bool)
    visible[:num_visible] = True
    client.data.features["text"] = replace(item, visible=visible)
    found = measure_imputation(client, 1)
    assert set(found) >= {"text/mean/cosine", "text/ridge/cosine", "text/mlp/cosine"}
    assert all(np.isfinite(value) for value in found.values())
