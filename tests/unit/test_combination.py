"""The scores of a client's views, combined."""

import pytest
import torch
from torch import Tensor

from fedsim.config import load_config
from fedsim.federated.combination import combined_scores
from fedsim.models.client_model import ClientModel


class _CountingModel(ClientModel):
    """Counts how often a table is scored."""

    num_scored = 0

    def scores(self, queries: Tensor, embeddings: Tensor) -> Tensor:
        self.num_scored += 1
        return super().scores(queries, embeddings)


def _model() -> _CountingModel:
    settings = {"model.dim": 2, "model.scorer": "distmult", "model.fusion": "none", "training.reciprocal": False}
    return _CountingModel(load_config(overrides=settings), {})


def _scores(model: ClientModel, weights: tuple[float | None, ...], views: tuple[str, ...]) -> list[list[list[float]]]:
    """Ask (entity 0, relation 0, ?) of two entities: 1 and 2 privately, 10 and 20 globally, in one dimension."""
    tables = {"local": torch.tensor([[[1.0, 0.0], [2.0, 0.0]]]), "global": torch.tensor([[[10.0, 0.0], [20.0, 0.0]]])}
    chosen = {view: tables[view] for view in views}
    ids = torch.tensor([0])
    found = combined_scores(model, torch.ones(1, 1, 2), chosen, weights, ids, ids, inverse=False)
    return [scores.tolist() for scores in found]


def test_mixtures_by_hand() -> None:
    """DistMult scores 1 * 1 and 1 * 2 privately, 10 * 10 and 10 * 20 globally; with a quarter of it 25.75, 51.5."""
    model = _model()
    found = _scores(model, (0.0, 0.25, 0.5, 1.0), ("local", "global"))
    assert found == [[[1.0, 2.0]], [[25.75, 51.5]], [[50.5, 101.0]], [[100.0, 200.0]]]
    assert model.num_scored == 2, "each view scores once"


@pytest.mark.parametrize(("weight", "expected"), [(0.0, [[1.0, 2.0]]), (1.0, [[100.0, 200.0]])])
def test_a_view_without_weight_is_not_scored(weight: float, expected: list[list[float]]) -> None:
    model = _model()
    assert _scores(model, (weight,), ("local", "global")) == [expected]
    assert model.num_scored == 1


def test_a_single_view_has_no_weight() -> None:
    assert _scores(_model(), (None,), ("global",)) == [[[100.0, 200.0]]]
