"""Negatives of a batch: their draws, and shared ones scored as if each query had them for itself."""

import pytest
import torch

from experiments import generator, small_config
from fedsim.models.client_model import ClientModel
from fedsim.models.negatives import candidate_scores, draw_negatives, known_answers, redraw_known
from fedsim.models.scorers import SCORERS


def test_negatives_are_drawn_from_all_entities_of_the_client() -> None:
    settings = small_config({"training.num_negatives": 50}).training
    negatives = draw_negatives(settings, (2, 30), 7, generator())
    assert negatives.shape == (2, 30, 50)
    assert negatives.unique().tolist() == list(range(7))
    assert torch.equal(negatives, draw_negatives(settings, (2, 30), 7, generator()))
    assert not torch.equal(negatives[0, 0], negatives[0, 1])


def test_shared_negatives_are_one_set() -> None:
    settings = small_config({"training.num_negatives": 50, "training.negatives": "shared"}).training
    assert draw_negatives(settings, (2, 30), 7, generator()).shape == (1, 1, 50)


def test_filtered_negatives_are_all_but_the_known_answers_of_their_query() -> None:
    """Of 7 entities (0, 0, ?) has the answers 1 and 2, (?, 0, 2) the answers 0 and 3, (?, 0, 1) the answer 0."""
    settings = small_config({"training.num_negatives": 400, "training.negatives": "filtered"}).training
    triples = torch.tensor([[0, 0, 1], [0, 0, 2], [3, 0, 2]])
    known = known_answers(settings, triples)
    assert known is not None
    batch = triples[:2]
    drawn = draw_negatives(settings, (2, 2), 7, generator())
    negatives = redraw_known(drawn, batch, known, 7, generator(1))
    assert negatives[0, 0].unique().tolist() == negatives[0, 1].unique().tolist() == [0, 3, 4, 5, 6]
    assert negatives[1, 0].unique().tolist() == [1, 2, 3, 4, 5, 6]
    assert negatives[1, 1].unique().tolist() == [1, 2, 4, 5, 6]
    kept = negatives == drawn
    assert torch.equal(kept[0], ~torch.isin(drawn[0], torch.tensor([1, 2])) | kept[0])  # others stay as drawn
    assert kept.double().mean() > 0.6


def test_a_query_whose_answers_are_all_entities_keeps_its_negatives() -> None:
    settings = small_config({"training.num_negatives": 5, "training.negatives": "filtered"}).training
    triples = torch.tensor([[0, 0, 0], [0, 0, 1]])
    known = known_answers(settings, triples)
    assert known is not None
    drawn = draw_negatives(settings, (1, 2), 2, generator())
    assert torch.equal(redraw_known(drawn, triples, known, 2, generator()), drawn)


def test_only_filtered_negatives_need_an_index() -> None:
    assert known_answers(small_config({}).training, torch.zeros(1, 3, dtype=torch.int64)) is None


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("leading", [(), (3,)])
def test_shared_negatives_score_as_those_of_each_query(scorer: str, leading: tuple[int, ...]) -> None:
    """The same scores, and the same gradients of the tables."""
    model = ClientModel(small_config({"model.scorer": scorer, "model.fusion": "none"}), {})
    size = (*leading, 2, 9, model.dim)  # two parts
    table = torch.randn(size, generator=generator(), dtype=torch.float64, requires_grad=True)
    relations = torch.randn(
        *leading, 2, 6, model.scorer.relation_dim(model.dim), generator=generator(1), dtype=torch.float64
    )
    ids = torch.randint(9, (*leading, 5, 2), generator=generator(2))
    triples = torch.stack([ids[..., 0], ids[..., 1] % 3, ids[..., 1]], -1)
    negatives = torch.randint(9, (*leading, 1, 4), generator=generator(3))

    def score(embeddings: torch.Tensor, triples: torch.Tensor, negatives: torch.Tensor) -> list[torch.Tensor]:
        head, relation, tail = triples.unbind(-1)
        queries = model.queries(embeddings, relations, head, relation, inverse=False)
        scores = candidate_scores(model, queries, embeddings, tail, negatives)
        return [scores, *torch.autograd.grad(scores.tanh().sum(), table)]

    own = score(table, triples, negatives.expand(*leading, 5, 4))
    assert own[0].shape == (*leading, 2, 5, 5)  # each part's
    torch.testing.assert_close(score(table, triples, negatives), own)
