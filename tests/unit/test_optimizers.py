"""The optimisers equal torch's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from experiments import generator
from fedsim.models.optimizers import OPTIMIZERS, reset_state
from fedsim.models.parameters import Params

REFERENCES: dict[str, Callable[..., Any]] = {"adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad}


def _start() -> Params:
    return {"a": torch.randn(3, 4, generator=generator()), "b": torch.randn(5, generator=generator(1))}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_equals_torch(name: str) -> None:
    """Thirty steps with changing gradients, b only in every third; tolerance for the order of float operations."""
    params, state = _start(), {}
    reference = {key: value.clone().requires_grad_() for key, value in params.items()}
    optimizer = REFERENCES[name](list(reference.values()), lr=0.02)
    for step in range(30):
        grads = {key: torch.randn(value.shape, generator=generator(step)) for key, value in params.items()}
        if step % 3:
            del grads["b"]
        for key, leaf in reference.items():
            leaf.grad = grads[key].clone() if key in grads else None
        OPTIMIZERS[name](params, grads, state, 0.02)
        optimizer.step()
    for key, leaf in reference.items():
        assert torch.allclose(params[key], leaf.detach(), atol=1e-5), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_gradient_stays(name: str) -> None:
    params, state = _start(), {}
    OPTIMIZERS[name](params, {"a": torch.ones(3, 4)}, state, 0.1)
    assert torch.equal(params["b"], _start()["b"])
    assert not [slot for slot in state if slot.endswith("/b")]


def test_the_first_step_of_adam_by_hand() -> None:
    """Both moments are unbiased, so the first step is learning rate * sign(gradient): 1 - 0.1 = 0.9."""
    params = {"a": torch.ones(1)}
    OPTIMIZERS["adam"](params, {"a": torch.tensor([123.0])}, {}, 0.1)
    assert torch.allclose(params["a"], torch.tensor([0.9]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_clients_step_as_each_alone(name: str) -> None:
    """Three clients with 0, 2 and 5 steps behind them; then only the first two step, as slices of the stack."""
    update = OPTIMIZERS[name]
    values = torch.randn(3, 4, 2, generator=generator())
    alone: list[tuple[Params, Params]] = [({"a": value.clone()}, {}) for value in values]
    slots = ["second"] if name == "adagrad" else ["first", "second"]
    stack = {"a": values.clone()}
    state = {f"{slot}/a": torch.zeros_like(values) for slot in slots}
    if name == "adam":
        state["steps/a"] = torch.zeros(3, dtype=torch.int64)
    for client, num_steps in enumerate((0, 2, 5)):
        for step in range(num_steps):
            grad = torch.randn(4, 2, generator=generator(step))
            update(alone[client][0], {"a": grad}, alone[client][1], 0.1)
            own = {slot: value[client] for slot, value in state.items()}
            update({"a": stack["a"][client]}, {"a": grad}, own, 0.1)
    for num_clients in (3, 2):
        grads = torch.randn(num_clients, 4, 2, generator=generator(num_clients))
        cut = {slot: value[:num_clients] for slot, value in state.items()}
        update({"a": stack["a"][:num_clients]}, {"a": grads}, cut, 0.1)
        for (params, own), grad in zip(alone[:num_clients], grads, strict=True):
            update(params, {"a": grad}, own, 0.1)
    torch.testing.assert_close(stack["a"], torch.stack([params["a"] for params, _ in alone]))
    for slot, value in state.items():
        torch.testing.assert_close(value, torch.stack([own[slot] for _, own in alone]))


def test_adam_reads_a_gradient_that_is_not_contiguous() -> None:
    grad = torch.randn(4, 3, generator=generator())
    results = []
    for given in (grad.mT, grad.mT.contiguous()):
        params = {"a": torch.ones(3, 4)}
        OPTIMIZERS["adam"](params, {"a": given}, {}, 0.1)
        OPTIMIZERS["adam"](params, {"a": given.square()}, {}, 0.1)
        results.append(params["a"])
    assert torch.equal(*results)


def test_state_is_forgotten_by_name() -> None:
    params = {"global/a": torch.ones(1), "local/a": torch.ones(1)}
    state: Params = {}
    OPTIMIZERS["adam"](params, {name: torch.ones(1) for name in params}, state, 0.1)
    reset_state(state, lambda name: name.startswith("global/"))
    assert {slot.split("/", 1)[1] for slot in state} == {"local/a"}
    reset_state(state)
    assert state == {}
