"""The contract of an imputer and the values that pass through it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.models.parameters import Params


@dataclass(frozen=True)
class TokenTable:
    """The hyper-modal embeddings of a client's entities (eq. 4), before imputation.

    Attributes:
        values: [num_tokens, num_entities, dim], zero where a token is missing; structure is token 0.
        available: bool [num_tokens, num_entities], o_m(e); structure is always available.
        prototypes: [num_tokens, num_entities, dim], the server's prototypes of other clients' tokens (eq. 11), zero
            where there is none; None if the server has sent none at all.
        has_prototype: bool [num_tokens, num_entities]; None with them.
    """

    values: Tensor
    available: Tensor
    prototypes: Tensor | None = None
    has_prototype: Tensor | None = None

    def without(self, hidden: Tensor | None) -> "TokenTable":
        """Hide some more tokens: bool [num_tokens, num_entities]."""
        if hidden is None:
            return self
        available = self.available & ~hidden
        return replace(self, values=self.values * available.unsqueeze(-1), available=available)

    def detached(self) -> "TokenTable":
        """Cut the gradient: the imputer learns on tokens that it does not move."""
        return replace(self, values=self.values.detach())

    def means(self) -> Tensor:
        """Average the available tokens of each kind, without gradient, [num_tokens, dim]; zero where there is none."""
        weight = self.available.to(self.values.dtype).unsqueeze(-1)  # [num_tokens, num_entities, 1]
        return (self.values.detach() * weight).sum(1) / weight.sum(1).clamp(min=1)

    def take(self, rows: Tensor) -> "TokenTable":
        """Take the tokens of some entities, int64 [num_rows]."""
        return TokenTable(
            self.values[:, rows],
            self.available[:, rows],
            None if self.prototypes is None else self.prototypes[:, rows],
            None if self.has_prototype is None else self.has_prototype[:, rows],
        )


@dataclass(frozen=True)
class Imputation:
    """Values for the missing tokens.

    Attributes:
        values: [num_tokens, num_entities, dim]; zero where a token is available, see `of_missing`.
        uncertainty: [num_tokens, num_entities], standard deviation of the draws, 0 where known or not estimated.
    """

    values: Tensor
    uncertainty: Tensor

    def of_missing(self, available: Tensor) -> "Imputation":
        """Keep the entries of missing tokens; `available` is bool [num_tokens, num_entities]."""
        return replace(self, values=self.values.masked_fill(available.unsqueeze(-1), 0.0))

    @staticmethod
    def of_draws(tokens: TokenTable, rows: Tensor, samples: Tensor) -> "Imputation":
        """Sum up several draws: their mean is the value, their deviation over draws and dimensions the uncertainty.

        Args:
            tokens: of all entities.
            rows: int64 [num_rows], the entities that were drawn.
            samples: [num_tokens, num_draws, num_rows, dim], without gradient.
        """
        mean = samples.mean(1)
        deviation = (samples - mean.unsqueeze(1)).square().mean((1, -1)).sqrt()
        values = torch.zeros_like(tokens.values).index_copy(1, rows, mean)
        uncertainty = torch.zeros_like(tokens.values[..., 0]).index_copy(1, rows, deviation)
        return Imputation(values, uncertainty * (~tokens.available))


@dataclass(frozen=True)
class ImputerStep:
    """What an imputer adds to one training step.

    Attributes:
        losses: weighted loss terms, by name.
        rows: int64 [num_rows], entities whose imputed tokens are replaced by `values` in this step.
        values: [num_tokens, num_rows, dim], with gradient to the imputer.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None
    values: Tensor | None = None


Draws = dict[str, Tensor]
"""Random draws that a computation takes as an input, so that it is a function of values and can be stacked over
clients. Entity rows are named ``rows`` or ``..._rows``; draws for all entities ``entity_...``, [n, num_entities, ...].
"""


class Imputer(Protocol):
    """Fills missing tokens. All parameters it has are shared modules, named ``imputer.*``.

    What is random is drawn first, from what is available alone; what is computed then is a function of tensors without
    a branch on their values.

    Attributes:
        hide_rate: share of the available modality tokens that training hides, anew each epoch, so that the other
            parts meet imputed tokens of entities whose true ones also shape the model.
        each_epoch: whether each local epoch imputes anew; else the first one's imputation serves the whole round,
            unless training hides tokens.
    """

    hide_rate: float
    each_epoch: bool

    def __init__(self, config: Config, num_tokens: int) -> None:
        """Keep what the functions need; no parameters are held here."""
        ...

    def init(self, generator: torch.Generator) -> Params:
        """Make the initial parameters."""
        ...

    def draw_imputation(self, available: Tensor, generator: torch.Generator) -> Draws:
        """Draw what `impute` needs for tokens of this availability, bool [num_tokens, num_entities]."""
        ...

    def impute(self, params: Mapping[str, Tensor], tokens: TokenTable, draws: Draws) -> Imputation:
        """Fill the missing tokens without gradient; called once per local epoch (or round) and before an evaluation.

        What it gives for available tokens is not used.
        """
        ...

    def draw_step(self, available: Tensor, seen: Tensor, generator: torch.Generator) -> Draws:
        """Draw what `training_step` needs.

        Args:
            available: of all that the client has, bool [num_tokens, num_entities].
            seen: of what this epoch does not hide, the same shape.
            generator: of this view and round.
        """
        ...

    def training_step(
        self,
        params: Mapping[str, Tensor],
        tokens: TokenTable,
        seen: TokenTable,
        imputation: Imputation,
        draws: Draws,
    ) -> ImputerStep:
        """Give this step's loss terms, and imputed tokens with gradient if the imputer learns from links.

        Args:
            params: the view's parameters.
            tokens: all that the client has.
            seen: without what this epoch hides; `imputation` fills these.
            imputation: of this epoch.
            draws: from `draw_step`.
        """
        ...


class FixedImputer:
    """An imputer without parameters and without loss terms."""

    hide_rate = 0.0
    each_epoch = True

    def __init__(self, config: Config, num_tokens: int) -> None:
        """Keep nothing."""

    def init(self, generator: torch.Generator) -> Params:
        """Return no parameters."""
        return {}

    def draw_imputation(self, available: Tensor, generator: torch.Generator) -> Draws:
        """Draw nothing."""
        return {}

    def draw_step(self, available: Tensor, seen: Tensor, generator: torch.Generator) -> Draws:
        """Draw nothing."""
        return {}

    def training_step(
        self,
        params: Mapping[str, Tensor],
        tokens: TokenTable,
        seen: TokenTable,
        imputation: Imputation,
        draws: Draws,
    ) -> ImputerStep:
        """Add nothing."""
        return ImputerStep()
