"""The actor that holds clients: it forwards, and adds nothing to what `fedsim` computes."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from actors.cluster import private_memory
from actors.metrics import watch_actor
from actors.tensors import share_tensors
from fedsim.checkpoint import load_clients, save_clients
from fedsim.config import Config
from fedsim.data.clients import ClientData, with_matrices, without_matrices
from fedsim.evaluation.consistency import ConsistencySums, merge_sums
from fedsim.federated.aggregation import PartialSums, RoundSums, SumShape
from fedsim.federated.client import Client
from fedsim.federated.client_batch import evaluate_clients, measure_clients, train_clients
from fedsim.federated.failures import unchanged_on_failure
from fedsim.federated.gpu_memory import PartSize
from fedsim.federated.messages import Broadcast, ClientHello, ClientUpdate
from fedsim.federated.reports import ClientEvaluation, ClientReport
from fedsim.federated.runtime import client_device, make_client
from fedsim.federated.shelf import Shelf
from fedsim.models.parameters import Params
from fedsim.privacy.secure_aggregation.clients import SecureClients
from fedsim.privacy.secure_aggregation.messages import (
    EncryptedShares,
    KeyAdvertisement,
    RevealedShares,
    Roster,
    ShareDelivery,
    UnmaskRequest,
)
from fedsim.privacy.secure_aggregation.sums import MaskedSums, PartialMaskedSums
from fedsim.process import collect_garbage, return_freed_memory, set_aside_imports, settle_process


class _ClientActor:
    """Holds one or more batches of clients and their private data.

    Args:
        name: of the actor.
        config: the experiment.
        scratch: folder for the state of clients that are not at work; None keeps it in memory.
        num_restarts: actors before this one that held the same clients and died.
    """

    def __init__(self, name: str, config: Config, scratch: str | None = None, num_restarts: int = 0) -> None:
        self.name, self.config = name, config
        self.round_num = 0
        self.clients: dict[int, Client] = {}
        self.matrices: dict[str, np.ndarray[Any, Any]] = {}
        self.part_size = PartSize()
        self.shelf = Shelf(scratch)
        self.consistency: ConsistencySums | None = None
        self.shape: SumShape | None = None
        self.sums: RoundSums | None = None
        self.secure = SecureClients(config.secure_aggregation)
        self.masked: MaskedSums | None = None
        share_tensors()
        settle_process(config.runtime.torch_threads)
        set_aside_imports()
        self.watch = watch_actor(name, num_restarts, lambda: len(self.clients))
        # Private data is read from Ray's shared memory, and never written.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")

    def __repr__(self) -> str:
        return self.name

    @ray.method
    def start(self) -> tuple[str, str, int, float]:
        """Take hold of the device; return address and id of the node, process id, and the bytes of private memory."""
        if self._device().type == "cuda":
            # Ray counts shares of a GPU and does not enforce them: without this, one actor can starve the others.
            torch.cuda.set_per_process_memory_fraction(self.config.runtime.gpus_per_client)
        return (
            str(ray.util.get_node_ip_address()),
            ray.get_runtime_context().get_node_id(),
            os.getpid(),
            private_memory(),
        )

    @ray.method
    def add_clients(
        self,
        data: Sequence[ClientData],
        shape: SumShape | None,
        names: Sequence[str],
        *matrices: np.ndarray[Any, Any],
    ) -> None:
        """Make clients of their data; feature matrices come apart, read in place by all actors of a node.

        Clients that are here already start anew. The shape of a round's sums is not known before all clients are.
        """
        self._abandon()
        self.shape = shape
        self.matrices = dict(zip(names, matrices, strict=True))
        for item in data:
            self._add(item)

    @ray.method
    def hello(self) -> list[ClientHello]:
        """Forward to each client's `Client.hello`."""
        return [client.hello() for client in self.clients.values()]

    @ray.method
    def join(self, broadcast: Broadcast, shape: SumShape) -> None:
        """Cut out each client's part of the broadcast and forward to `Client.join`; learn the shape of the sums."""
        self.shape = shape
        for client in self.clients.values():
            with self.shelf.at_work([client]):
                client.join(client.own_part(broadcast))
        return_freed_memory()  # what the data came in

    @ray.method(num_returns=2)
    def train(
        self, clients: Sequence[int], round_num: int, broadcast: Broadcast | None
    ) -> tuple[list[ClientUpdate], tuple[list[ClientReport], int]]:
        """Forward to `train_clients`; the updates go to the server, reports and the clients at once to the driver."""
        results = self._train(clients, round_num, broadcast)
        updates = [update for update, _ in results if update is not None]
        return updates, ([report for _, report in results], self.part_size.most or len(clients))

    @ray.method
    def train_and_sum(
        self, clients: Sequence[int], round_num: int, broadcast: Broadcast
    ) -> tuple[list[ClientReport], int]:
        """Forward to `train_clients`; the updates stay here as sums, see `sum_up`."""
        results = self._train(clients, round_num, broadcast)
        at_once = self.part_size.most or len(clients)
        if self.secure.config.enabled:
            assert self.shape is not None, "clients join before they train"
            masked_sums = self._masked_sums(round_num)
            masked = self.secure.mask(results, self.shape, broadcast)
            for sealed, _ in masked:
                masked_sums.add(sealed)
            return [report for _, report in masked], at_once
        sums = self._sums(round_num)
        for update, _ in results:
            assert update is not None, "a client that got a broadcast answers it"
            sums.add(update)
        return [report for _, report in results], at_once

    @ray.method(num_returns=2)
    def sum_up(
        self, round_num: int, *others: PartialSums | PartialMaskedSums
    ) -> tuple[PartialSums | PartialMaskedSums, int]:
        """Return the round's sums with those of other actors of the node, and the number of updates in them."""
        # All of a round are masked, or none.
        sums: Any = self._masked_sums(round_num) if self.secure.config.enabled else self._sums(round_num)
        for other in others:
            sums.merge(other)
        self.sums = self.masked = None
        return_freed_memory()  # what training took; the round's other work is small
        return sums.partial(), len(sums.received)

    @ray.method
    def advertise_keys(self, clients: Sequence[int], round_num: int) -> list[KeyAdvertisement]:
        """Forward to `SecureClients.advertise`."""
        return self.secure.advertise(clients, round_num)

    @ray.method
    def share_keys(self, roster: Roster) -> list[EncryptedShares]:
        """Forward to `SecureClients.share`."""
        return self.secure.share(roster)

    @ray.method
    def take_shares(self, deliveries: Mapping[int, ShareDelivery]) -> None:
        """Forward to `SecureClients.receive`."""
        self.secure.receive(deliveries)

    @ray.method
    def reveal_shares(self, request: UnmaskRequest) -> list[RevealedShares]:
        """Forward to `SecureClients.reveal`."""
        return self.secure.reveal(request)

    @ray.method
    def evaluate(
        self, clients: Sequence[int], split: str, round_num: int, choose: bool
    ) -> list[list[ClientEvaluation]]:
        """Forward to `evaluate_clients`."""
        held = [self.clients[client] for client in clients]
        with self.watch.timed("evaluate"), self.shelf.at_work(held, changes=choose):
            return self.part_size.run(
                held,
                f"evaluation in round {round_num}",
                lambda part: evaluate_clients(part, split, round_num, choose),
            )

    @ray.method
    def measure(self, clients: Sequence[int], shared: Tensor, round_num: int) -> list[dict[str, float]]:
        """Forward to `measure_clients`; the sums of tokens stay here, see `sum_tokens`."""
        held = [self.clients[client] for client in clients]
        with self.watch.timed("measure"):
            metrics, sums = measure_clients(self.shelf, held, shared, round_num)
        self.consistency = sums if self.consistency is None else merge_sums([self.consistency, sums])
        return_freed_memory()
        return metrics

    @ray.method
    def sum_tokens(self) -> ConsistencySums:
        """Return the sums of tokens of all clients that were measured since the last call."""
        assert self.consistency is not None, "clients are measured before they are summed"
        sums, self.consistency = self.consistency, None
        return sums

    @ray.method
    def save(self, clients: Sequence[int], mark: Path) -> dict[int, Params] | None:
        """Write the file of a batch of clients beside a mark, or return what it would hold if there is no mark."""
        with self.shelf.at_work([self.clients[client] for client in clients], changes=False):
            states = {client: self.clients[client].state() for client in clients}
            if not mark.exists():
                return states
            save_clients(states, mark.parent)
            return None

    @ray.method
    def load(self, clients: Sequence[int], mark: Path) -> bool:
        """Read the file of a batch of clients beside a mark; returns whether there is a mark."""
        if not mark.exists():
            return False
        self._restore(load_clients(clients, mark.parent))
        return True

    @ray.method
    def take(self, states: dict[int, Params]) -> None:
        """Take over the states of a batch of clients that this process cannot read where it is."""
        self._restore({client: _copies(state) for client, state in states.items()})

    @ray.method(num_returns=3)
    def release(self, clients: Sequence[int]) -> tuple[list[ClientData], list[Params], int]:
        """Let go of a batch of clients: data and states, for the actor that adopts them alone, and their number.

        They come apart: the data is read in place for as long as the clients live there, the states are copied and go.
        """
        held = [self.clients.pop(client) for client in clients]
        with self.shelf.at_work(held, changes=False):
            states = [client.state() for client in held]
        for client in clients:
            self.shelf.forget(client)
        return [without_matrices(client.data, self.matrices) for client in held], states, len(held)

    @ray.method
    def adopt(self, data: Sequence[ClientData], states: Sequence[Params]) -> None:
        """Take over clients from another actor."""
        for item, state in zip(data, states, strict=True):
            client = self._add(item)
            with self.shelf.at_work([client]):
                client.load_state(_copies(state))

    def _train(
        self, clients: Sequence[int], round_num: int, broadcast: Broadcast | None
    ) -> list[tuple[ClientUpdate | None, ClientReport]]:
        if round_num != self.round_num:
            self.round_num = round_num
            collect_garbage()  # of the round before
        held = [self.clients[client] for client in clients]
        with self.watch.timed("train"), self.shelf.at_work(held), unchanged_on_failure(held, self.config):
            return self.part_size.run(
                held,
                f"training in round {round_num}",
                lambda part: train_clients(part, round_num, broadcast),
            )

    def _restore(self, states: Mapping[int, Params]) -> None:
        """Put clients back to the state of a checkpoint."""
        self._abandon()
        with self.shelf.at_work([self.clients[client] for client in states]):
            for client, state in states.items():
                self.clients[client].load_state(state)

    def _abandon(self) -> None:
        """Forget what a round that is not finished has left here."""
        self.sums = self.masked = self.consistency = None

    def _add(self, data: ClientData) -> Client:
        """Make a client of its data and the matrices of the node."""
        self.shelf.forget(data.client)
        client = make_client(with_matrices(data, self.matrices), self.config, self._device())
        self.clients[data.client] = client
        return client

    def _device(self) -> torch.device:
        """Choose where clients' tensors live."""
        return client_device(self.config)

    def _sums(self, round_num: int) -> RoundSums:
        """Return the sums of a round, opened anew when the round begins."""
        if self.sums is None or self.sums.round_num != round_num:
            assert self.shape is not None, "clients join before they train"
            self.sums = RoundSums(self.shape, round_num, self._ownership())
        return self.sums

    def _masked_sums(self, round_num: int) -> MaskedSums:
        """Return the sums of a round's masked updates, opened anew when the round begins."""
        if self.masked is None or self.masked.round_num != round_num:
            assert self.shape is not None, "clients join before they train"
            self.masked = self.secure.sums(self.shape, round_num, self._ownership())
        return self.masked

    def _ownership(self) -> dict[int, Tensor]:
        return {number: client.shared_ids for number, client in self.clients.items()}


def _copies(state: Params) -> Params:
    """Copy what came by the object store, which is not ours to change: training changes values in place."""
    return {name: value.clone() for name, value in state.items()}


ClientActor = ray.remote(_ClientActor)
