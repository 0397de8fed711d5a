"""Every registered fusion, and the pairs of embeddings that are scored (method.md section 3)."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from experiments import generator, small_config, token_table
from fedsim.models.client_model import LINEAR_SCORERS, ClientModel
from fedsim.models.fusion import FUSIONS, Pair, QueryPlan
from fedsim.models.fusion.mocme import complementarity
from fedsim.models.parameters import Params, take_rows
from fedsim.models.scorers import SCORERS

MULTIMODAL = [name for name, fusion in FUSIONS.items() if fusion.uses_modalities]


def _init(name: str, num_tokens: int, dim: int = 8, **model: Any) -> Params:
    config = small_config({f"model.{key}": value for key, value in {"dim": dim, **model}.items()}).model
    return FUSIONS[name].init(config, num_tokens, generator())


def _fuse(name: str, params: Params, tokens: Tensor) -> Tensor:
    """Fuse tokens [num_tokens, num_entities, dim], all of them available."""
    return FUSIONS[name].fuse(params, tokens, torch.ones(tokens.shape[:2]), torch.zeros(tokens.shape[:2]))


@pytest.mark.parametrize("name", FUSIONS)
@given(seed=st.integers(0, 9999), num_tokens=st.integers(2, 4), num_entities=st.integers(1, 9), imputed=st.booleans())
def test_every_fusion_gives_finite_embeddings_and_gradients(
    name: str, seed: int, num_tokens: int, num_entities: int, imputed: bool
) -> None:
    """Missing tokens are imputed by noise, or zero."""
    fusion = FUSIONS[name]
    available = torch.rand(num_tokens, num_entities, generator=generator(seed)) < 0.5
    available[0] = True
    tokens = token_table(torch.ones_like(available) if imputed else available, seed=seed).values.requires_grad_()
    params = fusion.init(small_config().model, num_tokens, generator(seed))
    leaves = {key: value.requires_grad_() for key, value in params.items()}
    assert all(key.startswith("fusion.") for key in leaves)
    uncertainty = torch.rand(available.shape, generator=generator(seed)) * ~available
    fused = fusion.fuse(leaves, tokens, available.float(), uncertainty)
    num_kinds = 1 + max(max(pair.head, pair.tail) for pair in fusion.pairs(num_tokens))
    assert fused.shape == (num_kinds, num_entities, 8)
    grads = torch.autograd.grad(fused.pow(3).sum(), [tokens, *leaves.values()])
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_every_token_and_parameter_matters(name: str) -> None:
    """A gradient reaches each token of each entity, and all parameters once the zeros of the start have moved."""
    params = _init(name, 3)
    leaves = {key: (value + 0.1).requires_grad_() for key, value in params.items()}
    tokens = torch.randn(3, 5, 8, generator=generator(1)).requires_grad_()
    flags = torch.tensor([[1.0] * 5, [1.0, 1, 0, 0, 1], [1.0, 0, 1, 0, 1]])
    fused = FUSIONS[name].fuse(leaves, tokens, flags, (1 - flags) / 3)
    token_grad, *grads = torch.autograd.grad(fused.pow(3).sum(), [tokens, *leaves.values()])
    assert bool((token_grad.abs().sum(-1) > 0).all())
    assert all(float(grad.abs().max()) > 0 for grad in grads), list(params)


@pytest.mark.parametrize("name", FUSIONS)
@given(num_tokens=st.integers(2, 5))
def test_pairs_are_the_same_seen_from_head_and_tail(name: str, num_tokens: int) -> None:
    """With (a, b) comes (b, a), no pair stands twice, and kinds and relation tables are numbered without gaps."""
    pairs = FUSIONS[name].pairs(num_tokens)
    assert len(set(pairs)) == len(pairs)
    assert {Pair(pair.tail, pair.head, pair.relation) for pair in pairs} == set(pairs)
    for found in ({pair.head for pair in pairs}, {pair.relation for pair in pairs}):
        assert found == set(range(len(found)))


def _model(scorer: str, fusion: str, **overrides: Any) -> ClientModel:
    chosen = {"model.scorer": scorer, "model.fusion": fusion, **overrides}
    return ClientModel(small_config(chosen), {"text": 6, "image": 5})


@pytest.mark.parametrize("reciprocal", [True, False])
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_are_sums_or_means_over_the_pairs(scorer: str, fusion: str, reciprocal: bool) -> None:
    """Both ways of scoring, of tails and heads, against f(h_a, r, t_b) added up pair by pair."""
    model = _model(scorer, fusion, **{"training.reciprocal": reciprocal})
    pairs = model.fusion.pairs(model.num_tokens)
    table = torch.randn(model.plan.num_kinds, 5, 8, generator=generator(), dtype=torch.float64)
    relations = model.init_relations(3, generator(1)).double()
    known, relation = torch.tensor([4, 0]), torch.tensor([2, 1])
    every = torch.arange(5).expand(2, 5)
    for inverse in (False, True):
        row = relation + 3 if inverse and reciprocal else relation
        expected = torch.zeros(2, 5, dtype=torch.float64)
        for head, tail, place in pairs:
            own, other = (tail, head) if inverse else (head, tail)
            query = model.scorer.query(
                table[own, known][None], relations[place, row][None], inverse=inverse and not reciprocal
            )
            expected += model.scorer.score(query, table[other][None])[0] / len(pairs)
        queries = model.queries(table, relations, known, relation, inverse=inverse)
        assert queries.shape == (model.num_parts, 2, 8)
        torch.testing.assert_close(model.scores(queries, table), expected)
        torch.testing.assert_close(model.scores_of(queries, table, every), expected)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("scorer", SCORERS)
def test_stacked_clients_score_as_each_alone(scorer: str, fusion: str) -> None:
    model = _model(scorer, fusion)
    table = torch.randn(3, model.plan.num_kinds, 5, 8, generator=generator(), dtype=torch.float64)
    relations = torch.stack([model.init_relations(2, generator(seed)) for seed in range(3)]).double()
    known, relation = torch.tensor([[4, 0], [1, 1], [2, 3]]), torch.tensor([[1, 1], [0, 1], [0, 0]])
    candidates = torch.randint(5, (3, 2, 3), generator=generator(1))
    queries = model.queries(table, relations, known, relation, inverse=True)
    scores, own = model.scores(queries, table), model.scores_of(queries, table, candidates)
    for client in range(3):
        alone = model.queries(table[client], relations[client], known[client], relation[client], inverse=True)
        torch.testing.assert_close(scores[client], model.scores(alone, table[client]))
        torch.testing.assert_close(own[client], model.scores_of(alone, table[client], candidates[client]))


@pytest.mark.parametrize("scorer", SCORERS)
def test_linear_scorers_are_those_that_add_up(scorer: str) -> None:
    """Only there f(a, r, c) + f(b, r, c) = f(a + b, r, c), so only there pairs with the same candidates are one."""
    model = _model(scorer, "none")
    first, second, candidates = torch.randn(3, 1, 4, 8, generator=generator(), dtype=torch.float64)
    relation = model.init_relations(2, generator(1)).double()

    def score(entity: Tensor) -> Tensor:
        return model.scorer.score(model.scorer.query(entity, relation), candidates)

    assert torch.allclose(score(first) + score(second), score(first + second)) == (scorer in LINEAR_SCORERS)


def test_plans_of_queries_by_hand() -> None:
    """IKRL with one modality asks 4 pairs; a linear scorer asks structure and image by the sum of both."""
    pairs = FUSIONS["ikrl"].pairs(2)
    assert set(pairs) == {Pair(0, 0, 0), Pair(1, 1, 0), Pair(0, 1, 0), Pair(1, 0, 0)}
    each = QueryPlan.build(pairs, linear=False)
    assert (each.known, each.asked, each.relation) == (((0,), (1,), (0,), (1,)), (0, 0, 1, 1), (0, 0, 0, 0))
    joined = QueryPlan.build(pairs, linear=True)
    assert (joined.known, joined.asked, joined.relation) == (((0, 1), (0, 1)), (0, 1), (0, 0))
    assert len(FUSIONS["ikrl"].pairs(3)) == 7
    apart = QueryPlan.build(FUSIONS["split"].pairs(3), linear=True)
    assert (apart.num_parts, apart.num_kinds, apart.num_tables) == (3, 3, 3)


@pytest.mark.parametrize("name", ["gate", "none", "split", "adamf", "imf", "mocme"])
def test_pairs_of_a_kind_with_itself_copy_nothing(name: str) -> None:
    """Candidates and known entities are the given tensors themselves."""
    plan = QueryPlan.build(FUSIONS[name].pairs(3), linear=False)
    table = torch.randn(plan.num_kinds, 5, 8)
    assert plan.candidates(table) is table
    assert plan.known_entities(table) is table
    assert plan.known_relations(table) is table


def test_one_pair_is_not_copied() -> None:
    plan = QueryPlan.build([Pair(0, 0, 0)], linear=False)
    scores = torch.randn(1, 4, 5)
    assert plan.join(scores).data_ptr() == scores.data_ptr()


def test_joined_queries_average_over_the_pairs_by_hand() -> None:
    """IKRL with one modality, joined: known (1, 3) sums to 4, times 2 parts / 4 pairs is 2 for either candidate.

    Candidates 5 and 7 under dot products: (2 * 5 + 2 * 7) / 2 = 12 = (1*5 + 3*5 + 1*7 + 3*7) / 4.
    """
    plan = QueryPlan.build(FUSIONS["ikrl"].pairs(2), linear=True)
    known = plan.known_entities(torch.tensor([[[1.0]], [[3.0]]]))
    assert known.flatten().tolist() == [2.0, 2.0]
    assert plan.join(known @ torch.tensor([[[5.0]], [[7.0]]])).tolist() == [[12.0]]


def test_the_gate_starts_with_the_mean_by_hand() -> None:
    """All gates are 1/2 at the start: of the tokens 1 and 3 it makes 2."""
    tokens = torch.stack([torch.full((5, 4), 1.0), torch.full((5, 4), 3.0)])
    assert torch.allclose(_fuse("gate", _init("gate", 2, 4), tokens), torch.full((1, 5, 4), 2.0))


def test_the_gate_by_hand() -> None:
    """Bias_out (ln 3, 0) gives gates (3/4, 1/4): 0.75 * 1 + 0.25 * 5 = 2."""
    params = _init("gate", 2, 2)
    params["fusion.bias_out"][0] = torch.log(torch.tensor(3.0))
    tokens = torch.tensor([[[1.0, 1.0]], [[5.0, 5.0]]])
    assert torch.allclose(_fuse("gate", params, tokens), torch.tensor([[[2.0, 2.0]]]))


def test_the_gate_can_trust_an_imputed_token_less() -> None:
    """With weights on them, availability and uncertainty both move the result."""
    gate, params = FUSIONS["gate"], _init("gate", 2, 4)
    params["fusion.weight_out"] = torch.randn(2, 4, 1, generator=generator(1))
    tokens = torch.randn(2, 1, 4, generator=generator(2))
    flags, sure = torch.ones(2, 1), torch.zeros(2, 1)
    missing, unsure = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [0.7]])
    known = gate.fuse(params, tokens, flags, sure)
    imputed = gate.fuse(params, tokens, missing, sure)
    assert not torch.allclose(known, imputed)
    assert not torch.allclose(imputed, gate.fuse(params, tokens, missing, unsure))


@pytest.mark.parametrize("name", sorted({*MULTIMODAL} - {"gate"}))
def test_only_the_gate_sees_the_flags(name: str) -> None:
    """The sources of the others know no imputed tokens."""
    params, tokens = _init(name, 3), torch.randn(3, 4, 8, generator=generator())
    flags = torch.zeros(3, 4)
    assert torch.equal(FUSIONS[name].fuse(params, tokens, flags, flags + 0.5), _fuse(name, params, tokens))


def test_split_and_ikrl_keep_the_tokens_and_none_the_structure() -> None:
    tokens = torch.randn(3, 5, 4, generator=generator())
    assert torch.equal(_fuse("split", {}, tokens), tokens)
    assert torch.equal(_fuse("ikrl", {}, tokens), tokens)
    assert torch.equal(_fuse("none", {}, tokens), tokens[:1])


def test_ikrl_by_hand() -> None:
    """TransE in one dimension of two, r = 1: structure 0 -> 3, image 2 -> 1.

    SS |0 + 1 - 3| = 2, II |2 + 1 - 1| = 2, SI |0 + 1 - 1| = 0, IS |2 + 1 - 3| = 0: the mean score is -1.
    """
    model = ClientModel(small_config({"model.scorer": "transe", "model.fusion": "ikrl", "model.dim": 2}), {"image": 5})
    table = torch.tensor([[[0.0, 0.0], [3.0, 0.0]], [[2.0, 0.0], [1.0, 0.0]]])
    relations = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    queries = model.queries(table, relations, torch.tensor([0]), torch.tensor([0]), inverse=False)
    assert float(model.scores(queries, table)[0, 1]) == -1.0


def test_tbkgc_by_hand() -> None:
    """Structure 1, text 2, image 6: the multimodal vector starts at their mean 4 and the sum at 5.

    With W_image = 2 I and b = 1 it is (2 + 12) / 2 + 1 = 8.
    """
    params = _init("tbkgc", 3, 2)
    tokens = torch.tensor([1.0, 2.0, 6.0]).view(3, 1, 1).expand(3, 1, 2)
    assert _fuse("tbkgc", params, tokens)[:, 0, 0].tolist() == [1.0, 4.0, 5.0]
    params["fusion.weight"][1] *= 2
    params["fusion.bias"] += 1
    assert _fuse("tbkgc", params, tokens)[:, 0, 0].tolist() == [1.0, 8.0, 9.0]


def test_tbkgc_with_a_linear_scorer_scores_the_sum_twice() -> None:
    """f(s,s) + f(m,m) + f(s,m) + f(m,s) = f(s+m, s+m), which stands there once more; the mean is over five."""
    model = _model("complex", "tbkgc")
    table = _fuse("tbkgc", _init("tbkgc", 3), torch.randn(3, 5, 8, generator=generator()))
    relations = model.init_relations(1, generator(1))
    known = torch.tensor([2, 3])
    queries = model.queries(table, relations, known, torch.zeros(2, dtype=torch.int64), inverse=False)
    both = model.scorer.query(take_rows(table[2:], known), relations[:, [0, 0]])
    assert torch.allclose(model.scores(queries, table), 2 / 5 * model.scorer.score(both, table[2:])[0], atol=1e-5)


def test_adamf_by_hand() -> None:
    """Tokens atanh(1/2) and 0 with v = 2 ln 3: weights softmax(ln 3, 0) = (3/4, 1/4), and 3/4 * 0.549306 = 0.411980."""
    params = {"fusion.vector": torch.tensor([2 * math.log(3), 0.0])}
    tokens = torch.tensor([[[math.atanh(0.5), 0.0]], [[0.0, 0.0]]])
    assert torch.allclose(_fuse("adamf", params, tokens), torch.tensor([[[0.411980, 0.0]]]), atol=1e-6)


def test_adamf_starts_with_the_mean() -> None:
    tokens = torch.randn(3, 5, 8, generator=generator())
    assert torch.allclose(_fuse("adamf", _init("adamf", 3), tokens), tokens.mean(0, keepdim=True), atol=1e-6)


def test_imf_by_hand() -> None:
    """U = I and b = 1: (1 + 1)(1 + 2) = 6 and (1 + 0)(1 + 3) = 4, which layer norm makes 1 and -1."""
    params = {
        "fusion.factor": torch.eye(2).repeat(2, 1, 1),
        "fusion.factor_bias": torch.ones(2, 1, 2),
        "fusion.output": torch.eye(2),
    }
    tokens = torch.tensor([[[1.0, 0.0]], [[2.0, 3.0]]])
    fused = _fuse("imf", params, tokens)
    assert torch.allclose(fused[0], torch.tensor([[1.0, -1.0]]), atol=1e-4)
    assert torch.equal(fused[1:], tokens)


def test_the_rank_of_imf_is_that_of_the_config() -> None:
    params = _init("imf", 3, fusion_rank=5)
    assert params["fusion.factor"].shape == (3, 8, 5)
    assert params["fusion.output"].shape == (5, 8)


def test_complementarity_by_hand() -> None:
    """Two equal views and one at a right angle: mean cosines 1/2, 1/2 and 0, so 1/2, 1/2 and 1. Zeros: always 1."""
    views = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [3.0, 4.0]], [[0.0, 3.0], [4.0, -3.0]]])
    assert torch.allclose(complementarity(views), torch.tensor([[0.5, 1.0], [0.5, 1.0], [1.0, 1.0]]), atol=1e-3)
    assert complementarity(views[:1]).tolist() == [[1.0, 1.0]], "a view alone has no others"


def test_complementarity_has_a_bounded_slope_at_zero() -> None:
    """The views of a missing token that is imputed by zeros are zero."""
    views = torch.zeros(3, 1, 4)
    views[1:] = torch.randn(2, 1, 4, generator=generator())
    views.requires_grad_()
    (grad,) = torch.autograd.grad(complementarity(views).sum(), views)
    assert 0 < float(grad.abs().max()) < 100


def test_mocme_by_hand() -> None:
    """Experts I, I and a quarter turn of a token (1, 0), sharpness ln 9 = 2.197225.

    Complementarity (1/2, 1/2, 1) gives weights 3 : 3 : 9, so the views sum to (0.4, 0.6). Of two tokens alike both
    weigh 1/2, and layer norm makes (0.4, 0.6) into (-1, 1).
    """
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    params = {
        "fusion.expert": torch.stack([torch.eye(2), torch.eye(2), turn]).unsqueeze(1).repeat(1, 2, 1, 1),
        "fusion.expert_bias": torch.zeros(3, 2, 1, 2),
        "fusion.log_sharpness": torch.full((2,), math.log(math.log(9))),
    }
    tokens = torch.tensor([1.0, 0.0]).expand(2, 1, 2)
    assert torch.allclose(_fuse("mocme", params, tokens), torch.tensor([[[-1.0, 1.0]]]), atol=2e-3)
    params["fusion.expert"][2] = torch.eye(2)
    assert torch.allclose(_fuse("mocme", params, tokens), torch.tensor([[[1.0, -1.0]]]), atol=2e-3)


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_mocme_has_the_experts_of_the_config(experts: int) -> None:
    params = _init("mocme", 3, num_experts=experts)
    assert params["fusion.expert"].shape == (experts, 3, 8, 8)
    assert _fuse("mocme", params, torch.randn(3, 5, 8, generator=generator())).shape == (1, 5, 8)
