"""Optimisers as functions of values: parameters and state go in, and are updated in place.

State is a flat dict of tensors named ``<slot>/<parameter>``, so that it can be checkpointed, reset by name, and later
stacked over clients.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.models.parameters import Params

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


def adam(params: Params, grads: Mapping[str, Tensor], state: Params, learning_rate: float) -> None:
    """Take one Adam step (Kingma and Ba, ICLR 2015) on the parameters that have a gradient."""
    for name, grad in grads.items():
        if f"steps/{name}" not in state:
            state[f"steps/{name}"] = torch.zeros((), dtype=torch.int64)
            state[f"first/{name}"] = torch.zeros_like(params[name])
            state[f"second/{name}"] = torch.zeros_like(params[name])
        state[f"steps/{name}"] += 1
        steps = int(state[f"steps/{name}"])
        first = state[f"first/{name}"].mul_(BETA_1).add_(grad, alpha=1 - BETA_1)
        second = state[f"second/{name}"].mul_(BETA_2).addcmul_(grad, grad, value=1 - BETA_2)
        denominator = (second / (1 - BETA_2**steps)).sqrt_().add_(EPSILON)
        params[name].addcdiv_(first, denominator, value=-learning_rate / (1 - BETA_1**steps))


def adagrad(params: Params, grads: Mapping[str, Tensor], state: Params, learning_rate: float) -> None:
    """Take one Adagrad step (Duchi et al., JMLR 2011) on the parameters that have a gradient."""
    for name, grad in grads.items():
        if f"second/{name}" not in state:
            state[f"second/{name}"] = torch.zeros_like(params[name])
        second = state[f"second/{name}"].addcmul_(grad, grad)
        params[name].addcdiv_(grad, second.sqrt().add_(1e-10), value=-learning_rate)


OPTIMIZERS = {"adam": adam, "adagrad": adagrad}


def reset_state(state: Params, prefix: str = "") -> None:
    """Forget the state of the parameters whose name starts with `prefix`."""
    for name in [n for n in state if n.split("/", 1)[1].startswith(prefix)]:
        del state[name]
