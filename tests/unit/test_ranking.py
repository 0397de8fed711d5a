"""Filtered realistic ranks: by hand, against a plain loop, and equal to PyKEEN's evaluator on the same scores."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pykeen.evaluation import RankBasedEvaluator
from pykeen.models import DistMult as PyKEENDistMult
from pykeen.triples import CoreTriplesFactory
from torch import Tensor

from fedsim.errors import FedSimError
from fedsim.evaluation import ranking
from fedsim.evaluation.ranking import (
    FilterIndex,
    RankingMetrics,
    ScoreFunction,
    filtered_ranks,
    rank_triples,
    summarise,
    weighted_mean,
)

NONE_KNOWN = torch.empty(0, dtype=torch.int64)


def draw_triples(generator: np.random.Generator, num: int, num_entities: int, num_relations: int) -> np.ndarray:
    """Draw triples with repeats: int64 [num, 3]."""
    head, tail = generator.integers(num_entities, size=(2, num))
    return np.stack([head, generator.integers(num_relations, size=num), tail], axis=1)


def draw_tables(seed: int, num_entities: int, num_relations: int, num_levels: int = 4) -> tuple[Tensor, Tensor]:
    """Draw scores from few levels, so with many ties: [num_relations, num_entities, num_entities], tails and heads."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, num_relations, num_entities, num_entities)
    tails, heads = torch.randint(num_levels, shape, generator=generator).float()
    return tails, heads


def lookup(tables: tuple[Tensor, Tensor]) -> ScoreFunction:
    """Make a score function that reads the tables."""
    return lambda entity, relation, inverse: (tables[int(inverse)][relation, entity],)


def test_golden_ties() -> None:
    """Rank by hand, candidates a to f, target c with score 3.

    scores  a 5, b 3, c 3, d 3, e 1, f 5
    Nothing known but c: above are a and f, level are b and d: optimistic 3, pessimistic 5, realistic 4.
    Known a (above) and b (level) too: above is f, level is d: optimistic 2, pessimistic 3, realistic 2.5.
    The target counts as one whether or not it is among the known answers.
    """
    scores = torch.tensor([[5.0, 3.0, 3.0, 3.0, 1.0, 5.0]]).expand(3, -1)
    known_row, known_answer = torch.tensor([0, 2, 2, 2]), torch.tensor([2, 0, 1, 2])
    ranks = filtered_ranks(scores, torch.tensor([2, 2, 2]), known_row, known_answer)
    assert ranks.dtype == torch.float64
    assert ranks.tolist() == [4.0, 4.0, 2.5]


def test_constant_scores_get_the_middle_rank() -> None:
    """Among 5 level candidates the best place is 1, the worst 5, the realistic rank 3."""
    ranks = filtered_ranks(torch.zeros(2, 5), torch.tensor([0, 4]), NONE_KNOWN, NONE_KNOWN)
    assert ranks.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 3])
def test_non_finite_scores_are_an_error(bad: float, column: int) -> None:
    scores = torch.zeros(3, 5)
    scores[1, column] = bad
    with pytest.raises(FedSimError, match="1 of 15 scores are NaN or infinite"):
        filtered_ranks(scores, torch.tensor([0, 0, 0]), NONE_KNOWN, NONE_KNOWN)


def test_rank_triples_refuses_non_finite_scores() -> None:
    triples = np.array([[0, 0, 1]])
    with pytest.raises(FedSimError, match="NaN or infinite"):
        rank_triples(lambda *_: (torch.full((1, 3), torch.nan),), triples, FilterIndex.build(triples, 3, 1))


def test_known_answers_by_hand() -> None:
    """Index (0, r0, 1), (0, r0, 2) and (2, r1, 2).

    The tail query (0, r0, ?) knows 1 and 2, (1, r0, ?) and (2, r0, ?) know nothing. The head query (?, r1, 2) knows 2,
    (?, r1, 0) nothing, (?, r0, 1) knows 0.
    """
    index = FilterIndex.build(np.array([[0, 0, 2], [0, 0, 1], [2, 1, 2], [0, 0, 2]]), 3, 2)
    row, answer = index.known(torch.tensor([1, 0, 2, 0]), torch.tensor([0, 0, 0, 0]), inverse=False)
    assert (row.tolist(), answer.tolist()) == ([1, 1, 3, 3], [1, 2, 1, 2])
    row, answer = index.known(torch.tensor([2, 0, 1]), torch.tensor([1, 1, 0]), inverse=True)
    assert (row.tolist(), answer.tolist()) == ([0, 2], [2, 0])


@given(seed=st.integers(0, 2**32), num_entities=st.integers(1, 9), num_triples=st.integers(0, 40))
def test_known_answers_equal_a_dictionary(seed: int, num_entities: int, num_triples: int) -> None:
    generator = np.random.default_rng(seed)
    triples = draw_triples(generator, num_triples, num_entities, 3)
    triples.setflags(write=False)  # as arrays from an object store are
    index = FilterIndex.build(triples, num_entities, 3)
    queries = draw_triples(generator, 12, num_entities, 3)
    for inverse, (given_column, answer_column) in ((False, (0, 2)), (True, (2, 0))):
        known = {
            (row, int(triple[answer_column]))
            for row, query in enumerate(queries)
            for triple in triples
            if triple[given_column] == query[0] and triple[1] == query[1]
        }
        row, answer = index.known(torch.tensor(queries[:, 0]), torch.tensor(queries[:, 1]), inverse)
        assert list(zip(row.tolist(), answer.tolist(), strict=True)) == sorted(known)


@given(
    seed=st.integers(0, 2**32),
    num_entities=st.integers(2, 10),
    num_triples=st.integers(1, 30),
    batch_size=st.integers(1, 12),
    block_size=st.integers(1, 64),
    restrict=st.booleans(),
)
def test_ranks_equal_a_plain_loop(
    seed: int, num_entities: int, num_triples: int, batch_size: int, block_size: int, restrict: bool
) -> None:
    """Sorting out candidates one by one gives the same ranks, whatever the batches, blocks and candidates."""
    generator = np.random.default_rng(seed)
    triples = draw_triples(generator, num_triples, num_entities, 2)
    test = triples[: num_triples // 2 + 1]
    tables = draw_tables(seed, num_entities, 2)
    ids = np.unique(np.concatenate([test[:, 0], test[:, 2], generator.integers(num_entities, size=2)]))
    candidates = torch.tensor(ids) if restrict else None
    known = {tuple(triple) for triple in triples.tolist()}
    expected = []
    for inverse in (False, True):
        for head, relation, tail in test.tolist():
            entity, target = (tail, head) if inverse else (head, tail)
            scores = tables[int(inverse)][relation, entity]
            others = [
                scores[other].item()
                for other in (ids.tolist() if restrict else range(num_entities))
                if other != target and ((other, relation, tail) if inverse else (head, relation, other)) not in known
            ]
            above = sum(score > scores[target].item() for score in others)
            expected.append(1 + above + sum(score == scores[target].item() for score in others) / 2)
    index = FilterIndex.build(triples, num_entities, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_BLOCK_SIZE_CPU", block_size)
        (ranks,) = rank_triples(lookup(tables), test, index, batch_size=batch_size, candidates=candidates)
        (tail_ranks,) = rank_triples(lookup(tables), test, index, both_sides=False, candidates=candidates)
    assert ranks.tolist() == expected
    assert tail_ranks.tolist() == expected[: len(test)]


def test_an_answer_outside_the_candidates_is_refused() -> None:
    triples = np.array([[0, 0, 1], [1, 0, 2]])
    index = FilterIndex.build(triples, 3, 1)
    with pytest.raises(ValueError, match="1 right answers are not among the candidates"):
        rank_triples(lambda *_: (torch.zeros(2, 3),), triples, index, candidates=torch.tensor([0, 1]))


def test_several_models_are_ranked_side_by_side() -> None:
    """Scores 3, 2, 1 put entity 1 second behind 0; their negatives too, behind 2; both sides ask for entity 1."""
    triples = np.array([[0, 0, 1], [2, 0, 1]])
    index = FilterIndex.build(np.array([[0, 0, 1]]), 3, 1)
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 4.0]])
    found = rank_triples(lambda *_: (scores, -scores), triples, index, both_sides=False, num_models=2)
    assert [ranks.tolist() for ranks in found] == [[2.0, 3.0], [2.0, 1.0]]


def test_no_triples_give_no_ranks() -> None:
    none = np.empty((0, 3), dtype=np.int64)
    (ranks,) = rank_triples(lambda *_: (torch.zeros(0, 3),), none, FilterIndex.build(none, 3, 1))
    assert ranks.shape == (0,)
    assert summarise(ranks) == RankingMetrics(0.0, {1: 0.0, 3: 0.0, 10: 0.0}, 0)


class _TableModel(PyKEENDistMult):
    """A PyKEEN model whose scores are read from tables; all but the scores is PyKEEN's own."""

    tables: tuple[Tensor, Tensor]

    def score_t(self, hr_batch: Tensor, **_: object) -> Tensor:
        return self.tables[0][hr_batch[:, 1], hr_batch[:, 0]].clone()  # PyKEEN's filter writes into the scores

    def score_h(self, rt_batch: Tensor, **_: object) -> Tensor:
        return self.tables[1][rt_batch[:, 0], rt_batch[:, 1]].clone()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ranks_equal_pykeen(seed: int) -> None:
    """PyKEEN's rank-based evaluator, filtered, both sides, realistic, on the same scores with many ties."""
    num_entities, num_relations = 30, 4
    triples = np.unique(draw_triples(np.random.default_rng(seed), 300, num_entities, num_relations), axis=0)
    np.random.default_rng(seed).shuffle(triples)
    train, test = triples[:200], triples[200:]
    model = _TableModel(
        triples_factory=CoreTriplesFactory(torch.tensor(train), num_entities, num_relations),
        embedding_dim=2,
        random_seed=0,
    )
    model.tables = draw_tables(seed, num_entities, num_relations, num_levels=6)
    evaluator = RankBasedEvaluator(filtered=True, clear_on_finalize=False)
    reference = evaluator.evaluate(
        model, torch.tensor(test), batch_size=16, additional_filter_triples=torch.tensor(train), use_tqdm=False
    )
    expected = np.concatenate([rank for side in ("tail", "head") for rank in evaluator.ranks[side, "realistic"]])

    index = FilterIndex.build(triples, num_entities, num_relations)
    (ranks,) = rank_triples(lookup(model.tables), test, index, batch_size=16)
    assert ranks.tolist() == expected.tolist()
    assert (ranks % 1 == 0.5).any(), "the case has no ties"
    metrics = summarise(ranks)
    assert metrics.mrr == pytest.approx(reference.get_metric("both.realistic.inverse_harmonic_mean_rank"))
    for k in (1, 3, 10):
        assert metrics.hits[k] == pytest.approx(reference.get_metric(f"both.realistic.hits_at_{k}"))


def test_summary_by_hand() -> None:
    """Ranks 1, 1.5, 4, 20: MRR (1 + 2/3 + 1/4 + 1/20) / 4 = 59/120; the tie for the first place is no hit at 1."""
    metrics = summarise(torch.tensor([1.0, 1.5, 4.0, 20.0]), ks=(1, 3, 5, 10))
    assert metrics.mrr == pytest.approx(59 / 120)
    assert (metrics.hits_at_1, metrics.hits_at_3, metrics.hits_at_5, metrics.hits_at_10) == (0.25, 0.5, 0.75, 0.75)
    assert metrics.num_queries == 4


def test_weighted_mean_equals_the_summary_of_all_ranks() -> None:
    """Clients of 3, 0 and 1 queries: the mean weighted by queries is the mean over all queries."""
    ranks = torch.tensor([1.0, 2.0, 12.0, 3.5])
    mean = weighted_mean([summarise(ranks[:3]), summarise(ranks[:0]), summarise(ranks[3:])])
    whole = summarise(ranks)
    assert mean.mrr == pytest.approx(whole.mrr)
    assert mean.hits == pytest.approx(whole.hits)
    assert mean.num_queries == 4
    assert weighted_mean([summarise(ranks[:0])]).mrr == 0.0
