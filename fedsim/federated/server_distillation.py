"""The server's steps of MMFeD3: the denoiser on global tuples (eq. 12), the entity table on soft queries (eq. 13).

Image and text of one entity may come from different clients, so the server sees complete hyper-modal tuples that no
client has.
"""

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.federated.messages import PrototypeTable, SoftQueries
from fedsim.federated.strategy import GlobalModel
from fedsim.models.client_model import ClientModel
from fedsim.models.imputers import Imputation, TokenTable
from fedsim.models.imputers.denoiser import step_modulation
from fedsim.models.imputers.diffusion import DiffusionImputer
from fedsim.models.optimizers import adam
from fedsim.models.parameters import Params, layer_norm


def global_tokens(model: ClientModel, entity: Tensor, prototypes: PrototypeTable | None) -> TokenTable:
    """Assemble the tuples [G[e]; Z_m[e]] of all entities, [num_tokens, num_entities, dim]."""
    structure = layer_norm(entity) if model.fusion.uses_modalities else entity
    values = entity.new_zeros(model.num_tokens, *entity.shape)
    available = torch.ones(values.shape[:2], dtype=torch.bool, device=entity.device)
    if model.num_tokens > 1:
        available[1:] = False
    if prototypes is not None:
        values = torch.cat([values[:1], prototypes.values])
        available[1:] = prototypes.counts > 0
    values = torch.cat([structure.unsqueeze(0), values[1:]])
    return TokenTable(values, available)


def distil_global_model(
    config: Config,
    model: ClientModel,
    state: GlobalModel,
    soft_queries: list[SoftQueries],
    generator: torch.Generator,
) -> tuple[GlobalModel, dict[str, float]]:
    """Take `server_steps` steps on the denoiser and the entity table; the proximal term holds the table near Gbar.

    Args:
        config: the experiment.
        model: the model's functions.
        state: the aggregated model; not changed.
        soft_queries: of the cohort, in client order.
        generator: the server's, of this round.

    Returns:
        The distilled model, and the mean of each loss term.
    """
    settings = config.distillation
    params: Params = {"entity": state.entity.clone()}
    params |= {name: value.clone() for name, value in state.modules.items() if name.startswith("imputer.")}
    queries = _concatenate(soft_queries)
    tuples = global_tokens(model, state.entity, state.prototypes)
    means = torch.zeros_like(tuples.values[:, 0])  # the server's predictions start from zero (docs/log.md)
    imputation = None
    if model.imputes:
        imputation = model.imputer.impute(
            state.modules, tuples, model.imputer.draw_imputation(tuples.available, generator)
        ).of_missing(tuples.available)
    optimizer: Params = {}
    sums: dict[str, float] = {}
    for _ in range(settings.server_steps):
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        losses: dict[str, Tensor] = {}
        if isinstance(model.imputer, DiffusionImputer) and model.imputes:
            draws = model.imputer.draw_denoising(tuples.available, generator)
            if len(draws["rows"]) > 0:
                modulation = step_modulation(leaves, config.diffusion.steps)
                losses["server_diffusion"] = model.imputer.denoising_loss(leaves, tuples, means, modulation, draws)
        if queries is not None:
            losses |= _table_losses(config, model, leaves["entity"], state, queries, imputation, generator)
        if not losses:
            break
        grads = torch.autograd.grad(torch.stack(list(losses.values())).sum(), list(leaves.values()), allow_unused=True)
        found = {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
        adam(params, found, optimizer, settings.server_learning_rate)
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + float(loss.detach()) / settings.server_steps
    modules = state.modules | {name: value for name, value in params.items() if name != "entity"}
    return GlobalModel(params["entity"], modules, state.prototypes), sums


def _table_losses(
    config: Config,
    model: ClientModel,
    entity: Tensor,
    state: GlobalModel,
    queries: SoftQueries,
    imputation: Imputation | None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return tau^2 KL(soft labels || softmax(q . h / tau)) on a batch of soft queries, and the proximal term."""
    settings = config.distillation
    picked = torch.randint(len(queries.candidates), (settings.server_batch_size,), generator=generator)
    candidates = queries.candidates[picked]  # [batch, num_candidates]
    rows, position = candidates.unique(return_inverse=True)
    prototypes = state.prototypes
    if prototypes is not None:
        prototypes = PrototypeTable(prototypes.values[:, rows], prototypes.counts[:, rows], prototypes.rounds[:, rows])
    tokens = global_tokens(model, entity[rows], prototypes)
    if imputation is not None:
        imputation = Imputation(imputation.values[:, rows], imputation.uncertainty[:, rows])
    embeddings = model.embed(state.modules, tokens, imputation)  # [num_kinds, num_rows, dim]
    scores = model.scores_of(queries.queries[:, picked], embeddings, position)
    labels = queries.log_labels[picked]
    prediction = torch.log_softmax(scores / settings.temperature, 1)
    logit = settings.temperature**2 * (labels.exp() * (labels - prediction)).sum(1).mean()
    proximal = settings.proximal * (entity - state.entity).square().sum(1).mean()
    return {"server_logit": logit, "server_proximal": proximal}


def _concatenate(soft_queries: list[SoftQueries]) -> SoftQueries | None:
    """Join the soft queries of several clients, cut to the smallest number of candidates."""
    if not soft_queries:
        return None
    width = min(item.candidates.shape[1] for item in soft_queries)
    return SoftQueries(
        torch.cat([item.queries for item in soft_queries], 1),
        torch.cat([item.candidates[:, :width] for item in soft_queries]),
        torch.cat([torch.log_softmax(item.log_labels[:, :width], 1) for item in soft_queries]),
    )
