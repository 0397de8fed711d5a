"""The client model: every combination of registered parts, and its tokens, queries and scores."""

import itertools
import math
from typing import Any

import pytest
import torch

from experiments import generator, small_client, small_config
from fedsim.errors import ConfigError
from fedsim.models.client_model import ClientModel, EntityInput, ModalityInput, Prototypes
from fedsim.models.fusion import FUSIONS
from fedsim.models.imputers import IMPUTERS, Imputation
from fedsim.models.losses import LOSSES
from fedsim.models.scorers import SCORERS

DIMS = {"text": 6, "image": 5}


def _model(**overrides: Any) -> ClientModel:
    return ClientModel(small_config(overrides), DIMS)


def _entities(model: ClientModel, prototypes: Prototypes | None = None) -> EntityInput:
    """Four entities with texts; entity 2 alone has an image."""
    draws = generator(7)
    features = {
        "text": ModalityInput(torch.arange(4), torch.randn(4, 6, generator=draws)),
        "image": ModalityInput(torch.tensor([2]), torch.randn(1, 5, generator=draws)),
    }
    return EntityInput(model.availability(4, features), features, prototypes)


# Scorer and loss see no imputer: all that a part meets is combined, not everything with everything.
COMBINATIONS = [
    *((scorer, fusion, "zero", loss) for scorer, fusion, loss in itertools.product(SCORERS, FUSIONS, LOSSES)),
    *(("complex", fusion, imputer, "one_vs_all") for fusion, imputer in itertools.product(FUSIONS, IMPUTERS)),
]


@pytest.mark.parametrize(("scorer", "fusion", "imputer", "loss"), list(dict.fromkeys(COMBINATIONS)))
def test_every_combination_of_parts_trains(scorer: str, fusion: str, imputer: str, loss: str) -> None:
    """One epoch of any registered parts moves the parameters, and all losses, parameters and scores are finite."""
    client = small_client(
        {
            "model.scorer": scorer,
            "model.fusion": fusion,
            "model.imputer": imputer,
            "training.loss": loss,
            "training.batch_size": 128,
            "federation.strategy": "local",
            "model.dropout": 0.1,
            "training.n3_weight": 0.01,
        }
    )
    before = {name: value.clone() for name, value in client.values.params.items()}
    _, report = client.train(1, None)
    assert all(math.isfinite(value) for value in report.losses.values())
    assert all(bool(torch.isfinite(value).all()) for value in client.values.params.values())
    for name in ("relation", "local/entity"):
        assert not torch.equal(client.values.params[name], before[name])
    scores = client.scores(torch.tensor([0, 1]), torch.tensor([0, 0]), True, 1)
    assert scores.shape == (2, len(client.data.entity_ids))
    assert bool(torch.isfinite(scores).all())


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("model.scorer", ", ".join(SCORERS)),
        ("model.fusion", ", ".join(FUSIONS)),
        ("model.imputer", ", ".join(IMPUTERS)),
        ("training.loss", ", ".join(LOSSES)),
    ],
)
def test_an_unknown_part_lists_the_names(field: str, known: str) -> None:
    with pytest.raises(ConfigError, match=f"'{field}' = 'nope': unknown name; choose from") as caught:
        _model(**{field: "nope"})
    assert sorted(str(caught.value).split("choose from ")[1].split(", ")) == sorted(known.split(", "))


def test_tokens_are_unit_variance_where_available_and_zero_elsewhere() -> None:
    """Eq. 1 and 4: structure, text and image; only entity 2 has an image."""
    model = _model()
    params = model.init_modules(generator()) | {"entity": model.init_entities(4, generator(1))}
    table = model.tokens(params, _entities(model))
    assert table.available.int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 0]]
    there = table.values[table.available]
    assert torch.allclose(there.mean(-1), torch.zeros(len(there)), atol=1e-5)
    # The structure rows are small (init_scale), so layer norm's epsilon of 1e-5 shows in their variance.
    assert torch.allclose(there.var(-1, correction=0), torch.ones(len(there)), atol=5e-3)
    assert float(table.values[~table.available].abs().max()) == 0.0
    assert table.prototypes is table.has_prototype is None


def test_prototypes_stand_beside_the_modalities() -> None:
    model = _model()
    params = model.init_modules(generator()) | {"entity": model.init_entities(4, generator(1))}
    present = torch.tensor([[False] * 4, [True, False, False, False]])
    table = model.tokens(params, _entities(model, Prototypes(torch.ones(2, 4, 8), present).with_structure()))
    assert table.has_prototype is not None
    assert table.prototypes is not None
    assert table.has_prototype.int().tolist() == [[0] * 4, [0] * 4, [1, 0, 0, 0]]
    assert float(table.prototypes[0].abs().max()) == 0.0


def test_embed_fills_only_what_is_missing() -> None:
    """Eq. 7, h = o * x_0 + (1 - o) * xhat_0, seen through the split fusion, which keeps the tokens."""
    model = _model(**{"model.fusion": "split"})
    params = model.init_modules(generator()) | {"entity": model.init_entities(4, generator(1))}
    table = model.tokens(params, _entities(model))
    imputation = Imputation(torch.full_like(table.values, 5.0), torch.zeros(3, 4)).of_missing(table.available)
    parts = model.embed(params, table, imputation)
    assert torch.equal(parts[table.available], table.values[table.available])
    assert bool((parts[~table.available] == 5.0).all())
    replaced = model.embed(params, table, imputation, torch.tensor([0, 2]), torch.full((3, 2, 8), 7.0))
    assert torch.equal(replaced[:, 2], table.values[:, 2]), "entity 2 lacks nothing"
    assert bool((replaced[2, 0] == 7.0).all())
    assert bool((replaced[2, 1] == 5.0).all())
    assert torch.equal(replaced[:2], table.values[:2])


def test_scores_of_equals_scores_on_all_candidates() -> None:
    for scorer, fusion in itertools.product(SCORERS, ("gate", "split")):
        model = _model(**{"model.scorer": scorer, "model.fusion": fusion})
        queries, table = torch.randn(2, model.num_parts, 4, 8, generator=generator())  # as many kinds as parts
        every = torch.arange(4).expand(4, 4)
        assert torch.allclose(model.scores_of(queries, table, every), model.scores(queries, table), atol=1e-5)


def test_reciprocal_relations_have_their_own_rows() -> None:
    """With reciprocal relations a head query reads row r + |R|; without, the scorer inverts the same row."""
    entity, relation = torch.tensor([1]), torch.tensor([0])
    for reciprocal, rows in ((True, 6), (False, 3)):
        model = _model(**{"training.reciprocal": reciprocal, "model.fusion": "none", "model.scorer": "transe"})
        relations = model.init_relations(3, generator())
        assert relations.shape == (1, rows, 8)
        table = torch.randn(1, 4, 8, generator=generator(1))
        asked = model.queries(table, relations, entity, relation, inverse=True)
        expected = table[:, 1] + relations[:, 3] if reciprocal else table[:, 1] - relations[:, 0]
        assert torch.allclose(asked[:, 0], expected)


def test_phases_of_rotate_cover_the_circle() -> None:
    relations = _model(**{"model.scorer": "rotate"}).init_relations(500, generator())
    assert relations.shape[-1] == 4
    assert float(relations.abs().max()) <= math.pi
    assert float(relations.abs().max()) > 3.1


def test_structure_alone_needs_no_modules() -> None:
    model = _model(**{"model.fusion": "none"})
    assert model.init_modules(generator()) == {}
    assert (model.imputes, model.num_tokens) == (False, 1)


def test_scaled_phases_are_the_same_rotations() -> None:
    """With 4 radians per unit the numbers are a quarter, the angles the same, the slopes four times as large."""
    plain, scaled = (
        _model(**{"model.scorer": "rotate", "model.fusion": "none", "model.phase_scale": s}) for s in (1, 4)
    )
    relations = [model.init_relations(3, torch.Generator().manual_seed(0)) for model in (plain, scaled)]
    torch.testing.assert_close(relations[0], 4 * relations[1])
    table = torch.randn(1, 5, plain.dim, generator=torch.Generator().manual_seed(1))
    found = []
    for model, relation in zip((plain, scaled), relations, strict=True):
        relation.requires_grad_()
        queries = model.queries(table, relation, torch.tensor([0, 1]), torch.tensor([2, 0]), inverse=False)
        scores = model.scores(queries, table)
        found.append((scores.detach(), torch.autograd.grad(scores.sum(), relation)[0]))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(4 * found[0][1], found[1][1])
