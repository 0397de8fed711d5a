"""Imputation quality on the features kept aside (method.md section 7).

A hidden feature is projected by the client's own projection to the true token, and compared with what the imputer
made of the entity without it. Beside it stand the mean of the available tokens, and ridge and MLP regression from the
other tokens, fitted on the client's visible data alone.
"""

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from sklearn.neural_network import MLPRegressor
from torch import Tensor

from fedsim.randomness import derive_seed

if TYPE_CHECKING:
    from fedsim.federated.client import Client

RIDGE_ALPHAS = (10.0, 100.0, 1000.0)


def measure_imputation(client: "Client", round_num: int, *, with_mlp: bool = False) -> dict[str, float]:
    """Measure one client's imputed tokens of each modality, under the view that it would federate (or its only one).

    Args:
        client: the client; its hidden features are read here and nowhere else.
        round_num: seeds the imputer's draws.
        with_mlp: fit the MLP regression too (slow).

    Returns:
        ``<modality>/<imputer>/cosine`` and ``<modality>/<imputer>/hits_at_10``: mean cosine with the true token, and
        how often the true entity is among the ten nearest (by cosine) of all entities with the modality. Empty for a
        modality of which nothing is hidden or nothing visible.
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
        others = _regressors(tokens, available, index)
        estimates = {
            client.config.model.imputer: tokens[index, rows[hidden]],
            "mean": true[~hidden].mean(0, keepdim=True).expand(int(hidden.sum()), -1),
            "ridge": _ridge(others[rows], true, hidden),
        }
        if with_mlp:
            seed = derive_seed(client.config.seed, f"mlp/{name}", round_num=round_num, client=client.data.client)
            estimates["mlp"] = _mlp(others[rows], true, hidden, seed)
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
    unit = torch.nn.functional.normalize(estimate, dim=-1)
    similarity = unit @ torch.nn.functional.normalize(true, dim=-1).T  # [num_hidden, num_rows]
    own = similarity.gather(1, hidden.nonzero())
    above, level = (similarity > own).sum(1), (similarity == own).sum(1)
    rank = above + (level + 1) / 2
    return float(own.mean()), float((rank <= 10).double().mean())


def _regressors(tokens: Tensor, available: Tensor, index: int) -> Tensor:
    """Put the other tokens side by side, zero where they are missing, with their flags; [num_entities, features]."""
    others = [i for i in range(len(tokens)) if i != index]
    known = tokens[others] * available[others].unsqueeze(-1)
    flat = known.transpose(0, 1).flatten(1)
    return torch.cat([flat, available[others].T.to(flat.dtype)], 1)


def _ridge(inputs: Tensor, true: Tensor, hidden: Tensor) -> Tensor:
    """Fit ridge regression on the visible rows, its strength chosen on a fifth of them; estimate the hidden ones."""
    x, y, mask = inputs.cpu().numpy(), true.cpu().numpy(), hidden.cpu().numpy()
    seen_x, seen_y = x[~mask], y[~mask]
    held = np.arange(len(seen_x)) % 5 == 0
    best = RIDGE_ALPHAS[-1]
    if 0 < held.sum() < len(seen_x):
        errors = []
        for alpha in RIDGE_ALPHAS:
            model = Ridge(alpha=alpha).fit(seen_x[~held], seen_y[~held])
            errors.append(float(np.square(model.predict(seen_x[held]) - seen_y[held]).mean()))
        best = RIDGE_ALPHAS[int(np.argmin(errors))]
    return torch.from_numpy(Ridge(alpha=best).fit(seen_x, seen_y).predict(x[mask])).to(true)


def _mlp(inputs: Tensor, true: Tensor, hidden: Tensor, seed: int) -> Tensor:
    """Fit a one-layer MLP regression with early stopping on the visible rows; estimate the hidden ones."""
    x, y, mask = inputs.cpu().numpy(), true.cpu().numpy(), hidden.cpu().numpy()
    model = MLPRegressor(
        hidden_layer_sizes=(256,),
        alpha=1e-2,
        early_stopping=bool((~mask).sum() >= 20),  # a tenth is held out; of fewer rows it would be one
        max_iter=100,
        random_state=seed % 2**32,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the iterations are its budget
        model.fit(x[~mask], y[~mask])
    return torch.from_numpy(model.predict(x[mask])).to(true)
