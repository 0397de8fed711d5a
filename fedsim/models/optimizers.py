"""Optimisers as functions of values: parameters and state go in, and are updated in place.

State is a flat dict of tensors named ``<slot>/<parameter>``, so that it can be checkpointed, reset by name and stacked
over clients.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim.adam import adam as fused_adam

from fedsim.models.parameters import Params

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


def adam(params: Params, grads: Mapping[str, Tensor], state: Params, learning_rate: float) -> None:
    """Take one Adam step (Kingma and Ba, ICLR 2015) on the parameters that have a gradient.

    Clients may be stacked: a parameter then has a leading dimension [clients], and so may its count of steps, int64
    [clients], where clients have taken different numbers of steps. Parameters and state are written in place, so
    leading slices of larger tensors may be passed. State that is missing starts at zero, with one count for all.

    Args:
        params: name -> contiguous tensor.
        grads: name -> gradient.
        state: ``steps/<name>``, ``first/<name>`` and ``second/<name>``.
        learning_rate: of all parameters.
    """
    groups: list[tuple[Tensor, Tensor, Tensor, Tensor, int]] = []  # each with a count of its own
    for name, grad in grads.items():
        if f"steps/{name}" not in state:
            state[f"steps/{name}"] = torch.zeros((), dtype=torch.int64)
            state[f"first/{name}"] = torch.zeros_like(params[name])
            state[f"second/{name}"] = torch.zeros_like(params[name])
        steps = state[f"steps/{name}"]
        values = (params[name], grad.contiguous(), state[f"first/{name}"], state[f"second/{name}"])
        # The fused kernel runs over the memory of the four alike, whatever their strides.
        assert all(value.is_contiguous() for value in values), f"{name}: not contiguous"
        counts = steps.tolist()
        if isinstance(counts, int):
            groups.append((*values, counts))
        elif counts and min(counts) == max(counts):
            groups.append((*values, counts[0]))
        else:
            groups += list(zip(*values, counts, strict=True))
        steps += 1
    if not groups:
        return
    fused_adam(
        [group[0] for group in groups],
        [group[1] for group in groups],
        [group[2] for group in groups],
        [group[3] for group in groups],
        [],
        [torch.tensor(float(group[4]), device=group[0].device) for group in groups],
        fused=True,
        amsgrad=False,
        beta1=BETA_1,
        beta2=BETA_2,
        lr=learning_rate,
        weight_decay=0.0,
        eps=EPSILON,
        maximize=False,
    )


def adagrad(params: Params, grads: Mapping[str, Tensor], state: Params, learning_rate: float) -> None:
    """Take one Adagrad step (Duchi et al., JMLR 2011) on the parameters that have a gradient."""
    for name, grad in grads.items():
        if f"second/{name}" not in state:
            state[f"second/{name}"] = torch.zeros_like(params[name])
        second = state[f"second/{name}"].addcmul_(grad, grad)
        params[name].addcdiv_(grad, second.sqrt().add_(1e-10), value=-learning_rate)


OPTIMIZERS = {"adam": adam, "adagrad": adagrad}


def reset_state(state: Params, of: Callable[[str], bool] | None = None) -> None:
    """Forget the state of the parameters that `of` says, by their names; of all if it is None."""
    for name in [n for n in state if of is None or of(n.split("/", 1)[1])]:
        del state[name]
