"""Local training: epochs of one step, which is a function of clients' values (method.md eq. 8).

The step is written once for all strategies, and once for a client alone and for clients that are stacked. A strategy
says which views are trained and adds a coupling term between them; it never copies the step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.errors import RunError
from fedsim.evaluation.ranking import FilterIndex
from fedsim.models.client_model import ClientModel, EntityInput
from fedsim.models.client_stack import ClientStack, ClientValues, Member
from fedsim.models.imputers import Draws, Imputation, TokenTable
from fedsim.models.losses import n3_penalty
from fedsim.models.negatives import candidate_scores, draw_negatives, known_answers, redraw_known
from fedsim.models.optimizers import OPTIMIZERS
from fedsim.models.parameters import Params, select_view, take_rows
from fedsim.models.steps import Batch, Coupling, Forward, Step
from fedsim.models.used_rows import cut_down


@dataclass(frozen=True)
class _Epoch:
    """One epoch's draws and imputations.

    Attributes:
        rows: of each client, its batches as rows of its triples.
        hidden: view -> modality tokens that each client hides from itself, bool [num_tokens, num_entities].
        imputations: view -> imputed tokens of all clients.
        known: of each client, the answers that are no negatives, where those are filtered.
    """

    rows: list[tuple[Tensor, ...]]
    hidden: dict[str, list[Tensor | None]]
    imputations: dict[str, Imputation | None]
    known: list[FilterIndex | None]

    def num_active(self, step: int) -> int:
        """Return how many clients have a batch for a step; they are the first ones."""
        return sum(len(batches) > step for batches in self.rows)


def train_epochs(
    model: ClientModel,
    views: tuple[str, ...],
    members: Sequence[Member],
    coupling: Coupling,
    relation_views: tuple[str, ...] | None = None,
) -> list[dict[str, float]]:
    """Train the clients of a batch for `local_epochs` epochs; their values are updated in place.

    Args:
        model: the model's functions.
        views: views to train.
        members: the clients; several are stacked and take their steps together.
        coupling: the strategy's own loss terms.
        relation_views: views whose loss trains the relation table that all share; None for all.

    Returns:
        For each member, the mean of each loss term over its steps, and ``total``.

    Raises:
        RunError: if a loss is not finite, naming the client and the terms.
    """
    if model.config.training.local_epochs == 0:
        return [{"total": 0.0} for _ in members]
    # Clients with the most batches first: those that still have some are always the first ones.
    order = sorted(range(len(members)), key=lambda index: -len(members[index].inputs.triples))
    stack = ClientStack(model, [members[index] for index in order])
    shuffles = [member.generator_of("batches") for member in stack.members]
    noise = {view: [member.generator_of(f"noise/{view}") for member in stack.members] for view in views}
    # Dropout has draws of its own, the same whatever the imputer draws: methods are compared on equal terms.
    dropout = {view: [member.generator_of(f"dropout/{view}") for member in stack.members] for view in views}
    sums: dict[str, Tensor] = {}
    num_steps = torch.zeros(len(stack), dtype=torch.int64)
    epoch: _Epoch | None = None
    part = stack
    for _ in range(model.config.training.local_epochs):
        epoch = _start_epoch(stack, views, shuffles, noise, epoch)
        for step in range(len(epoch.rows[0])):
            if epoch.num_active(step) != len(part):
                part = stack.first(epoch.num_active(step))
            batch = _draw_batch(part, epoch, step, shuffles, noise, dropout)
            losses = train_step(part, views, batch, epoch, coupling, relation_views)
            assert part.values.optimizer.keys() == stack.values.optimizer.keys(), "a first step is one of all clients"
            num_steps[: len(part)] += 1
            update_ema(part.values, model.config.diffusion.ema_decay, num_steps[: len(part)].tolist())
            for name, loss in losses.items():
                total = sums.setdefault(name, torch.zeros(len(stack), device=stack.device))
                total[: len(part)] += loss.detach().reshape(-1)
    stack.write_back()
    means = {name: (total.cpu() / num_steps).tolist() for name, total in sums.items()}
    results: list[dict[str, float]] = [{} for _ in members]
    for place, index in enumerate(order):
        own = {name: values[place] for name, values in means.items()}
        results[index] = own | {"total": sum(own.values())}
    return results


def _start_epoch(
    stack: ClientStack,
    views: tuple[str, ...],
    shuffles: Sequence[torch.Generator],
    noise: Mapping[str, Sequence[torch.Generator]],
    previous: _Epoch | None,
) -> _Epoch:
    """Hide tokens, impute (or keep the previous epoch's imputation), and shuffle the triples."""
    hidden = {
        view: [
            hide_tokens(stack.model, member.num_entities, draws)
            for member, draws in zip(stack.members, noise[view], strict=True)
        ]
        for view in views
    }
    imputer = stack.model.imputer
    if previous is None or imputer.each_epoch or imputer.hide_rate > 0:  # what is hidden changes by epoch
        imputations = {view: stack.impute(view, noise[view], hidden[view]) for view in views}
    else:
        imputations = previous.imputations
    rows = [
        torch.randperm(len(member.inputs.triples), generator=shuffle).split(stack.model.config.training.batch_size)
        for member, shuffle in zip(stack.members, shuffles, strict=True)
    ]
    config = stack.model.config.training
    known = previous.known if previous else [known_answers(config, own.inputs.triples) for own in stack.members]
    return _Epoch(rows, hidden, imputations, known)


def hide_tokens(model: ClientModel, num_entities: int, generator: torch.Generator) -> Tensor | None:
    """Choose modality tokens that an epoch hides, bool [num_tokens, num_entities]; None if the imputer wants none."""
    if not model.imputes or model.imputer.hide_rate == 0:
        return None
    hidden = torch.rand(model.num_tokens, num_entities, generator=generator) < model.imputer.hide_rate
    hidden[0] = False
    return hidden


def _draw_batch(
    stack: ClientStack,
    epoch: _Epoch,
    step: int,
    shuffles: Sequence[torch.Generator],
    noise: Mapping[str, Sequence[torch.Generator]],
    dropout: Mapping[str, Sequence[torch.Generator]],
) -> Batch:
    """Draw a step's batch, negatives, noise and dropout, client by client."""
    model = stack.model
    triples, weights, negatives = [], [], []
    num_sides = 1 if model.config.training.corruption == "tail" else 2
    for member, batches, known, shuffle in zip(stack.members, epoch.rows, epoch.known, shuffles, strict=False):
        rows = batches[step]
        own = member.inputs.triples[rows.to(stack.device)]
        triples.append(own)
        weights.append(torch.full((num_sides, len(rows)), 1 / (num_sides * len(rows))))
        if model.loss.samples_negatives:
            shape = (num_sides, len(rows))
            drawn = draw_negatives(model.config.training, shape, member.num_entities, shuffle)
            if known is not None:
                drawn = redraw_known(drawn, own, known, member.num_entities, shuffle)
            negatives.append(drawn)
    draws, keep = {}, {}
    for view in noise:
        if model.imputes:
            members = zip(stack.members, epoch.hidden[view], noise[view], strict=False)
            draws[view] = [_draw_step(model, *member) for member in members]
        if model.config.model.dropout > 0:
            kept = [
                torch.rand(model.num_parts, num_sides, sides.shape[1], model.dim, generator=generator)
                >= model.config.model.dropout
                for generator, sides in zip(dropout[view], weights, strict=False)
            ]
            keep[view] = stack.pad(kept).flatten(-3, -2)
    entities = stack.all_entities()
    if negatives and model.config.training.negatives == "shared":
        entities, triples, negatives, draws = cut_down(stack, triples, negatives, draws)
    return Batch(
        entities,
        stack.pad(triples),
        stack.pad(weights).flatten(-2),
        stack.pad(negatives).flatten(-3, -2) if negatives else None,
        {view: stack.join(own, entities) for view, own in draws.items()},
        keep,
    )


def _draw_step(model: ClientModel, member: Member, hidden: Tensor | None, generator: torch.Generator) -> Draws:
    available = member.inputs.entities.available.cpu()
    return model.imputer.draw_step(available, available if hidden is None else available & ~hidden, generator)


def train_step(
    stack: ClientStack,
    views: tuple[str, ...],
    batch: Batch,
    epoch: _Epoch,
    coupling: Coupling,
    relation_views: tuple[str, ...] | None = None,
) -> dict[str, Tensor]:
    """Take one optimiser step; returns the loss terms, [...]. RunError if one is not finite."""
    values = stack.values
    leaves = {name: value.detach().requires_grad_() for name, value in values.params.items()}
    constant = leaves | {"relation": values.params["relation"]}
    forwards = {
        view: forward_view(
            stack,
            leaves if relation_views is None or view in relation_views else constant,
            view,
            batch,
            epoch.hidden[view],
            epoch.imputations[view],
        )
        for view in views
    }
    losses = {f"{view}/{name}": loss for view in views for name, loss in forwards[view].losses.items()}
    losses |= coupling(Step(forwards, leaves, values.anchors, stack.real, stack.apply))
    # The clients of a stack share no parameter, so the sum's gradient is that of each client's own loss.
    total = torch.stack([loss.sum() for loss in losses.values()]).sum()
    if not math.isfinite(float(total.detach())):
        raise RunError(_name_non_finite(stack, losses))
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    with torch.no_grad():
        config = stack.model.config.training
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
    stack: ClientStack,
    params: Params,
    view: str,
    batch: Batch,
    hidden: Sequence[Tensor | None],
    imputation: Imputation | None,
) -> Forward:
    """Run one view on one batch: tokens, imputation, fusion, queries both ways, logits and loss terms."""
    model, config = stack.model, stack.model.config
    relations, entities = params["relation"], batch.entities
    passed = stack.apply(
        lambda *arguments: _embed_view(model, *arguments),
        entities.of_params(select_view(params, view)),
        entities.known,
        entities.of_hidden(stack.hidden_tokens(hidden[: len(stack)])),
        entities.of_imputation(stack.part_of(imputation)),
        batch.draws.get(view, {}),
    )
    losses, embeddings = dict(passed.losses), passed.embeddings
    target, dropped = _answers(model, batch.triples), None
    if batch.negatives is not None and model.loss.drops_answers:
        dropped = batch.negatives == target.unsqueeze(-1)
    queries = _queries(model, embeddings, relations, batch.triples)
    if view in batch.keep:
        queries = queries * batch.keep[view] / (1 - config.model.dropout)
    if batch.negatives is None:
        scores = model.part_scores(queries, embeddings)
    else:
        scores = candidate_scores(model, queries, embeddings, target, batch.negatives, dropped)
        target = torch.zeros_like(target)
    logits, losses["link"] = _link(stack, scores, target, batch)
    if config.training.n3_weight > 0:
        losses["n3"] = config.training.n3_weight * _n3(model, embeddings, relations, batch)
    return Forward(TokenTable(passed.tokens, entities.compared), logits, target, batch.weight, losses)


def _link(stack: ClientStack, scores: Tensor, target: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits of the queries, [..., num_queries, num_candidates], and their link loss, [...].

    Args:
        stack: the clients.
        scores: of each query vector, [..., num_parts, num_queries, num_candidates].
        target: column of the true answer, int64 [..., num_queries].
        batch: for weights, and whether the candidates are all entities.
    """
    model, weight, num_parts = stack.model, batch.weight, scores.shape[-3]
    if apart := model.fusion.trains_apart:  # each query vector is a query of its own, the loss the mean over them
        rows = scores.flatten(-3, -2)
        target, weight = torch.cat([target] * num_parts, -1), torch.cat([weight / num_parts] * num_parts, -1)
    else:
        rows = model.plan.join(scores)
    if batch.negatives is None:
        rows = stack.mask(rows)
    loss = model.loss(rows, target, weight, model.config.training, stack.real if batch.negatives is None else None)
    return model.plan.join(rows.unflatten(-2, (num_parts, -1))) if apart else rows, loss


@dataclass(frozen=True)
class _Pass:
    """One client's embeddings under a view, and the imputer's loss terms."""

    tokens: Tensor  # [num_tokens, num_entities, dim]
    embeddings: Tensor  # [num_kinds, num_entities, dim]
    losses: dict[str, Tensor]


def _embed_view(
    model: ClientModel,
    params: Mapping[str, Tensor],
    entities: EntityInput,
    hidden: Tensor | None,
    imputation: Imputation | None,
    draws: Draws,
) -> _Pass:
    """Compute what a step needs of a client's entities."""
    tokens = model.tokens(params, entities)
    if imputation is None:
        return _Pass(tokens.values, model.embed(params, tokens, None), {})
    seen = tokens.without(hidden)
    step = model.imputer.training_step(params, tokens, seen, imputation, draws)
    return _Pass(tokens.values, model.embed(params, seen, imputation, step.rows, step.values), step.losses)


def _n3(model: ClientModel, embeddings: Tensor, relations: Tensor, batch: Batch) -> Tensor:
    """Return the N3 penalty of the batch's triples, with both embeddings of a relation if there are two, [...]."""
    head, relation, tail = batch.triples.unbind(-1)
    weight = batch.weight[..., : head.shape[-1]]
    weight = weight / weight.sum(-1, keepdim=True)
    sides = [relation, relation + relations.shape[-2] // 2] if model.config.training.reciprocal else [relation]
    penalties = [
        n3_penalty(
            take_rows(embeddings, head),
            take_rows(relations, side),
            take_rows(embeddings, tail),
            complex_pairs=model.scorer.name == "complex",
        )
        for side in sides
    ]  # [..., num_parts, batch] each
    return (torch.stack(penalties).mean(0).mean(-2) * weight).sum(-1)


def update_ema(values: ClientValues, decay: float, num_steps: Sequence[int]) -> None:
    """Move the averages; the decay warms up with each client's steps of this round, or short rounds would freeze them.

    Args:
        values: of a client, or of stacked clients.
        decay: in the long run.
        num_steps: of each client, so far.
    """
    decays = [min(decay, (1 + steps) / (10 + steps)) for steps in num_steps]
    for name, average in values.ema.items():
        if min(decays) == max(decays):
            average.lerp_(values.params[name], 1 - decays[0])
        else:
            for own, value, rate in zip(average, values.params[name], decays, strict=True):
                own.lerp_(value, 1 - rate)


def _queries(model: ClientModel, embeddings: Tensor, relations: Tensor, triples: Tensor) -> Tensor:
    """Ask for the tails, and for the heads unless `training.corruption` is tail; [..., num_parts, num_queries, dim]."""
    head, relation, tail = triples.unbind(-1)
    tails = model.queries(embeddings, relations, head, relation, inverse=False)
    if model.config.training.corruption == "tail":
        return tails
    heads = model.queries(embeddings, relations, tail, relation, inverse=True)
    return torch.cat([tails, heads], -2)


def _answers(model: ClientModel, triples: Tensor) -> Tensor:
    """Return the true answers of `_queries`, int64 [..., num_queries]."""
    head, _, tail = triples.unbind(-1)
    return tail if model.config.training.corruption == "tail" else torch.cat([tail, head], -1)


def _name_non_finite(stack: ClientStack, losses: Mapping[str, Tensor]) -> str:
    """Say which client's loss is not finite, and which terms."""
    finite = {name: torch.isfinite(loss.detach()).reshape(-1).tolist() for name, loss in losses.items()}
    for place, member in enumerate(stack.members):
        bad = [name for name, values in finite.items() if not values[place]]
        if bad:
            return f"{member.name}: the loss is not finite (terms: {', '.join(bad)}); lower training.learning_rate"
    return f"{stack.members[0].name}: the sum of all losses is not finite; lower training.learning_rate"
