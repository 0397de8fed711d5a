"""Imputation quality on the features kept aside (method.md section 7).

A hidden feature is projected by the client's own projection to the true token, and compared with what the imputer
made of the entity without it. Beside it stand the mean of the available tokens, and ridge and MLP regression from the
other tokens, fitted on the client's visible data alone.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedsim.models.optimizers import adam
from fedsim.models.parameters import Params, linear, linear_init
from fedsim.models.regression import fit_ridge, regressors
from fedsim.randomness import torch_generator

if TYPE_CHECKING:
    from fedsim.federated.client import Client

BLOCK = 256  # entities that are compared with all others at once: the similarities stay in the cache
HELD_OUT = 5  # every fifth visible row chooses the ridge's strength and stops the MLP
MLP_HIDDEN, MLP_STEPS, MLP_LEARNING_RATE = 256, 100, 0.003
RIDGE_ALPHAS = (10.0, 100.0, 1000.0)


def measure_imputation(client: "Client", round_num: int) -> dict[str, float]:
    """Measure one client's imputed tokens of each modality, under the view that it would federate (or its only one).

    Args:
        client: the client; its hidden features are read here and nowhere else.
        round_num: seeds the imputer's draws.

    Returns:
        ``<modality>/<imputer>/cosine`` and ``<modality>/<imputer>/hits_at_10``: mean cosine with the true token, and
        how often the true entity is among the ten nearest (by cosine) of all entities with the modality. Beside
        the client's imputer stand ``mean``, ``ridge`` and ``mlp``; if it is one of the last two, what is fitted here is
        named ``<imputer>_fitted``. Empty for a modality of which nothing is hidden or nothing visible.
    """
    results: dict[str, float] = {}
    if not client.model.imputes:
        return results
    view = client.strategy.views[-1]
    tokens, available = client.complete_tokens(view, round_num)
    for index, name in enumerate(client.model.feature_dims, start=1):
        item = client.data.features[name]
        if item.visible.all() or not item.visible.any():
            continue
        rows = torch.from_numpy(item.rows).to(tokens.device)
        true = client.project(view, name, torch.from_numpy(item.values).to(tokens.device))  # [num_rows, dim]
        hidden = torch.from_numpy(~item.visible).to(tokens.device)
        others = regressors(tokens, available, index)
        own = client.config.model.imputer
        estimates = {own: tokens[index, rows[hidden]], "mean": true[~hidden].mean(0).expand(int(hidden.sum()), -1)}
        fitted = {"ridge": _ridge(others[rows], true, hidden)}
        generator = torch_generator(client.config.seed, f"mlp/{name}", round_num=round_num, client=client.data.client)
        fitted["mlp"] = _mlp(others[rows], true, hidden, generator)
        estimates |= {f"{key}_fitted" if key == own else key: value for key, value in fitted.items()}
        for imputer, estimate in estimates.items():
            cosine, hits = token_quality(estimate, true, hidden)
            results[f"{name}/{imputer}/cosine"] = cosine
            results[f"{name}/{imputer}/hits_at_10"] = hits
    return results


def token_quality(estimate: Tensor, true: Tensor, hidden: Tensor) -> tuple[float, float]:
    """Compare imputed with true tokens.

    Args:
        estimate: [num_hidden, dim].
        true: [num_rows, dim], the true tokens of all entities that have the modality.
        hidden: bool [num_rows], which of them were imputed.

    Returns:
        Mean cosine, and retrieval Hits@10 (ties count half a place).
    """
    unit, goal = normalize(estimate, dim=-1), normalize(true, dim=-1).T
    cosines, ranks = [], []
    for rows, answers in zip(unit.split(BLOCK), hidden.nonzero().split(BLOCK), strict=True):
        similarity = rows @ goal  # [block, num_rows]
        own = similarity.gather(1, answers)
        above, level = (similarity > own).sum(1), (similarity == own).sum(1)
        cosines.append(own)
        ranks.append(above + (level + 1) / 2)
    return float(torch.cat(cosines).mean()), float((torch.cat(ranks) <= 10).double().mean())


def _ridge(inputs: Tensor, true: Tensor, hidden: Tensor) -> Tensor:
    """Fit ridge regression on the visible rows, its strength chosen on a fifth of them; estimate the hidden ones."""
    seen_x, seen_y = inputs[~hidden].double(), true[~hidden].double()
    held = torch.arange(len(seen_x), device=seen_x.device) % HELD_OUT == 0
    best = RIDGE_ALPHAS[-1]
    if 0 < int(held.sum()) < len(seen_x):
        errors = [
            float((fit_ridge(seen_x, seen_y, ~held, alpha)(seen_x[held]) - seen_y[held]).square().mean())
            for alpha in RIDGE_ALPHAS
        ]
        best = RIDGE_ALPHAS[errors.index(min(errors))]
    return fit_ridge(seen_x, seen_y, torch.ones_like(held), best)(inputs[hidden].double()).to(true)


def _mlp(inputs: Tensor, true: Tensor, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Fit an MLP with one hidden layer, stopped at the lowest error on a fifth of the visible rows."""
    seen_x, seen_y = inputs[~hidden], true[~hidden]
    held = torch.arange(len(seen_x), device=seen_x.device) % HELD_OUT == 0
    if not 0 < int(held.sum()) < len(seen_x):
        held = torch.zeros_like(held)
    params = linear_init("in", inputs.shape[1], MLP_HIDDEN, generator)
    params |= linear_init("out", MLP_HIDDEN, true.shape[1], generator, scale=0.1)
    params = {name: value.to(inputs) for name, value in params.items()}
    state: Params = {}
    best, lowest = torch.zeros_like(true[hidden]), math.inf
    for _ in range(MLP_STEPS):
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        error = (_mlp_forward(leaves, seen_x[~held]) - seen_y[~held]).square().mean()
        grads = torch.autograd.grad(error, list(leaves.values()))
        adam(params, dict(zip(leaves, grads, strict=True)), state, MLP_LEARNING_RATE)
        judged = held if bool(held.any()) else ~held
        missed = float((_mlp_forward(params, seen_x[judged]) - seen_y[judged]).square().mean())
        if missed < lowest:
            best, lowest = _mlp_forward(params, inputs[hidden]), missed
    return best


def _mlp_forward(params: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    return linear(params, "out", torch.relu(linear(params, "in", inputs)))
