"""The contract of an imputer and the values that pass through it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
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
        prototypes: [num_tokens, num_entities, dim], the server's prototypes of other clients' tokens (eq. 11), or
            zero where there is none.
        has_prototype: bool [num_tokens, num_entities].
    """

    values: Tensor
    available: Tensor
    prototypes: Tensor
    has_prototype: Tensor

    def without(self, hidden: Tensor | None) -> "TokenTable":
        """Hide some more tokens: bool [num_tokens, num_entities]."""
        if hidden is None:
            return self
        return TokenTable(self.values, self.available & ~hidden, self.prototypes, self.has_prototype)

    def detached(self) -> "TokenTable":
        """Cut the gradient: the imputer learns on tokens that it does not move."""
        return TokenTable(self.values.detach(), self.available, self.prototypes, self.has_prototype)


@dataclass(frozen=True)
class Imputation:
    """Values for the missing tokens.

    Attributes:
        values: [num_tokens, num_entities, dim]; only the entries of missing tokens are used.
        uncertainty: [num_tokens, num_entities], standard deviation of the draws, 0 where known or not estimated.
    """

    values: Tensor
    uncertainty: Tensor


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


class Imputer(Protocol):
    """Fills missing tokens. All parameters it has are shared modules, named ``imputer.*``.

    Attributes:
        hide_rate: share of the available modality tokens that training hides, anew each epoch, so that the other
            parts meet imputed tokens of entities whose true ones also shape the model.
    """

    hide_rate: float

    def __init__(self, config: Config, num_tokens: int) -> None:
        """Keep what the functions need; no parameters are held here."""
        ...

    def init(self, generator: torch.Generator) -> Params:
        """Make the initial parameters."""
        ...

    def impute(self, params: Mapping[str, Tensor], tokens: TokenTable, generator: torch.Generator) -> Imputation:
        """Fill the missing tokens without gradient; called once per local epoch and before an evaluation."""
        ...

    def training_step(
        self,
        params: Mapping[str, Tensor],
        tokens: TokenTable,
        seen: TokenTable,
        imputation: Imputation,
        generator: torch.Generator,
    ) -> ImputerStep:
        """Give this step's loss terms, and imputed tokens with gradient if the imputer learns from links.

        Args:
            params: the view's parameters.
            tokens: all that the client has.
            seen: without what this epoch hides; `imputation` fills these.
            imputation: of this epoch.
            generator: of this view and round.
        """
        ...


class FixedImputer:
    """An imputer without parameters and without loss terms."""

    hide_rate = 0.0

    def __init__(self, config: Config, num_tokens: int) -> None:
        """Keep nothing."""

    def init(self, generator: torch.Generator) -> Params:
        """Return no parameters."""
        return {}

    def training_step(
        self,
        params: Mapping[str, Tensor],
        tokens: TokenTable,
        seen: TokenTable,
        imputation: Imputation,
        generator: torch.Generator,
    ) -> ImputerStep:
        """Add nothing."""
        return ImputerStep()
