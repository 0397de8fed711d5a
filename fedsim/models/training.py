"""Local training: epochs of one step, which is a function of a client's values (method.md eq. 8).

The step is written once for all strategies. A strategy says which views are trained and adds a coupling term between
them; it never copies the step.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsim.errors import RunError
from fedsim.models.client_model import ClientModel, ModalityInput, Prototypes
from fedsim.models.imputers import Imputation, TokenTable
from fedsim.models.losses import n3_penalty
from fedsim.models.optimizers import OPTIMIZERS
from fedsim.models.parameters import Params, select_view

GeneratorOf = Callable[[str], torch.Generator]


@dataclass
class ClientValues:
    """All trainable state of a client, as flat dicts of tensors.

    Attributes:
        params: ``relation`` and ``<view>/<name>`` for each view.
        optimizer: see `fedsim.models.optimizers`.
        ema: ``<view>/imputer.*``, the moving average that imputes and is federated.
    """

    params: Params = field(default_factory=dict)
    optimizer: Params = field(default_factory=dict)
    ema: Params = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingInput:
    """What a client trains on; private to it.

    Attributes:
        triples: int64 [num_triples, 3], local ids of head, relation, tail.
        features: modality -> visible features.
        prototypes: those of the server, or None before it sent any.
    """

    triples: Tensor
    features: Mapping[str, ModalityInput]
    prototypes: Prototypes | None


@dataclass(frozen=True)
class Forward:
    """One view's pass over one batch, for the loss terms and the coupling.

    Attributes:
        tokens: the hyper-modal embeddings.
        logits: [num_queries, num_candidates].
        target: int64 [num_queries], column of the true answer.
        losses: the view's own weighted terms.
    """

    tokens: TokenTable
    logits: Tensor
    target: Tensor
    losses: dict[str, Tensor]


Coupling = Callable[[Mapping[str, Forward]], dict[str, Tensor]]


def train_epochs(
    model: ClientModel,
    views: tuple[str, ...],
    values: ClientValues,
    inputs: TrainingInput,
    coupling: Coupling,
    generator_of: GeneratorOf,
) -> dict[str, float]:
    """Train a client's values for `local_epochs` epochs, in place.

    Args:
        model: the model's functions.
        views: views to train.
        values: updated in place.
        inputs: triples, features and prototypes.
        coupling: extra loss terms from the views' passes.
        generator_of: purpose -> generator of this (seed, round, client).

    Returns:
        Mean of each loss term over the steps, and ``total``.
    """
    config = model.config.training
    order = generator_of("batches")
    noise = {view: generator_of(f"noise/{view}") for view in views}
    sums: dict[str, Tensor] = {}
    num_steps = 0
    for _ in range(config.local_epochs):
        hidden = {view: hide_tokens(model, values.params[f"{view}/entity"], noise[view]) for view in views}
        imputations = {view: impute_view(model, values, view, inputs, noise[view], hidden[view]) for view in views}
        permutation = torch.randperm(len(inputs.triples), generator=order)
        for rows in permutation.split(config.batch_size):
            batch = inputs.triples[rows.to(inputs.triples.device)]
            losses = train_step(model, views, values, inputs, batch, hidden, imputations, coupling, noise, order)
            num_steps += 1
            update_ema(values, model.config.diffusion.ema_decay, num_steps)
            for name, loss in losses.items():
                sums[name] = sums.get(name, torch.zeros(())) + loss.detach().cpu()
    means = {name: float(total) / num_steps for name, total in sums.items()}
    return means | {"total": sum(means.values())}


def train_step(
    model: ClientModel,
    views: tuple[str, ...],
    values: ClientValues,
    inputs: TrainingInput,
    batch: Tensor,
    hidden: Mapping[str, Tensor | None],
    imputations: Mapping[str, Imputation | None],
    coupling: Coupling,
    noise: Mapping[str, torch.Generator],
    order: torch.Generator,
) -> dict[str, Tensor]:
    """Take one optimiser step on one batch of triples, int64 [batch, 3]; returns the loss terms."""
    leaves = {name: value.detach().requires_grad_() for name, value in values.params.items()}
    candidates = _sample_candidates(model, batch, leaves, views, order)
    forwards = {
        view: forward_view(model, leaves, view, inputs, batch, hidden[view], imputations[view], candidates, noise[view])
        for view in views
    }
    losses = {f"{view}/{name}": loss for view in views for name, loss in forwards[view].losses.items()}
    losses |= coupling(forwards)
    total = torch.stack(list(losses.values())).sum()
    if not math.isfinite(float(total.detach())):
        bad = [name for name, loss in losses.items() if not bool(torch.isfinite(loss))]
        raise RunError(f"the loss is not finite (terms: {', '.join(bad) or 'sum'}); lower training.learning_rate")
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    with torch.no_grad():
        config = model.config.training
        update = OPTIMIZERS[config.optimizer]
        tables = {name: grad for name, grad in found.items() if is_table(name)}
        modules = {name: grad for name, grad in found.items() if not is_table(name)}
        update(values.params, tables, values.optimizer, config.learning_rate)
        update(values.params, modules, values.optimizer, config.module_learning_rate or config.learning_rate)
    return losses


def is_table(name: str) -> bool:
    """Whether a parameter is an embedding table; the others are weights of shared modules."""
    return name == "relation" or name.endswith("/entity")


def forward_view(
    model: ClientModel,
    params: Params,
    view: str,
    inputs: TrainingInput,
    batch: Tensor,
    hidden: Tensor | None,
    imputation: Imputation | None,
    candidates: Tensor | None,
    generator: torch.Generator,
) -> Forward:
    """Run one view on one batch: tokens, imputation, fusion, queries both ways, logits and loss terms."""
    config = model.config
    own, relations = select_view(params, view), params["relation"]
    tokens = model.tokens(own, inputs.features, inputs.prototypes)
    seen = tokens.without(hidden)
    losses: dict[str, Tensor] = {}
    rows = row_values = None
    if imputation is not None:
        step = model.imputer.training_step(own, tokens, seen, imputation, generator)
        losses |= step.losses
        rows, row_values = step.rows, step.values
    embeddings = model.embed(own, seen, imputation, rows, row_values)
    queries, target = _queries(model, embeddings, relations, batch)
    if config.model.dropout > 0:
        keep = torch.rand(queries.shape, generator=generator).to(queries.device) >= config.model.dropout
        queries = queries * keep / (1 - config.model.dropout)
    if candidates is None:
        logits = model.scores(queries, embeddings)
    else:
        logits = model.scores_of(queries, embeddings, candidates)
        target = torch.zeros_like(target)
    weight = logits.new_full((len(target),), 1 / len(target))
    losses["link"] = model.loss(logits, target, weight, config.training)
    if config.training.n3_weight > 0:
        losses["n3"] = config.training.n3_weight * _n3(model, embeddings, relations, batch)
    return Forward(tokens, logits, target, losses)


def _n3(model: ClientModel, embeddings: Tensor, relations: Tensor, batch: Tensor) -> Tensor:
    """Return the N3 penalty of the batch's triples, with both embeddings of a relation if there are two."""
    head, relation, tail = batch.T
    sides = [relation, relation + relations.shape[1] // 2] if model.config.training.reciprocal else [relation]
    penalties = [
        n3_penalty(
            embeddings[:, head].flatten(0, 1),
            relations[:, side].flatten(0, 1),
            embeddings[:, tail].flatten(0, 1),
            complex_pairs=model.scorer.name == "complex",
        )
        for side in sides
    ]
    return torch.stack(penalties).mean()


def hide_tokens(model: ClientModel, entity: Tensor, generator: torch.Generator) -> Tensor | None:
    """Choose modality tokens that an epoch hides, bool [num_tokens, num_entities]; None if the imputer wants none."""
    if not model.imputes or model.imputer.hide_rate == 0:
        return None
    hidden = torch.rand(model.num_tokens, len(entity), generator=generator) < model.imputer.hide_rate
    hidden[0] = False
    return hidden.to(entity.device)


def impute_view(
    model: ClientModel,
    values: ClientValues,
    view: str,
    inputs: TrainingInput,
    generator: torch.Generator,
    hidden: Tensor | None = None,
) -> Imputation | None:
    """Fill a view's missing tokens with its moving-average imputer, without gradient; None without modalities."""
    if not model.imputes:
        return None
    with torch.no_grad():
        own = select_view(values.params, view) | select_view(values.ema, view)
        tokens = model.tokens(own, inputs.features, inputs.prototypes).without(hidden)
        return model.imputer.impute(own, tokens, generator)


def update_ema(values: ClientValues, decay: float, num_steps: int) -> None:
    """Move the averages; the decay warms up with the steps of this round, or short rounds would freeze them."""
    decay = min(decay, (1 + num_steps) / (10 + num_steps))
    for name, average in values.ema.items():
        average.lerp_(values.params[name], 1 - decay)


def _queries(model: ClientModel, embeddings: Tensor, relations: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Ask for the tails, and for the heads unless `training.corruption` is tail; [num_parts, num_queries, dim]."""
    head, relation, tail = batch.T
    tails = model.queries(embeddings, relations, head, relation, inverse=False)
    if model.config.training.corruption == "tail":
        return tails, tail
    heads = model.queries(embeddings, relations, tail, relation, inverse=True)
    return torch.cat([tails, heads], 1), torch.cat([tail, head])


def _sample_candidates(
    model: ClientModel, batch: Tensor, params: Params, views: tuple[str, ...], generator: torch.Generator
) -> Tensor | None:
    """Draw negatives, the true answer in column 0; int64 [num_queries, 1 + num_negatives]; None to score all."""
    config = model.config.training
    if not model.loss.samples_negatives:
        return None
    head, _, tail = batch.T
    target = tail if config.corruption == "tail" else torch.cat([tail, head])
    num_entities = params[f"{views[0]}/entity"].shape[0]
    negatives = torch.randint(num_entities, (len(target), config.num_negatives), generator=generator)
    return torch.cat([target.unsqueeze(1), negatives.to(target.device)], 1)
