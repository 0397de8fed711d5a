"""Every registered imputer, held to the contract; a new one is tested by being registered."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments import generator, impute, impute_step, small_config, small_runtime, token_table
from fedsim.evaluation.imputation import measure_imputation
from fedsim.models.imputers import IMPUTERS, Imputer, TokenTable

CASES = {
    "no modality available": [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]],
    "all available": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
    "some available": [[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 1]],
    "one entity, one missing": [[1], [1], [0]],
    "one entity, none missing": [[1], [1], [1]],
    "one entity, structure alone": [[1], [0], [0]],
    "a single modality": [[1, 1, 1], [1, 0, 1]],
}


def _imputer(name: str, num_tokens: int) -> Imputer:
    return IMPUTERS[name](small_config(), num_tokens)


def _check(name: str, tokens: TokenTable) -> None:
    imputer = _imputer(name, len(tokens.values))
    leaves = {key: value.requires_grad_() for key, value in imputer.init(generator()).items()}
    assert all(key.startswith("imputer.") for key in leaves)
    made = impute(imputer, leaves, tokens, generator(1))
    assert made.values.shape == tokens.values.shape
    assert made.uncertainty.shape == tokens.available.shape
    assert not made.values.requires_grad
    assert bool(torch.isfinite(made.values).all())
    assert bool((made.uncertainty >= 0).all())
    assert torch.equal(made.uncertainty[tokens.available], torch.zeros(int(tokens.available.sum())))

    step = impute_step(imputer, leaves, tokens, made, generator(2))
    assert (step.rows is None) == (step.values is None)
    terms = list(step.losses.values())
    if step.rows is not None and step.values is not None:
        assert step.values.shape == (len(tokens.values), len(step.rows), tokens.values.shape[-1])
        assert len(step.rows.unique()) == len(step.rows)
        assert bool((~tokens.available).any(0)[step.rows].all()), "only entities that lack a token are replaced"
        terms.append(step.values.square().sum())
    for term in terms:
        assert bool(torch.isfinite(term))
        grads = torch.autograd.grad(term, list(leaves.values()), allow_unused=True, retain_graph=True)
        assert all(grad is None or bool(torch.isfinite(grad).all()) for grad in grads)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", IMPUTERS)
def test_every_imputer_meets_its_contract(name: str, case: str) -> None:
    _check(name, token_table(torch.tensor(CASES[case]).bool()))


@pytest.mark.parametrize("name", IMPUTERS)
@given(seed=st.integers(0, 9999), num_tokens=st.integers(2, 4), num_entities=st.integers(1, 12))
def test_every_imputer_meets_its_contract_on_any_mask(name: str, seed: int, num_tokens: int, num_entities: int) -> None:
    available = torch.rand(num_tokens, num_entities, generator=generator(seed)) < 0.5
    available[0] = True
    tokens = token_table(available, seed=seed)
    prototypes = torch.randn(tokens.values.shape, generator=generator(seed))
    has_prototype = torch.rand(num_tokens, num_entities, generator=generator(seed + 1)) < 0.5
    has_prototype[0] = False
    _check(name, TokenTable(tokens.values, available, prototypes * has_prototype.unsqueeze(-1), has_prototype))


@pytest.mark.parametrize("name", IMPUTERS)
def test_every_imputer_ignores_what_stands_in_a_missing_place(name: str) -> None:
    """Missing values are zero by contract; that nothing else could leak in is what this shows."""
    available = torch.tensor(CASES["some available"]).bool()
    tokens = token_table(available)
    garbage = TokenTable(
        tokens.values + 1e3 * (~available).unsqueeze(-1), available, tokens.prototypes, tokens.has_prototype
    )
    imputer = _imputer(name, 3)
    params = imputer.init(generator())
    made = [impute(imputer, params, table, generator(1)) for table in (tokens, garbage)]
    assert torch.equal(made[0].values[~available], made[1].values[~available])
    assert torch.equal(made[0].uncertainty, made[1].uncertainty)


@pytest.mark.parametrize("name", IMPUTERS)
def test_every_imputer_serves_clients_and_server(name: str) -> None:
    """In the second round of MMFeD3 clients have prototypes, and the server imputes its own tuples."""
    runtime = small_runtime({"federation.strategy": "mmfed3", "model.imputer": name, "imputer.hidden": 16})
    for round_num in (1, 2):
        result = runtime.train(round_num, [0, 1])
    assert all(report.losses["total"] < 1e3 for report in result.reports)
    found = measure_imputation(runtime.clients[0], 2)
    assert {f"{modality}/{name}/cosine" for modality in ("text", "image")} <= found.keys()
    assert all(-1 <= value <= 1 for value in found.values())


def test_the_mean_by_hand() -> None:
    """The modality's available tokens are (1, 3) and (3, 5): the missing one is (2, 4)."""
    values = torch.tensor([[[9.0, 9.0]] * 3, [[1.0, 3.0], [0.0, 0.0], [3.0, 5.0]]])
    available = torch.tensor([[True, True, True], [True, False, True]])
    tokens = TokenTable(values, available)
    made = impute(IMPUTERS["mean"](small_config(), 2), {}, tokens, generator())
    assert made.values[1, 1].tolist() == [2.0, 4.0]


def test_zero_and_random() -> None:
    tokens = token_table(torch.tensor([[True] * 500, [False] * 500]), dim=16)
    assert float(impute(_imputer("zero", 2), {}, tokens, generator()).values.abs().max()) == 0.0
    noise = impute(_imputer("random", 2), {}, tokens, generator()).values[1]
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05
