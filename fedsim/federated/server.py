"""The server side: streaming aggregation and distillation (method.md eq. 3, 11 to 13)."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.errors import RunError
from fedsim.federated.aggregation import ModuleMean, RowMean, check_range
from fedsim.federated.messages import (
    Broadcast,
    ClientHello,
    ClientUpdate,
    PrototypeTable,
    SoftQueries,
    check_finite,
)
from fedsim.federated.strategy import GlobalModel, Strategy
from fedsim.models.client_model import ClientModel
from fedsim.models.parameters import Params, select_view, with_prefix
from fedsim.randomness import torch_generator


@dataclass(frozen=True)
class ServerReport:
    """What the driver learns of the server's round.

    Attributes:
        losses: mean terms of the distillation.
        num_updates: clients whose update is in the sum.
        aggregate_seconds: of receiving and summing.
        distil_seconds: of the distillation.
    """

    losses: dict[str, float]
    num_updates: int
    aggregate_seconds: float
    distil_seconds: float


class Server:
    """Holds the global model; knows entity ids, ownership and sizes, and nothing else of the clients.

    Args:
        config: the experiment.
        strategy: says what is distilled.
        num_entities: size of the global id space.
        feature_dims: modality -> width of its features.
    """

    def __init__(self, config: Config, strategy: Strategy, num_entities: int, feature_dims: Mapping[str, int]) -> None:
        self.config, self.strategy = config, strategy
        self.model = ClientModel(config, feature_dims)
        generator = torch_generator(config.seed, "init/global")
        entity = self.model.init_entities(num_entities, generator)
        self.global_model = GlobalModel(entity, self.model.init_modules(generator), None)
        self.ownership: dict[int, Tensor] = {}
        self.num_triples: dict[int, int] = {}
        self._open_round(0)

    def register(self, hello: ClientHello) -> None:
        """Learn what a client owns."""
        self.ownership[hello.client] = hello.entity_ids
        self.num_triples[hello.client] = hello.num_triples

    def begin_round(self, round_num: int) -> Broadcast:
        """Open a round and publish the global model."""
        self._open_round(round_num)
        model = self.global_model
        return Broadcast(round_num, model.entity, model.modules, model.prototypes)

    def receive(self, update: ClientUpdate) -> None:
        """Add one client's update to the sums, in any order; memory does not grow with the cohort.

        Raises:
            RunError: if the update is of another round, of rows that the client does not own, came twice, or holds
                a value that is not finite or too large. The sums are not touched then.
        """
        started = time.perf_counter()
        who = f"client {update.client}, round {update.round_num}"
        if update.round_num != self.round_num:
            raise RunError(f"{who}: the update is stale, the server is in round {self.round_num}")
        if update.client in self.received:
            raise RunError(f"{who}: a second update in the same round")
        if update.client not in self.ownership:
            raise RunError(f"{who}: an update of a client that is not registered")
        if not torch.equal(update.entity_ids, self.ownership[update.client]):
            raise RunError(f"{who}: the update has rows of entities that the client does not own")
        bad = check_finite(update)
        if bad is not None:
            raise RunError(f"{who}: '{bad}' in the update is not finite; lower training.learning_rate")
        parts = {"entity": update.entity, **update.modules}
        if update.tokens is not None:
            parts["tokens"] = update.tokens
        for name, value in parts.items():  # all of them before the first sum, which a later refusal would leave torn
            check_range(value, f"{who}: {name}")
        self.rows.add(update.entity_ids, update.entity, f"{who}: entity")
        share = update.num_triples / sum(self.num_triples.values())
        self.modules.add(update.modules, share)
        if update.token_present is not None and update.tokens is not None:
            self._add_tokens(update, update.token_present, update.tokens)
        if update.soft_queries is not None:
            self.soft_queries[update.client] = update.soft_queries
        self.received.add(update.client)
        self.aggregate_seconds += time.perf_counter() - started

    def finish_round(self) -> ServerReport:
        """Turn the sums into the next global model and distil (eq. 3, 11, 12, 13)."""
        started = time.perf_counter()
        old = self.global_model
        entity = self.rows.result(old.entity)
        modules = self.modules.result(old.modules)
        averaged = GlobalModel(entity, modules, self._prototypes())
        self.aggregate_seconds += time.perf_counter() - started
        started = time.perf_counter()
        queries = [self.soft_queries[client] for client in sorted(self.soft_queries)]
        generator = torch_generator(self.config.seed, "server", round_num=self.round_num)
        self.global_model, losses = self.strategy.distil(self.model, averaged, queries, generator)
        report = ServerReport(losses, len(self.received), self.aggregate_seconds, time.perf_counter() - started)
        self._open_round(self.round_num + 1)
        return report

    def state(self) -> Params:
        """Return the global model as one flat dict of tensors."""
        model = self.global_model
        state = {"entity": model.entity, **with_prefix(model.modules, "modules")}
        if model.prototypes is not None:
            table = model.prototypes
            state |= {"prototypes/values": table.values, "prototypes/counts": table.counts}
            state["prototypes/rounds"] = table.rounds
        return {name: value.detach().contiguous() for name, value in state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        prototypes = None
        if "prototypes/values" in state:
            prototypes = PrototypeTable(
                state["prototypes/values"], state["prototypes/counts"], state["prototypes/rounds"]
            )
        self.global_model = GlobalModel(state["entity"], select_view(state, "modules"), prototypes)

    def _open_round(self, round_num: int) -> None:
        self.round_num = round_num
        num_entities, dim = self.global_model.entity.shape
        self.rows = RowMean(num_entities, dim)
        self.modules = ModuleMean()
        num_modalities = self.model.num_tokens - 1
        self.tokens = [RowMean(num_entities, dim) for _ in range(num_modalities)] if self._prototyping else []
        self.soft_queries: dict[int, SoftQueries] = {}
        self.received: set[int] = set()
        self.aggregate_seconds = 0.0

    @property
    def _prototyping(self) -> bool:
        return self.strategy.sends_prototypes and self.model.imputes

    def _add_tokens(self, update: ClientUpdate, present: Tensor, tokens: Tensor) -> None:
        """Add projected tokens to the sums of eq. 11."""
        start = 0
        for index, mean in enumerate(self.tokens):
            rows = update.entity_ids[present[index]]
            mean.add(rows, tokens[start : start + len(rows)], f"client {update.client}: tokens")
            start += len(rows)

    def _prototypes(self) -> PrototypeTable | None:
        """Renew the prototypes of this round's senders and keep the others (eq. 11)."""
        if not self.tokens:
            return None
        old = self.global_model.prototypes
        if old is None:
            shape = (len(self.tokens), *self.global_model.entity.shape)
            empty = torch.zeros(shape[:2], dtype=torch.int64)
            old = PrototypeTable(torch.zeros(shape), empty, empty)
        values = torch.stack([mean.result(old.values[index]) for index, mean in enumerate(self.tokens)])
        counts = torch.stack([mean.counts for mean in self.tokens])
        renewed = counts > 0
        rounds = torch.where(renewed, torch.full_like(old.rounds, self.round_num), old.rounds)
        return PrototypeTable(values, torch.where(renewed, counts, old.counts), rounds)
