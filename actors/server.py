"""The actor that holds the server: it forwards, and publishes each broadcast once in Ray's object store."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import ray
from ray import ObjectRef

from actors.metrics import watch_actor
from actors.tensors import share_tensors
from fedsim.checkpoint import load_tensors, save_tensors, server_file
from fedsim.config import Config
from fedsim.federated.aggregation import PartialSums, SumShape
from fedsim.federated.messages import Broadcast, ClientHello, ClientUpdate
from fedsim.federated.runtime import make_strategy
from fedsim.federated.server import Server, ServerReport
from fedsim.models.parameters import Params
from fedsim.privacy.secure_aggregation.messages import (
    EncryptedShares,
    KeyAdvertisement,
    RevealedShares,
    Roster,
    ShareDelivery,
    ToServer,
    UnmaskRequest,
)
from fedsim.privacy.secure_aggregation.server_party import ServerParty
from fedsim.privacy.secure_aggregation.sums import PartialMaskedSums
from fedsim.process import collect_garbage, return_freed_memory, set_aside_imports, settle_process


class _ServerActor:
    """Holds the global state.

    Args:
        name: of the actor.
        config: the experiment.
        num_rows: size of the global id space of what is shared.
        feature_dims: modality -> width of its features.
        num_restarts: servers of the run before this one, which died.
    """

    def __init__(
        self, name: str, config: Config, num_rows: int, feature_dims: Mapping[str, int], num_restarts: int = 0
    ) -> None:
        self.name = name
        self.published: ObjectRef[Broadcast] | None = None
        share_tensors()
        settle_process(config.runtime.torch_threads)
        set_aside_imports()
        self.watch = watch_actor(name, num_restarts)
        self.server = Server(config, make_strategy(config), num_rows, feature_dims)

    def __repr__(self) -> str:
        return self.name

    @ray.method
    def start(self) -> tuple[str, int]:
        """Return the address of the node, and the process id there."""
        return str(ray.util.get_node_ip_address()), os.getpid()

    @ray.method
    def register(self, hellos: list[ClientHello]) -> None:
        """Forward to `Server.register`."""
        for hello in hellos:
            self.server.register(hello)

    @ray.method
    def sum_shape(self) -> SumShape:
        """Forward to `Server.sum_shape`."""
        return self.server.sum_shape()

    @ray.method
    def begin_round(self, round_num: int) -> "list[ObjectRef[Broadcast]]":
        """Open a round and publish its broadcast; a reference comes back, in a list so that Ray leaves it alone."""
        self.published = ray.put(self.server.begin_round(round_num))  # held here: it lasts until the next round's
        return [self.published]

    @ray.method
    def receive(self, updates: list[ClientUpdate]) -> None:
        """Forward to `Server.receive`."""
        with self.watch.timed("aggregate"):
            for update in updates:
                self.server.receive(update)

    @ray.method
    def merge(self, partial: PartialSums | PartialMaskedSums) -> None:
        """Forward to `Server.merge`."""
        with self.watch.timed("aggregate"):
            self.server.merge(partial)

    @ray.method
    def secure_round(self, round_num: int, cohort: Sequence[int]) -> None:
        """Forward to `Server.secure_round`."""
        self.server.secure_round(round_num, cohort)

    @ray.method
    def take_keys(self, messages: list[KeyAdvertisement]) -> None:
        """Forward to `ServerParty.receive`."""
        self._take(messages)

    @ray.method
    def take_shares(self, messages: list[EncryptedShares]) -> None:
        """Forward to `ServerParty.receive`."""
        self._take(messages)

    @ray.method
    def take_revealed(self, messages: list[RevealedShares]) -> None:
        """Forward to `ServerParty.receive`."""
        self._take(messages)

    @ray.method
    def roster(self) -> Roster:
        """Forward to `ServerParty.roster`."""
        return self._party().roster()

    @ray.method
    def deliveries(self, clients: Sequence[int]) -> dict[int, ShareDelivery]:
        """Forward to `ServerParty.deliveries`."""
        return self._party().deliveries(clients)

    @ray.method
    def unmask_request(self) -> UnmaskRequest:
        """Forward to `ServerParty.request`."""
        return self._party().request()

    @ray.method
    def unmask(self) -> None:
        """Forward to `Server.unmask`."""
        with self.watch.timed("aggregate"):
            self.server.unmask()

    @ray.method
    def finish_round(self) -> ServerReport:
        """Forward to `Server.finish_round`."""
        with self.watch.timed("distil"):
            report = self.server.finish_round()
        collect_garbage()
        return_freed_memory()  # the sums of the round
        return report

    @ray.method
    def save(self, mark: Path) -> Params | None:
        """Write the server's file of a checkpoint beside a mark, or return what it would hold if there is no mark."""
        if not mark.exists():
            return self.server.state()
        save_tensors(self.server.state(), server_file(mark.parent))
        return None

    @ray.method
    def load(self, mark: Path) -> bool:
        """Read the server's file of a checkpoint beside a mark; returns whether there is one."""
        if not mark.exists():
            return False
        self.server.load_state(load_tensors(server_file(mark.parent)))
        return True

    @ray.method
    def take(self, state: Params) -> None:
        """Take over the state of a checkpoint that this process cannot read where it is, as copies."""
        self.server.load_state({name: value.clone() for name, value in state.items()})

    def _party(self) -> ServerParty:
        assert self.server.secure is not None, "a secure round is open"
        return self.server.secure

    def _take(self, messages: Sequence[ToServer]) -> None:
        for message in messages:
            self._party().receive(message)


ServerActor = ray.remote(_ServerActor)
