"""The scorers: formulas by hand, one contract for every registered scorer, equality with PyKEEN."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pykeen.nn.modules import ComplExInteraction, DistMultInteraction, RotatEInteraction, TransEInteraction
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.models import kernels
from fedsim.models.scorers import SCORERS, Scorer

every_scorer = pytest.mark.parametrize("scorer", SCORERS.values(), ids=SCORERS.keys())


def direct_score(name: str, head: Tensor, relation: Tensor, tail: Tensor) -> Tensor:
    """Score triples by the formula of the paper, one number per row: [batch, dim] three times -> [batch]."""
    if name == "transe":
        return -(head + relation - tail).abs().sum(dim=-1)
    if name == "transe_l2":
        return -(head + relation - tail).square().sum(dim=-1).sqrt()
    if name == "distmult":
        return (head * relation * tail).sum(dim=-1)
    if name == "complex":
        return (as_complex(head) * as_complex(relation) * as_complex(tail).conj()).sum(dim=-1).real
    assert name == "rotate", f"no direct formula for scorer '{name}': add one"
    return -(as_complex(head) * torch.polar(torch.ones_like(relation), relation) - as_complex(tail)).abs().sum(dim=-1)


def as_complex(values: Tensor) -> Tensor:
    """Read our layout (real parts, then imaginary parts): [..., dim] -> complex [..., dim / 2]."""
    return torch.complex(*values.chunk(2, dim=-1))


def draw(scorer: Scorer, batch: int, num_candidates: int, dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw entities [batch, dim], relations [batch, relation_dim] and candidates [num_candidates, dim] in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, dim), (batch, scorer.relation_dim(dim)), (num_candidates, dim))
    entity, relation, candidates = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return entity, relation, candidates


@pytest.mark.parametrize(
    ("name", "relation", "expected"),
    [
        ("transe", [0.5, -1.0], -2.5),
        ("transe_l2", [0.5, -1.0], -math.sqrt(4.25)),
        ("distmult", [0.5, -1.0], 3.0),
        ("complex", [0.5, -1.0], 5.0),
        ("rotate", [math.pi / 2], -math.sqrt(20.0)),
    ],
)
def test_score_by_hand(name: str, relation: list[float], expected: float) -> None:
    """Score h = (1, 2), t = (2, -1), in complex layout h = 1 + 2i, t = 2 - i.

    TransE, r = (0.5, -1): h + r - t = (-0.5, 2), score -(0.5 + 2) = -2.5; by L2 -sqrt(0.25 + 4).
    DistMult, same r: 1 * 0.5 * 2 + 2 * -1 * -1 = 3.
    ComplEx, r = 0.5 - i: h r = 2.5, times conj(t) = 2 + i gives 5 + 2.5i, score 5.
    RotatE, a quarter turn: h i = -2 + i, minus t = -4 + 2i, score -sqrt(16 + 4).
    """
    scorer = SCORERS[name]
    head, tail = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, -1.0]])
    tail_query = scorer.query(head, torch.tensor([relation]))
    head_query = scorer.query(tail, torch.tensor([relation]), inverse=True)
    torch.testing.assert_close(scorer.score(tail_query, tail), torch.tensor([[expected]]))
    torch.testing.assert_close(scorer.score(head_query, head), torch.tensor([[expected]]))


@every_scorer
@given(batch=st.integers(1, 5), num_candidates=st.integers(1, 7), half=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_all_modes_agree(scorer: Scorer, batch: int, num_candidates: int, half: int, seed: int) -> None:
    """Tail queries, head queries, all candidates and own candidates give the formula's score of the same triple."""
    entity, relation, candidates = draw(scorer, batch, num_candidates, 2 * half, seed)
    own = candidates.expand(batch, -1, -1)  # [batch, num_candidates, dim]
    for inverse in (False, True):
        head, tail = (own, entity.unsqueeze(1)) if inverse else (entity.unsqueeze(1), own)
        expected = direct_score(scorer.name, head, relation.unsqueeze(1), tail)  # [batch, num_candidates]
        query = scorer.query(entity, relation, inverse=inverse)
        assert query.shape == entity.shape
        torch.testing.assert_close(scorer.score(query, candidates), expected)
        ids = torch.arange(num_candidates).expand(batch, -1)
        torch.testing.assert_close(scorer.score_negatives(query, candidates, ids), expected)


@every_scorer
@pytest.mark.parametrize("leading", [(3,), (2, 3), (2, 1)])
def test_leading_dimensions_are_scored_one_by_one(scorer: Scorer, leading: tuple[int, ...]) -> None:
    """Stacked clients and parts give the scores and the gradients that each gives alone."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(*leading, 4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    table = torch.randn(*leading, 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(5, (*leading, 4, 7), generator=generator)
    flat = [value.reshape(-1, *value.shape[-2:]) for value in (query, table, ids)]
    for stacked, score in (
        (scorer.score(query, table), lambda q, t, _: scorer.score(q, t)),
        (scorer.score_negatives(query, table, ids), scorer.score_negatives),
    ):
        alone = [score(*one) for one in zip(*flat, strict=True)]
        expected = torch.stack(alone).view_as(stacked)
        torch.testing.assert_close(stacked, expected)
        slope = torch.randn(stacked.shape, generator=generator, dtype=torch.float64)
        found = torch.autograd.grad(stacked, (query, table), slope)
        torch.testing.assert_close(found, torch.autograd.grad(expected, (query, table), slope))


@every_scorer
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_equal_finite_differences(scorer: Scorer, inverse: bool) -> None:
    entity, relation, candidates = draw(scorer, 3, 4, 6, seed=1)
    ids = torch.tensor([[0, 1], [3, 3], [2, 0]])
    inputs = [part.requires_grad_() for part in (entity, relation, candidates)]

    def score(entity: Tensor, relation: Tensor, candidates: Tensor) -> Tensor:
        return scorer.score(scorer.query(entity, relation, inverse=inverse), candidates)

    def score_negatives(entity: Tensor, relation: Tensor, table: Tensor) -> Tensor:
        return scorer.score_negatives(scorer.query(entity, relation, inverse=inverse), table, ids)

    assert torch.autograd.gradcheck(score, inputs)
    assert torch.autograd.gradcheck(score_negatives, inputs)


@every_scorer
@given(offset=st.sampled_from([0.0, 1e-30, 1e-22, 1e-19, 1e-10]), slope=st.sampled_from([1.0, 1e4]))
def test_gradients_are_finite_at_and_near_distance_zero(scorer: Scorer, offset: float, slope: float) -> None:
    """A candidate that equals the query has distance 0, where the derivative of a modulus is 0 / 0."""
    query = torch.zeros(2, 4, requires_grad=True)
    candidates = torch.full((3, 4), offset, requires_grad=True)
    ids = torch.arange(3).expand(2, -1)
    for scores in (scorer.score(query, candidates), scorer.score_negatives(query, candidates, ids)):
        gradients = torch.autograd.grad(scores, (query, candidates), torch.full_like(scores, slope))
        for gradient in gradients:
            assert gradient.isfinite().all()
            assert gradient.abs().max() <= 3.01 * slope  # at most 1 per pair, and a vector takes part in 3 pairs


@every_scorer
@given(block_size=st.integers(1, 300), columns=st.integers(1, 9), seed=st.integers(0, 2**32))
@settings(max_examples=15)
def test_blocks_change_nothing(scorer: Scorer, block_size: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, table = (torch.randn(2, rows, 6, generator=generator, dtype=torch.float64) for rows in (5, 7))
    ids = torch.randint(7, (2, 5, 9), generator=generator)
    query.requires_grad_()
    table.requires_grad_()

    def scores_and_gradients() -> list[Tensor]:
        results = []
        for scores in (scorer.score(query, table), scorer.score_negatives(query, table, ids)):
            results += [scores, *torch.autograd.grad(scores.square().sum(), (query, table))]
        return results

    expected = scores_and_gradients()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_BLOCK_SIZE_CPU", block_size)
        patch.setattr(kernels, "_BLOCK_COLUMNS_CPU", columns)
        torch.testing.assert_close(scores_and_gradients(), expected)


@pytest.mark.parametrize("name", ["complex", "rotate"])
def test_odd_dim_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"dim is 5, but scorer '{name}' needs an even dim"):
        SCORERS[name].relation_dim(5)


@every_scorer
@pytest.mark.parametrize("inverse", [False, True])
def test_scores_equal_pykeen(scorer: Scorer, inverse: bool) -> None:
    """Compare with PyKEEN's interactions on the same weights.

    Documented differences: PyKEEN's TransE gets p = 1; its complex vectors are complex tensors, ours hold the real
    parts, then the imaginary parts; its RotatE takes the relation as unit complex numbers and is the L2 norm over the
    whole vector, ours the sum of the moduli as in the authors' code, so here PyKEEN scores each coordinate as a vector
    of its own (where both are the modulus) and the scores are added up.
    """
    entity, relation, candidates = draw(scorer, 4, 6, 8, seed=2)
    query = scorer.query(entity, relation, inverse=inverse)
    own = candidates.expand(4, -1, -1)
    head, tail = (own, entity.unsqueeze(1)) if inverse else (entity.unsqueeze(1), own)
    relation = relation.unsqueeze(1)
    if scorer.name in ("transe", "transe_l2"):
        expected = TransEInteraction(p=2 if scorer.name == "transe_l2" else 1)(head, relation, tail)
    elif scorer.name == "distmult":
        expected = DistMultInteraction()(head, relation, tail)
    elif scorer.name == "complex":
        expected = ComplExInteraction()(as_complex(head), as_complex(relation), as_complex(tail))
    else:
        assert scorer.name == "rotate", f"no PyKEEN interaction named for scorer '{scorer.name}': add one"
        rotation = torch.polar(torch.ones_like(relation), relation)
        coordinates = (part.unsqueeze(-1) for part in (as_complex(head), rotation, as_complex(tail)))
        expected = RotatEInteraction()(*coordinates).sum(dim=-1)
    torch.testing.assert_close(scorer.score(query, candidates), expected)
