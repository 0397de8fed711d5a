"""Exact sums: the same bits in any order (method.md eq. 3 and 11)."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments import generator
from fedsim.federated.aggregation import ModuleMean, RowMean, decode, encode, range_limit
from fedsim.federated.message_checks import in_range

FINITE = st.floats(-4000, 4000, width=32)


def test_rows_by_hand() -> None:
    """Row 1 was sent twice, (1 + 4) / 2 = 2.5; row 0 once; nobody sent row 2, which keeps its 9."""
    mean = RowMean(3, 1)
    mean.add(torch.tensor([0, 1]), torch.tensor([[0.5], [1.0]]))
    mean.add(torch.tensor([1]), torch.tensor([[4.0]]))
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
            rows.add(torch.tensor([0]), torch.tensor([[values[i]]]))
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
        mean.add(torch.tensor([0]), torch.tensor([[value]]))
    exact = sum(torch.tensor(values, dtype=torch.float32).double().tolist()) / len(values)
    assert float(mean.result(torch.zeros(1, 1))) == pytest.approx(exact, rel=1e-7, abs=1e-12)


@given(value=FINITE)
def test_one_value_survives_but_for_its_tiniest_part(value: float) -> None:
    one = torch.tensor([value])
    back = decode(encode(one), torch.tensor(float(1 << 40)))
    assert torch.allclose(back, one, rtol=0, atol=2.0**-41)


def test_thousands_of_large_summands_fit() -> None:
    mean = RowMean(1, 1)
    for _ in range(2048):
        mean.add(torch.tensor([0]), torch.tensor([[-4095.0]]))
    assert mean.result(torch.zeros(1, 1)).tolist() == [[-4095.0]]


@pytest.mark.parametrize("value", [4096.0, -1e9, float("inf"), float("nan")])
def test_a_value_that_cannot_be_summed_is_refused(value: float) -> None:
    assert in_range(torch.tensor([0.0, 4095.0]), 4096.0)
    assert not in_range(torch.tensor([0.0, value]), 4096.0)


def test_nothing_to_encode() -> None:
    assert in_range(torch.zeros(0, 3), 4096.0)
    assert encode(torch.zeros(0, 3)).shape == (0, 3)


@given(values=st.lists(FINITE, min_size=1, max_size=20), exponent=st.integers(-60, 0))
def test_single_precision_encodes_to_the_bits_of_double(values: list[float], exponent: int) -> None:
    """A float32 times 2^40 is exact, and so is its rounding: halves go to even in both."""
    halves = [2.0**-41, 3 * 2.0**-41, -(2.0**-41), 4095.9, 1e-45, -1e-40]
    single = torch.cat([torch.tensor(values) * 2.0**exponent, torch.tensor(halves)])
    expected = (single.double() * 2.0**40).round().to(torch.int64)
    assert torch.equal(encode(single), expected)


def test_more_clients_leave_less_room_for_each() -> None:
    """2^63 / 2^40 = 2^23 is shared by all summands: 4096 each for 2,048, 1024 each for 8,192."""
    assert [range_limit(number) for number in (0, 2048, 8192)] == [4096.0, 4096.0, 1024.0]
    assert in_range(torch.tensor([1023.0]), range_limit(8192))
    assert not in_range(torch.tensor([1024.0]), range_limit(8192))


@pytest.mark.parametrize("first", [0, 3])
def test_rows_in_sequence_and_rows_apart_are_summed_alike(first: int) -> None:
    """More rows than are encoded at once, in sequence and spread, against the definition."""
    num_rows, dim = 5000, 64
    values = torch.randn(2500, dim, generator=generator())
    for rows in (torch.arange(first, first + 2500), torch.arange(first, first + 2 * 2490, 2)):
        mean = RowMean(num_rows, dim)
        mean.add(rows, values[: len(rows)])
        expected = torch.zeros(num_rows, dim, dtype=torch.int64)
        expected[rows] = encode(values[: len(rows)])
        assert torch.equal(mean.total, expected)
        assert int(mean.counts.sum()) == len(rows)
