"""Flat dicts of parameters: layers by name, and views."""

import math

import torch

from experiments import generator
from fedsim.models.parameters import layer_norm, linear, linear_init, overwrite, select_view, take_rows, with_prefix


def test_layer_norm_standardises_by_hand() -> None:
    """(1, 3) has mean 2 and variance 1, so it becomes (-1, 1); a constant row becomes zero, not NaN."""
    assert torch.allclose(layer_norm(torch.tensor([[1.0, 3.0]])), torch.tensor([[-1.0, 1.0]]), atol=1e-5)
    assert torch.equal(layer_norm(torch.full((1, 4), 7.0)), torch.zeros(1, 4))


def test_linear_by_hand() -> None:
    """(1, 2) [[1, 0], [0, 2]] + (1, 1) = (2, 5)."""
    params = {"f.weight": torch.tensor([[1.0, 0.0], [0.0, 2.0]]), "f.bias": torch.ones(2)}
    assert torch.equal(linear(params, "f", torch.tensor([1.0, 2.0])), torch.tensor([2.0, 5.0]))


def test_linear_init_keeps_the_variance_of_its_inputs() -> None:
    params = linear_init("f", 400, 50, generator(), scale=0.5)
    assert params["f.weight"].shape == (400, 50)
    assert math.isclose(float(params["f.weight"].std()), 0.5 / 20, rel_tol=0.05)
    assert torch.equal(params["f.bias"], torch.zeros(50))


def test_views_come_apart_as_they_were_put_together() -> None:
    own = {"entity": torch.ones(1), "imputer.out.weight": torch.zeros(1)}
    both = with_prefix(own, "local") | with_prefix({"entity": torch.zeros(1)}, "global") | {"relation": torch.ones(2)}
    assert select_view(both, "local") == own
    assert set(select_view(both, "global")) == {"entity"}


def test_values_are_overwritten_in_place_where_they_fit() -> None:
    """`a` stays where it is, `b` gets another size, `c` is new; none of them is the value that was given."""
    own = {"a": torch.zeros(2, 2), "b": torch.zeros(2)}
    places = {name: value.data_ptr() for name, value in own.items()}
    values = {"a": torch.ones(2, 2).T, "b": torch.ones(3), "c": torch.ones(2, 2)[:, 0]}
    overwrite(own, values)
    assert own["a"].data_ptr() == places["a"]
    assert all(torch.equal(own[name], value) for name, value in values.items())
    for value in values.values():
        value.fill_(5.0)
    assert all(bool((value == 1).all()) and value.is_contiguous() for value in own.values())


def test_the_same_rows_of_every_part_are_taken() -> None:
    """Two stacked clients of three parts: values and gradients equal those of indexing, repeated ids and all."""
    tables = torch.randn(2, 3, 5, 4, generator=generator(), dtype=torch.float64, requires_grad=True)
    ids = torch.randint(5, (2, 7), generator=generator())
    slope = torch.randn(2, 3, 7, 4, generator=generator(1), dtype=torch.float64)
    expected = torch.stack([table[:, own] for table, own in zip(tables, ids, strict=True)])
    found = take_rows(tables, ids)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, tables, slope), torch.autograd.grad(expected, tables, slope))
    torch.testing.assert_close(take_rows(tables[0], ids[0]), expected[0])
