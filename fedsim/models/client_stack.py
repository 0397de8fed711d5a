"""The clients of a batch as values that a step computes on: one client's own, or those of several, stacked.

Everything that is random is drawn client by client from the client's own generators, in the sizes it would have alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedsim.models.client_model import ClientModel, EntityInput
from fedsim.models.imputers import Draws, Imputation
from fedsim.models.parameters import Params, overwrite, select_view
from fedsim.models.stacking import (
    StackShape,
    first_of,
    mask_padding,
    over_clients,
    pad_stack,
    stack_draws,
    stack_entities,
)
from fedsim.models.step_entities import StepEntities

T = TypeVar("T")
GeneratorOf = Callable[[str], torch.Generator]


@dataclass
class ClientValues:
    """All trainable state of a client, as flat dicts of tensors; of a stack, with a leading clients dimension.

    Attributes:
        params: ``relation`` and ``<view>/<name>`` for each view.
        optimizer: see `fedsim.models.optimizers`.
        ema: ``<view>/imputer.*``, the moving average that imputes and is federated.
        anchors: constants of the round that a strategy asks for, see `Strategy.anchors`; else empty.
    """

    params: Params = field(default_factory=dict)
    optimizer: Params = field(default_factory=dict)
    ema: Params = field(default_factory=dict)
    anchors: Params = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingInput:
    """What a client trains on; private to it.

    Attributes:
        triples: int64 [num_triples, 3], local ids of head, relation, tail.
        entities: features, availability and prototypes.
    """

    triples: Tensor
    entities: EntityInput


@dataclass(frozen=True)
class Member:
    """One client of a batch.

    Attributes:
        name: who takes part in which round, for messages.
        values: updated in place.
        inputs: what it trains on.
        generator_of: purpose -> generator of this (seed, round, client).
    """

    name: str
    values: ClientValues
    inputs: TrainingInput
    generator_of: GeneratorOf

    @property
    def num_entities(self) -> int:
        """Return how many entities the client has."""
        return self.inputs.entities.available.shape[1]

    def without_training(self) -> "Member":
        """Leave out what is of use in training alone: optimiser state and anchors."""
        return replace(self, values=replace(self.values, optimizer={}, anchors={}))


class ClientStack:
    """One client, whose tensors are used as they are, or several, whose tensors are stacked.

    Args:
        model: the model's functions.
        members: the clients.
    """

    def __init__(self, model: ClientModel, members: Sequence[Member]) -> None:
        self.model, self.members = model, tuple(members)
        self.device = members[0].inputs.triples.device
        self.shape: StackShape | None = None
        self.real: Tensor | None = None
        if len(members) == 1:
            self.values, self.entities = members[0].values, members[0].inputs.entities
            return
        reciprocal = model.config.training.reciprocal
        rows = [member.values.params["relation"].shape[1] for member in members]
        self.shape = StackShape(
            tuple(member.num_entities for member in members),
            tuple(size // 2 if reciprocal else size for size in rows),
            reciprocal,
        )
        self.real = self.shape.real().to(self.device)
        self.values = ClientValues(
            self.shape.stack([member.values.params for member in members]),
            self.shape.stack([member.values.optimizer for member in members]),
            self.shape.stack([member.values.ema for member in members]),
            self.shape.stack([member.values.anchors for member in members]),
        )
        self.entities = stack_entities([member.inputs.entities for member in members], self.shape.num_rows)

    def __len__(self) -> int:
        return len(self.members)

    def first(self, num_clients: int) -> "ClientStack":
        """Take the first clients; updates of their values in place are updates of this stack's."""
        if num_clients == len(self):
            return self
        assert self.shape is not None, "there is no part of one client"
        self._spread_counts()
        part = ClientStack.__new__(ClientStack)
        part.model, part.members, part.device = self.model, self.members[:num_clients], self.device
        part.shape = replace(self.shape, num_entities=self.shape.num_entities[:num_clients])
        part.real = first_of(self.real, num_clients)
        part.values = first_of(self.values, num_clients)
        part.entities = first_of(self.entities, num_clients)
        return part

    def write_back(self) -> None:
        """Give each member its values; those of one client have been updated in place."""
        if self.shape is None:
            return
        self._spread_counts()
        for index, member in enumerate(self.members):
            overwrite(member.values.params, self.shape.unstack(self.values.params, index))
            overwrite(member.values.optimizer, self.shape.unstack(self.values.optimizer, index))
            overwrite(member.values.ema, self.shape.unstack(self.values.ema, index))

    def _spread_counts(self) -> None:
        """Give each client its own count of steps; an optimiser starts with one for all."""
        for name, value in self.values.optimizer.items():
            if value.dim() == 0:
                self.values.optimizer[name] = value.repeat(len(self))

    def apply(self, function: Callable[..., T], *arguments: Any) -> T:
        """Apply a function of one client's tensors to each client."""
        return function(*arguments) if self.shape is None else over_clients(function, *arguments)

    def join(self, draws: Sequence[Draws], entities: StepEntities | None = None) -> Draws:
        """Join what was drawn for each client.

        Args:
            draws: of each client.
            entities: what their rows number; None for all that the clients have.
        """
        if self.shape is None:
            joined = draws[0]
        else:
            joined = stack_draws(draws, (entities.known if entities else self.entities).available.shape[-1])
        return {name: value.to(self.device) for name, value in joined.items()}

    def all_entities(self) -> StepEntities:
        """Return all entities, for a step that uses them all."""
        return StepEntities(self.entities)

    def some_entities(self, rows: Sequence[Tensor], linked: Sequence[Tensor]) -> StepEntities:
        """Return some entities of each client.

        Args:
            rows: of each client, int64 [num_rows].
            linked: which of them links are about, bool [num_rows].
        """
        modalities = list(self.model.feature_dims)
        taken = [member.inputs.entities.take(own, modalities) for member, own in zip(self.members, rows, strict=True)]
        if self.shape is None:
            return StepEntities(taken[0], rows[0], linked[0])
        num_rows = max(map(len, rows)) + 1
        padded = pad_stack(rows, (num_rows,), value=self.shape.num_rows - 1)
        return StepEntities(stack_entities(taken, num_rows), padded, pad_stack(linked, (num_rows,)))

    def pad(self, tensors: Sequence[Tensor]) -> Tensor:
        """Join one tensor of each client, padded with zeros."""
        joined = tensors[0] if self.shape is None else pad_stack(tensors)
        return joined.to(self.device)

    def mask(self, logits: Tensor) -> Tensor:
        """Put padded entities below all others, in place; logits over all entities, [..., num_queries, num_rows]."""
        return logits if self.shape is None else mask_padding(logits, self.shape.num_entities)

    def part_of(self, tree: T) -> T:
        """Cut a tree of the whole stack down to this part of it."""
        return tree if self.shape is None else first_of(tree, len(self))

    def view(self, view: str) -> Params:
        """Return a view's parameters with the averaged imputer, by which it imputes and is evaluated."""
        return select_view(self.values.params, view) | select_view(self.values.ema, view)

    def impute(
        self, view: str, generators: Sequence[torch.Generator], hidden: Sequence[Tensor | None] | None = None
    ) -> Imputation | None:
        """Fill a view's missing tokens, without gradient; None without modalities.

        Args:
            view: the view.
            generators: of each client.
            hidden: tokens of each client that are missing too, bool [num_tokens, num_entities].
        """
        if not self.model.imputes:
            return None
        hidden = hidden if hidden is not None else [None] * len(self)
        available = [
            _seen(member.inputs.entities.available, also) for member, also in zip(self.members, hidden, strict=True)
        ]
        draws = [
            self.model.imputer.draw_imputation(mask.cpu(), generator)
            for mask, generator in zip(available, generators, strict=True)
        ]
        with torch.no_grad():
            return self.apply(
                self._impute, self.view(view), self.entities, self.hidden_tokens(hidden), self.join(draws)
            )

    def split(self, imputation: Imputation | None) -> list[Imputation | None]:
        """Divide an imputation among the clients, in their own sizes."""
        if imputation is None or self.shape is None:
            return [imputation] * len(self)
        return [
            Imputation(values[:, :size].clone(), uncertainty[:, :size].clone())
            for values, uncertainty, size in zip(
                imputation.values, imputation.uncertainty, self.shape.num_entities, strict=True
            )
        ]

    def embed(self, view: str, imputation: Imputation | None) -> Tensor:
        """Embed all entities under a view, without gradient, [..., num_kinds, num_entities, dim]."""
        with torch.no_grad():
            return self.apply(self._embed, self.view(view), self.entities, imputation)

    def hidden_tokens(self, hidden: Sequence[Tensor | None]) -> Tensor | None:
        """Join hidden tokens, bool [..., num_tokens, num_entities]."""
        found = [item for item in hidden if item is not None]
        if not found:
            return None
        if self.shape is None:
            return found[0].to(self.device)
        return pad_stack(found, (len(found[0]), self.entities.available.shape[-1])).to(self.device)

    def _impute(
        self, params: Mapping[str, Tensor], entities: EntityInput, hidden: Tensor | None, draws: Draws
    ) -> Imputation:
        tokens = self.model.tokens(params, entities).without(hidden)
        return self.model.imputer.impute(params, tokens, draws).of_missing(tokens.available)

    def _embed(self, params: Mapping[str, Tensor], entities: EntityInput, imputation: Imputation | None) -> Tensor:
        return self.model.embed(params, self.model.tokens(params, entities), imputation)


def _seen(available: Tensor, hidden: Tensor | None) -> Tensor:
    return available if hidden is None else available & ~hidden.to(available.device)
