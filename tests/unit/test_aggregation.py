"""Exact sums: the same bits in any order (method.md eq. 3 and 11)."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments import generator
from fedsim.errors import RunError
from fedsim.federated.aggregation import ModuleMean, RowMean, decode, encode

FINITE = st.floats(-4000, 4000, width=32)


def test_rows_by_hand() -> None:
    """Row 1 was sent twice, (1 + 4) / 2 = 2.5; row 0 once; nobody sent row 2, which keeps its 9."""
    mean = RowMean(3, 1)
    mean.add(torch.tensor([0, 1]), torch.tensor([[0.5], [1.0]]), "a")
    mean.add(torch.tensor([1]), torch.tensor([[4.0]]), "b")
    assert mean.result(torch.full((3, 1), 9.0)).flatten().tolist() == [0.5, 2.5, 9.0]
    assert mean.counts.tolist() == [1, 2, 0]


def test_modules_by_hand() -> None:
    """Shares 1/4 and 3/4: 0.25 * 2 + 0.75 * 6 = 5. With the second client alone it is 6, whatever its share."""
    both, alone = ModuleMean(), ModuleMean()
    both.add({"w": torch.tensor([2.0])}, 0.25)
    for mean in (both, alone):
        mean.add({"w": torch.tensor([6.0])}, 0.75)
    assert both.result({})["w"].tolist() == [5.0]
    assert alone.result({})["w"].tolist() == [6.0]
    previous = {"w": torch.ones(1)}
    assert ModuleMean().result(previous) is previous


@given(values=st.lists(FINITE, min_size=1, max_size=6), seed=st.integers(0, 999))
def test_any_order_gives_the_same_bits(values: list[float], seed: int) -> None:
    order = torch.randperm(len(values), generator=generator(seed)).tolist()
    shares = torch.rand(len(values), generator=generator(seed)).div(len(values)).tolist()
    results = []
    for numbers in (range(len(values)), order):
        rows, modules = RowMean(2, 1), ModuleMean()
        for i in numbers:
            rows.add(torch.tensor([0]), torch.tensor([[values[i]]]), "row")
            modules.add({"w": torch.tensor([values[i]])}, shares[i])
        results.append((rows.result(torch.zeros(2, 1)), modules.result({})["w"]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_float_sums_would_not_do() -> None:
    """Why fixed point: 1e8 + 1 - 1e8 depends on the order in float32."""
    parts = [torch.tensor(1e8), torch.tensor(1.0), torch.tensor(-1e8)]
    assert len({float(sum(order)) for order in itertools.permutations(parts)}) > 1


@given(values=st.lists(FINITE, min_size=1, max_size=5))
def test_a_mean_is_right_to_float_precision(values: list[float]) -> None:
    """The encoding rounds at 2^-41, the result is the float32 nearest to the exact mean but for that."""
    mean = RowMean(1, 1)
    for value in values:
        mean.add(torch.tensor([0]), torch.tensor([[value]]), "row")
    exact = sum(torch.tensor(values, dtype=torch.float32).double().tolist()) / len(values)
    assert float(mean.result(torch.zeros(1, 1))) == pytest.approx(exact, rel=1e-7, abs=1e-12)


@given(value=FINITE)
def test_one_value_survives_but_for_its_tiniest_part(value: float) -> None:
    one = torch.tensor([value])
    back = decode(encode(one, "x"), torch.tensor(float(1 << 40)))
    assert torch.allclose(back, one, rtol=0, atol=2.0**-41)


def test_thousands_of_large_summands_fit() -> None:
    mean = RowMean(1, 1)
    for _ in range(2048):
        mean.add(torch.tensor([0]), torch.tensor([[-4095.0]]), "row")
    assert mean.result(torch.zeros(1, 1)).tolist() == [[-4095.0]]


@pytest.mark.parametrize("value", [4096.0, -1e9, float("inf"), float("nan")])
def test_a_value_that_cannot_be_summed_is_refused(value: float) -> None:
    with pytest.raises(RunError, match="'client 3: entity' holds .* beyond what can be summed"):
        encode(torch.tensor([0.0, value]), "client 3: entity")


def test_nothing_to_encode() -> None:
    assert encode(torch.zeros(0, 3), "x").shape == (0, 3)
