"""The server's side of a round of secure aggregation, as a state machine."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsim.errors import RunError
from fedsim.privacy.secure_aggregation.client_party import pair_purpose, self_mask_key, sign_of
from fedsim.privacy.secure_aggregation.keys import add_mask, agree, private_key, public_key
from fedsim.privacy.secure_aggregation.messages import (
    EncryptedShares,
    KeyAdvertisement,
    RevealedShares,
    Roster,
    ShareDelivery,
    ToServer,
    UnmaskRequest,
)
from fedsim.privacy.secure_aggregation.sharing import join_shares, threshold_of
from fedsim.privacy.secure_aggregation.sums import MaskedSums


class ServerParty:
    """Passes keys and shares on, and takes the masks out of the sum once enough clients have revealed their shares.

    Args:
        round_num: the round, from 1.
        cohort: the clients that were asked to take part.
        share: of the cohort that must take part to the end, `secure_aggregation.threshold`.
        sums: of the masked updates; knows who owns which rows, unless that is hidden.

    Raises:
        RunError: if there is one client alone: its sum would be its update.
    """

    def __init__(self, round_num: int, cohort: Sequence[int], share: float, sums: MaskedSums) -> None:
        self.round_num, self.cohort, self.share, self.sums = round_num, set(cohort), share, sums
        if len(self.cohort) < 2:
            raise RunError(
                f"round {round_num}: secure aggregation of one client alone hides nothing, the sum is its update; let "
                f"more clients take part, or set secure_aggregation.enabled to false"
            )
        self.threshold = threshold_of(share, len(self.cohort))
        self.keys: dict[int, KeyAdvertisement] = {}  # U_1
        self.shares: dict[int, EncryptedShares] = {}  # U_2
        self.revealed: dict[int, RevealedShares] = {}
        self._roster: Roster | None = None
        self._request: UnmaskRequest | None = None

    def receive(self, message: ToServer) -> None:
        """Take a message of a client.

        Raises:
            RunError: if it is of another round, of a client that has no business there, came twice, or has the wrong
                size.
        """
        message.check()
        known: Mapping[int, ToServer]
        if isinstance(message, KeyAdvertisement):
            allowed, known = (self.cohort if self._roster is None else set()), self.keys
        elif isinstance(message, EncryptedShares):
            allowed, known = (set(self.roster().clients) if not self.sums.received else set()), self.shares
            if set(message.ciphertexts) != allowed - {message.client}:
                raise RunError(
                    f"client {message.client}, round {message.round_num}: shares for others than all with keys"
                )
        else:
            allowed, known = set(self.request().survivors), self.revealed
        what = f"client {message.client}, round {message.round_num}: {type(message).__name__}"
        if message.round_num != self.round_num:
            raise RunError(f"{what} is stale, the server is in round {self.round_num}")
        if message.client not in allowed:
            raise RunError(f"{what} of a client that does not take part in this phase of secure aggregation")
        if message.client in known:
            raise RunError(f"{what} came a second time")
        if isinstance(message, KeyAdvertisement):
            self.keys[message.client] = message
        elif isinstance(message, EncryptedShares):
            self.shares[message.client] = message
        else:
            self._check_revealed(message)
            self.revealed[message.client] = message

    def roster(self) -> Roster:
        """Close phase 0: return the keys for all clients.

        Raises:
            RunError: if too few advertised.
        """
        if self._roster is None:
            self._check_enough(len(self.keys), "advertised keys")
            self._roster = Roster(
                self.round_num, self.threshold, tuple(self.keys[client] for client in sorted(self.keys))
            )
        return self._roster

    def deliveries(self, clients: Sequence[int]) -> dict[int, ShareDelivery]:
        """Close phase 1: return each of these clients' shares, if it shared its own.

        Raises:
            RunError: if too few shared.
        """
        self._check_enough(len(self.shares), "shared their keys")
        found = {}
        for client in clients:
            if client in self.shares:
                senders = [other for other in sorted(self.shares) if other != client]
                texts = {other: self.shares[other].ciphertexts[client] for other in senders}
                found[client] = ShareDelivery(client, self.round_num, texts, self.sums.rows_in_common(client, senders))
        return found

    def request(self) -> UnmaskRequest:
        """Close phase 2: say who sent a masked update.

        Raises:
            RunError: if too few did, or one did who is not in the masks of the others.
        """
        if self._request is None:
            survivors = self.sums.received
            self._check_enough(len(survivors), "sent a masked update")
            strange = survivors - self.shares.keys()
            if strange:
                raise RunError(f"client {min(strange)}, round {self.round_num}: a masked update without shared keys")
            dropped = self.shares.keys() - survivors
            self._request = UnmaskRequest(self.round_num, tuple(sorted(survivors)), tuple(sorted(dropped)))
        return self._request

    def unmask(self) -> None:
        """Close phase 3: take all masks out of the sums, which then are those of the plain inputs.

        Raises:
            RunError: if too few revealed their shares, or what they join to is not the key that was advertised.
        """
        request = self.request()
        self._check_enough(len(self.revealed), "revealed their shares")
        place = {client: number for number, client in enumerate(self.roster().clients, start=1)}
        held = {place[client]: item for client, item in self.revealed.items()}
        for client in request.survivors:
            seed = join_shares({index: item.self_seeds[client] for index, item in held.items()}, self.threshold)
            key = self_mask_key(seed, client, self.round_num)
            add_mask(key, self.sums.common, self.sums.table, self.sums.rows_of(client), -1)
        for client in request.dropped:
            seed = join_shares({index: item.mask_seeds[client] for index, item in held.items()}, self.threshold)
            private = private_key(seed)
            if public_key(private) != self.keys[client].mask_key:
                raise RunError(
                    f"round {self.round_num}: the shares of client {client}'s key, who dropped out, do not join to it"
                )
            for other in request.survivors:
                key = agree(private, self.keys[other].mask_key, pair_purpose(client, other, self.round_num))
                rows = self._rows_of_both(client, other)
                add_mask(key, self.sums.common, self.sums.table, rows, -sign_of(other, client))

    def _rows_of_both(self, client: int, other: int) -> Tensor | None:
        rows, others = self.sums.rows_of(client), self.sums.rows_of(other)
        if rows is None or others is None:
            return None
        return rows[torch.isin(rows, others, assume_unique=True)]

    def _check_revealed(self, message: RevealedShares) -> None:
        request = self.request()
        if set(message.self_seeds) != set(request.survivors) or set(message.mask_seeds) != set(request.dropped):
            raise RunError(
                f"client {message.client}, round {self.round_num}: revealed other shares than it was asked for"
            )

    def _check_enough(self, number: int, what: str) -> None:
        if number < self.threshold:
            faults = "".join(f"; {fault.message}" for fault in self.sums.rejected[:1])
            raise RunError(
                f"round {self.round_num}: {number} of {len(self.cohort)} clients {what}, and secure aggregation needs "
                f"{self.threshold} (secure_aggregation.threshold {self.share:g}); nothing is unmasked{faults}"
            )
