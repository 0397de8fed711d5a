"""The parties of all clients that one process holds, and what a run does with them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fedsim.federated.aggregation import SumShape
from fedsim.federated.message_checks import Rejection
from fedsim.federated.messages import Broadcast, ClientUpdate, message_bytes
from fedsim.federated.reports import ClientReport
from fedsim.privacy.secure_aggregation.client_party import ClientParty
from fedsim.privacy.secure_aggregation.layout import Layout
from fedsim.privacy.secure_aggregation.messages import (
    EncryptedShares,
    KeyAdvertisement,
    MaskedUpdate,
    RevealedShares,
    Roster,
    ShareDelivery,
    UnmaskRequest,
)
from fedsim.privacy.secure_aggregation.server_party import ServerParty
from fedsim.privacy.secure_aggregation.sums import MaskedSums
from fedsim.privacy_config import SecureAggregationConfig


class SecureClients:
    """Parties of the round's clients in this process, and the bytes of their messages; new ones each round.

    Args:
        config: threshold, and whether ownership is hidden.
    """

    def __init__(self, config: SecureAggregationConfig) -> None:
        self.config = config
        self.parties: dict[int, ClientParty] = {}
        self.bytes_up: dict[int, int] = {}
        self.bytes_down: dict[int, int] = {}

    def advertise(self, clients: Sequence[int], round_num: int) -> list[KeyAdvertisement]:
        """Make the parties of a round, and say which keys they have."""
        self.parties = {client: ClientParty(client, round_num, self.config.threshold) for client in clients}
        self.bytes_up, self.bytes_down = dict.fromkeys(clients, 0), dict.fromkeys(clients, 0)
        messages = [party.advertise() for party in self.parties.values()]
        for message in messages:
            self.bytes_up[message.client] += message_bytes(message)
        return messages

    def share(self, roster: Roster) -> list[EncryptedShares]:
        """Share the keys of the parties that are on the roster."""
        listed = set(roster.clients)
        messages = [party.share(roster) for client, party in self.parties.items() if client in listed]
        for message in messages:
            self.bytes_up[message.client] += message_bytes(message)
            self.bytes_down[message.client] += message_bytes(roster)
        return messages

    def receive(self, deliveries: Mapping[int, ShareDelivery]) -> None:
        """Take the shares that were sent to these parties."""
        for client, delivery in deliveries.items():
            self.parties[client].receive(delivery)
            self.bytes_down[client] += message_bytes(delivery)

    def mask(
        self, results: Sequence[tuple[ClientUpdate | None, ClientReport]], shape: SumShape, published: Broadcast
    ) -> list[tuple[MaskedUpdate | Rejection, ClientReport]]:
        """Mask clients' updates, and count in their reports what they really send and are sent.

        Args:
            results: of the clients' training.
            shape: of the sums.
            published: the server's model for all entities, which a client that hides what it owns is sent as a whole.

        Returns:
            What is sent; or what is wrong with the update, whose client drops out. And the reports.
        """
        layout = Layout(shape, self.config.hide_ownership)
        masked = []
        for update, report in results:
            assert update is not None, "a client that got a broadcast answers it"
            masked.append(self._mask(update, report, layout, published))
        return masked

    def _mask(
        self, update: ClientUpdate, report: ClientReport, layout: Layout, published: Broadcast
    ) -> tuple[MaskedUpdate | Rejection, ClientReport]:
        client = report.client
        bytes_up, bytes_down = self.bytes_up[client], self.bytes_down[client]
        bytes_down += message_bytes(published) if self.config.hide_ownership else report.bytes_down
        fault = layout.fault(update)
        if fault is not None:
            return fault, replace(report, bytes_down=bytes_down, bytes_up=bytes_up)
        party = self.parties[client]
        masked = party.mask(layout.encode(update))
        down, up = unmasking_bytes(len(party.peers) + 1)
        bytes_up += message_bytes(masked) + up
        return masked, replace(report, bytes_down=bytes_down + down, bytes_up=bytes_up)

    def sums(self, shape: SumShape, round_num: int, ownership: Mapping[int, Tensor]) -> MaskedSums:
        """Open sums for the masked updates of a round, for an actor that adds those of its clients.

        Args:
            shape: of the sums.
            round_num: the round, from 1.
            ownership: client -> the global ids of its rows, of this process' clients.
        """
        return Layout(shape, self.config.hide_ownership).sums(round_num, ownership)

    def reveal(self, request: UnmaskRequest) -> list[RevealedShares]:
        """Let the parties whose updates are in the sum reveal their shares."""
        survivors = set(request.survivors)
        return [party.reveal(request) for client, party in self.parties.items() if client in survivors]


def unmasking_bytes(num_clients: int) -> tuple[int, int]:
    """Count the messages of phase 3, down and up, which are the same whoever drops out of so many clients."""
    clients = tuple(range(num_clients))
    down = UnmaskRequest(0, clients, ())
    up = RevealedShares(0, 0, dict.fromkeys(clients, bytes(16)), {})
    return message_bytes(down), message_bytes(up)


def exchange_keys(server: ServerParty, clients: SecureClients, cohort: Sequence[int]) -> None:
    """Pass the messages of phases 0 and 1 within one process."""
    for advertisement in clients.advertise(cohort, server.round_num):
        server.receive(advertisement)
    for shares in clients.share(server.roster()):
        server.receive(shares)
    clients.receive(server.deliveries(cohort))


def reveal_shares(server: ServerParty, clients: SecureClients) -> None:
    """Pass the messages of phase 3 within one process."""
    for revealed in clients.reveal(server.request()):
        server.receive(revealed)
