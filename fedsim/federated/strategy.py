"""The contract of a federation strategy, and the registry.

A strategy says which views of the model a client trains, what couples them, what a client sends besides rows and
modules, and what the server distils. The client and server loops and the training step are written once.

To add one: write a file with a class that extends `Strategy`, and add a line to `STRATEGIES` in
`fedsim/federated/__init__.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.federated.messages import PrototypeTable, SoftQueries
from fedsim.models.client_model import ClientModel
from fedsim.models.client_stack import ClientValues, TrainingInput
from fedsim.models.parameters import Params
from fedsim.models.training import Forward


@dataclass(frozen=True)
class Extras:
    """What a client sends besides its rows and modules; see `ClientUpdate`."""

    token_present: Tensor | None = None
    tokens: Tensor | None = None
    soft_queries: SoftQueries | None = None


@dataclass(frozen=True)
class GlobalModel:
    """The server's model after aggregation; a strategy's distillation turns one into another.

    Attributes:
        entity: G, [num_entities, dim].
        modules: shared modules.
        prototypes: or None if no client ever sent tokens.
    """

    entity: Tensor
    modules: Params
    prototypes: PrototypeTable | None


class Strategy:
    """Defaults: one view that the server's broadcast starts anew each round, no coupling, no distillation.

    Attributes:
        views: views of the model that a client trains; ``global`` is federated, ``local`` never leaves.
        federated: whether clients and server exchange anything.
        together: whether all data is put at one client (central training).
        sends_prototypes: whether clients send projected tokens.
    """

    views: tuple[str, ...] = ("global",)
    federated: bool = True
    together: bool = False

    def __init__(self, config: Config) -> None:
        """Keep the experiment's config."""
        self.config = config

    @property
    def sends_prototypes(self) -> bool:
        """Whether clients send projected tokens and the server prototypes."""
        return False

    @property
    def sends_soft_queries(self) -> bool:
        """Whether clients send soft queries."""
        return False

    def couple(self, round_num: int, forwards: Mapping[str, Forward]) -> dict[str, Tensor]:
        """Return loss terms between the views of one step."""
        return {}

    def extras(
        self,
        model: ClientModel,
        values: ClientValues,
        inputs: TrainingInput,
        entity_ids: Tensor,
        tables: Callable[[], Mapping[str, Tensor]],
        generator: torch.Generator,
    ) -> Extras:
        """Return what a client sends besides rows and modules."""
        return Extras()

    def distil(
        self, model: ClientModel, state: GlobalModel, soft_queries: list[SoftQueries], generator: torch.Generator
    ) -> tuple[GlobalModel, dict[str, float]]:
        """Improve the aggregated global model; returns it and the mean loss terms."""
        return state, {}
