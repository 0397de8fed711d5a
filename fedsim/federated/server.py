"""The server side: streaming aggregation and distillation (method.md eq. 3, 11 to 13)."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.errors import RunError
from fedsim.federated.aggregation import ModuleMean, PartialSums, RoundSums, RowMean, SumShape
from fedsim.federated.attacks import Colluders
from fedsim.federated.message_checks import Rejection, UpdateFormat
from fedsim.federated.messages import Broadcast, ClientHello, ClientUpdate, PrototypeTable
from fedsim.federated.robust import holds_updates
from fedsim.federated.strategy import GlobalModel, Strategy
from fedsim.models.client_model import ClientModel
from fedsim.models.parameters import Params, select_view, with_prefix
from fedsim.privacy.differential_privacy import noised_model
from fedsim.privacy.secure_aggregation.layout import Layout
from fedsim.privacy.secure_aggregation.messages import MaskedUpdate
from fedsim.privacy.secure_aggregation.server_party import ServerParty
from fedsim.privacy.secure_aggregation.sums import PartialMaskedSums
from fedsim.randomness import torch_generator


@dataclass(frozen=True)
class ServerReport:
    """What the driver learns of the server's round.

    Attributes:
        losses: mean terms of the distillation.
        num_updates: clients whose update is in the new model; 0 if too few were left and it stays as it was.
        aggregate_seconds: of receiving and summing.
        distil_seconds: of the distillation.
        rejected: updates that were refused, in the order of their clients.
    """

    losses: dict[str, float]
    num_updates: int
    aggregate_seconds: float
    distil_seconds: float
    rejected: tuple[Rejection, ...] = ()


class Server:
    """Holds the global model; knows entity ids, ownership and sizes, and nothing else of the clients.

    Args:
        config: the experiment.
        strategy: says what is distilled.
        num_rows: size of the global id space of what is shared: entities, or relations.
        feature_dims: modality -> width of its features.
    """

    def __init__(self, config: Config, strategy: Strategy, num_rows: int, feature_dims: Mapping[str, int]) -> None:
        self.config, self.strategy = config, strategy
        self.model = ClientModel(config, feature_dims)
        generator = torch_generator(config.seed, "init/global")
        entity = strategy.init_rows(self.model, num_rows, generator)
        self.global_model = GlobalModel(entity, self.model.init_modules(generator), None)
        self.ownership: dict[int, Tensor] = {}
        self.num_triples: dict[int, int] = {}
        self.colluders = Colluders(config)
        self.secure: ServerParty | None = None  # of an open round with secure aggregation
        self.client_rows: dict[int, Tensor] = {}  # of each client's last round, if the strategy keeps them
        self._open_round(0)

    def register(self, hello: ClientHello) -> None:
        """Learn what a client owns."""
        self.ownership[hello.client] = hello.entity_ids
        self.num_triples[hello.client] = hello.num_triples

    def begin_round(self, round_num: int) -> Broadcast:
        """Open a round and publish the global model."""
        self._open_round(round_num)
        model = self.global_model
        personal = self.strategy.personal_rows(self.ownership, self.client_rows)
        return Broadcast(round_num, model.entity, model.modules, model.prototypes, personal=personal)

    def secure_round(self, round_num: int, cohort: Sequence[int]) -> ServerParty:
        """Open a round of secure aggregation, which ends with `unmask`."""
        config = self.config.secure_aggregation
        sums = Layout(self.sum_shape(), config.hide_ownership).sums(round_num, self.ownership)
        self.secure = ServerParty(round_num, cohort, config.threshold, sums)
        return self.secure

    def receive_masked(self, update: MaskedUpdate | Rejection) -> None:
        """Add one client's masked update, in any order; see `MaskedSums.add`."""
        assert self.secure is not None, "a secure round is open"
        self.secure.sums.add(update)

    def unmask(self) -> None:
        """Take the masks out of the sums, once shares were revealed; from here on the round goes on like any other.

        Raises:
            RunError: if too few clients are left, or more updates were rejected than may be.
        """
        assert self.secure is not None, "a secure round is open"
        secure, self.secure = self.secure, None
        secure.unmask()
        layout = Layout(self.sum_shape(), self.config.secure_aggregation.hide_ownership)
        self.sums.merge(layout.decode(secure.sums))

    def receive(self, update: ClientUpdate) -> None:
        """Add one client's update to the sums, in any order; see `RoundSums.add`."""
        if not self.colluders.take(update):
            self.sums.add(update)

    def merge(self, partial: PartialSums | PartialMaskedSums) -> None:
        """Add the sums of several clients, in any order; see `RoundSums.merge`.

        Raises:
            RunError: also if they hold the update of a client that is not registered.
        """
        for client in partial.clients:
            if client not in self.ownership:
                raise RunError(
                    f"client {client}, round {partial.round_num}: an update of a client that is not registered"
                )
        if isinstance(partial, PartialMaskedSums):
            assert self.secure is not None, "a secure round is open"
            self.secure.sums.merge(partial)
        else:
            self.sums.merge(partial)

    def finish_round(self) -> ServerReport:
        """Turn the sums into the next global model and distil (eq. 3, 11, 12, 13).

        Raises:
            RunError: if updates were rejected and fewer are left than make a round, unless such rounds are skipped.
        """
        started = time.perf_counter()
        old = self.global_model
        sums = self.sums
        for forged in self.colluders.forge(old.entity, old.modules, len(self.num_triples)):
            sums.add(forged)
        sums.close(old.entity, old.modules)
        rejected = tuple(
            sorted(sums.rejected, key=lambda fault: (fault.client is None, fault.client or 0, fault.reason))
        )
        if self._too_few(sums, rejected):
            self._open_round(sums.round_num + 1)
            return ServerReport({}, 0, sums.seconds, 0.0, rejected)
        entity, modules = self._combine(sums)
        averaged = GlobalModel(entity, modules, self._prototypes())
        self._keep_rows()
        aggregate_seconds = sums.seconds + time.perf_counter() - started
        started = time.perf_counter()
        queries = [sums.soft_queries[client] for client in sorted(sums.soft_queries)]
        generator = torch_generator(self.config.seed, "server", round_num=sums.round_num)
        self.global_model, losses = self.strategy.distil(self.model, averaged, queries, generator)
        distil_seconds = time.perf_counter() - started
        report = ServerReport(losses, len(sums.received), aggregate_seconds, distil_seconds, rejected)
        self._open_round(sums.round_num + 1)
        return report

    def state(self) -> Params:
        """Return the global model, and the clients' rows if they are kept, as one flat dict of tensors."""
        model = self.global_model
        state = {"entity": model.entity, **with_prefix(model.modules, "modules")}
        if model.prototypes is not None:
            table = model.prototypes
            state |= {"prototypes/values": table.values, "prototypes/counts": table.counts}
            state["prototypes/rounds"] = table.rounds
        state |= {f"clients/{client:05d}": rows for client, rows in self.client_rows.items()}
        return {name: value.detach().contiguous() for name, value in state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        prototypes = None
        if "prototypes/values" in state:
            prototypes = PrototypeTable(
                state["prototypes/values"], state["prototypes/counts"], state["prototypes/rounds"]
            )
        self.global_model = GlobalModel(state["entity"], select_view(state, "modules"), prototypes)
        self.client_rows = {int(client): rows for client, rows in select_view(state, "clients").items()}
        self.colluders = Colluders(self.config)  # without updates of a round that was given up

    def sum_shape(self) -> SumShape:
        """Return what sums need to know, once all clients are registered."""
        num_entities, dim = self.global_model.entity.shape
        model, distillation = self.model, self.config.distillation
        prototyping = self.strategy.sends_prototypes and model.imputes
        soft_queries = (model.num_parts, distillation.num_soft_queries, distillation.num_candidates)
        form = UpdateFormat(
            dim,
            model.dim,
            model.num_tokens - 1 if prototyping else 0,
            {name: tuple(value.shape) for name, value in self.global_model.modules.items()},
            soft_queries if self.strategy.sends_soft_queries else None,
            dict(self.num_triples),
            self.config.communication,
        )
        federation = self.config.federation
        return SumShape(
            num_entities,
            form,
            federation.aggregator,
            self.config.robustness,
            holds_updates(self.config),
            federation.max_failed_clients,
            self.strategy.keeps_rows,
        )

    def _open_round(self, round_num: int) -> None:
        self.sums = RoundSums(self.sum_shape(), round_num, self.ownership)

    def _too_few(self, sums: RoundSums, rejected: Sequence[Rejection]) -> bool:
        """Tell whether rejections left too few updates for a round that is to be skipped; raise if it is not to be."""
        settings = self.config.participation
        if not rejected or len(sums.received) >= settings.min_clients:
            return False
        if settings.too_few == "skip":
            return True
        raise RunError(
            f"round {sums.round_num}: {len(sums.received)} update(s) are left, fewer than participation.min_clients "
            f"{settings.min_clients}, as {len(rejected)} were rejected; the first: {rejected[0].message}"
        )

    def _combine(self, sums: RoundSums) -> tuple[Tensor, Params]:
        """Make rows and modules of the round's sums, with the server's noise if it is to add some."""
        old = self.global_model
        if self.config.privacy.noise != "server":
            return sums.rows.result(old.entity), sums.modules.result(old.modules)
        assert isinstance(sums.rows, RowMean), "robust aggregation is refused"
        assert isinstance(sums.modules, ModuleMean), "robust aggregation is refused"
        generator = torch_generator(self.config.seed, "dp", round_num=sums.round_num)
        return noised_model(self.config, sums.rows, sums.modules, old, self.ownership, generator)

    def _keep_rows(self) -> None:
        """Take over the rows that clients sent; those a client has not sent yet (`top_k`) count as the server's."""
        for client, sent in self.sums.kept.items():
            owned = self.ownership[client]
            known = self.client_rows.get(client, self.global_model.entity[owned])
            self.client_rows[client] = known.index_copy(0, torch.searchsorted(owned, sent.ids), sent.values)

    def _prototypes(self) -> PrototypeTable | None:
        """Renew the prototypes of this round's senders and keep the others (eq. 11)."""
        if not self.sums.tokens:
            return None
        old = self.global_model.prototypes
        if old is None:
            shape = (len(self.sums.tokens), *self.global_model.entity.shape)
            empty = torch.zeros(shape[:2], dtype=torch.int64)
            old = PrototypeTable(torch.zeros(shape), empty, empty)
        values = torch.stack([mean.result(old.values[index]) for index, mean in enumerate(self.sums.tokens)])
        counts = torch.stack([mean.counts for mean in self.sums.tokens])
        renewed = counts > 0
        rounds = torch.where(renewed, torch.full_like(old.rounds, self.sums.round_num), old.rounds)
        return PrototypeTable(values, torch.where(renewed, counts, old.counts), rounds)
