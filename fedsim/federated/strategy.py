"""The contract of a federation strategy, and the registry.

A strategy says which views of the model a client trains, what it adds to their loss, which rows are shared, what a
client sends besides rows and modules, and what the server makes of it. The client and server loops and the training
step are written once.

To add one: write a file with a class that extends `Strategy`, and add a line to `STRATEGIES` in
`fedsim/federated/__init__.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.data.clients import ClientData, Ids
from fedsim.errors import ConfigError
from fedsim.federated.messages import PrototypeTable, SoftQueries
from fedsim.models.client_model import ClientModel
from fedsim.models.client_stack import ClientValues, TrainingInput
from fedsim.models.parameters import Params
from fedsim.models.steps import Step


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
        entity: G, [num_entities, dim]; with `Strategy.shares` relation, [num_relations, width].
        modules: shared modules.
        prototypes: or None if no client ever sent tokens.
    """

    entity: Tensor
    modules: Params
    prototypes: PrototypeTable | None


Anchor = Literal["received", "previous"]


class Strategy:
    """Defaults: one view that the server's broadcast starts anew each round, entity rows shared, no terms of its own.

    Attributes:
        views: views of the model that a client trains; ``global`` is federated, ``local`` never leaves.
        combinations: with two views, weights of the global copy's scores beside the private model's, of which a client
            chooses on its validation triples; its first weight is the middle one.
        federated: whether clients and server exchange anything.
        together: whether all data is put at one client (central training).
        shares: what the rows that cross belong to; embeddings of the other kind never leave a client.
        keeps_rows: whether the server keeps each client's rows, and sends each a table of its own.
        anchors: constants of the round that `couple` asks for, copied for it alone: ``received/<name>``, the federated
            parameters as the server sent them, and ``previous/entity``, the client's own rows after its last training
            (those received, before its first).
    """

    views: tuple[str, ...] = ("global",)
    combinations: tuple[float, ...] = ()
    federated: bool = True
    together: bool = False
    shares: Literal["entity", "relation"] = "entity"
    keeps_rows: bool = False
    anchors: tuple[Anchor, ...] = ()

    def __init__(self, config: Config) -> None:
        """Keep the experiment's config.

        Raises:
            ConfigError: if clients are to be ranked with rows that they are never sent.
        """
        self.config = config
        if self.federated and config.evaluation.on_aggregated and config.communication.top_k is not None:
            raise ConfigError(
                "config field 'evaluation.evaluate_on' = 'aggregated' (which protocol fede implies) ranks with all "
                "aggregated rows, but communication.top_k sends a share of them: set evaluate_on to trained, or "
                "top_k to null"
            )

    @property
    def sends_prototypes(self) -> bool:
        """Whether clients send projected tokens and the server prototypes."""
        return False

    @property
    def sends_soft_queries(self) -> bool:
        """Whether clients send soft queries."""
        return False

    @property
    def relation_views(self) -> tuple[str, ...] | None:
        """Views whose loss trains the relation table that all share; None for all."""
        return None

    def is_shared(self, name: str) -> bool:
        """Tell whether a parameter is the server's at the start of each round."""
        return name.startswith("global/")

    def shared_ids(self, data: ClientData) -> Ids:
        """Return the global ids of the rows that a client shares, sorted."""
        return data.entity_ids

    def init_rows(self, model: ClientModel, num_rows: int, generator: torch.Generator) -> Tensor:
        """Draw the server's first table, [num_rows, width]."""
        return model.init_entities(num_rows, generator)

    def shared_rows(self, params: Params) -> Tensor | None:
        """Take the rows that are shared out of a client's parameters, [num_rows, width]; None if there are none yet."""
        return params.get("global/entity")

    def place_rows(self, arrived: Params, params: Params) -> Params:
        """Return the parameters of a view that arrived; what belongs to no view goes into a client's parameters."""
        return arrived

    def personal_rows(self, ownership: Mapping[int, Tensor], rows: Mapping[int, Tensor]) -> dict[int, Tensor] | None:
        """Make each client's own table of the clients' last rows; None to send all of them the same."""
        return None

    def couple(self, round_num: int, step: Step) -> dict[str, Tensor]:
        """Return the strategy's own loss terms of one step, [...] each."""
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
