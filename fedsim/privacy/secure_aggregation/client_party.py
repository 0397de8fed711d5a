"""A client's side of a round of secure aggregation, as a state machine."""

from typing import Literal

from torch import Tensor

from fedsim.errors import RunError
from fedsim.privacy.secure_aggregation.keys import (
    SEED_BYTES,
    add_mask,
    agree,
    derive,
    new_seed,
    private_key,
    public_key,
    seal,
    unseal,
)
from fedsim.privacy.secure_aggregation.messages import (
    EncryptedShares,
    KeyAdvertisement,
    MaskedUpdate,
    PlainInput,
    RevealedShares,
    Roster,
    ShareDelivery,
    UnmaskRequest,
)
from fedsim.privacy.secure_aggregation.sharing import split_secret, threshold_of

Phase = Literal["advertise", "share", "receive", "mask", "reveal", "done"]


class ClientParty:
    """Keys, shares and masks of one client in one round; each is used once.

    It trusts the server to pass messages on, and with nothing else: it masks for those alone whose shares reached it,
    it answers one request for shares, and never one that would unmask a client by itself.

    Args:
        client: the client's id.
        round_num: the round, from 1.
        share: of the clients that must take part to the end, `secure_aggregation.threshold`.
    """

    def __init__(self, client: int, round_num: int, share: float) -> None:
        self.client, self.round_num, self.threshold_share = client, round_num, share
        self.who = f"client {client}, round {round_num}"
        self.phase: Phase = "advertise"
        self.threshold = 0
        self._self_seed, self._mask_seed = new_seed(), new_seed()
        self._encryption = private_key(new_seed())  # of no further use once the shares have arrived
        self._mask = private_key(self._mask_seed)
        self._keys: dict[int, KeyAdvertisement] = {}  # U_1
        self._held: dict[int, tuple[bytes, bytes]] = {}  # U_2: client -> shares of its mask seed and its self seed
        self._shared_rows: dict[int, Tensor] | None = None

    @property
    def peers(self) -> list[int]:
        """Return the clients whose shares this one holds, and with whom it masks, sorted."""
        return sorted(client for client in self._held if client != self.client)

    def advertise(self) -> KeyAdvertisement:
        """Say which public keys this client has (phase 0)."""
        self._enter("advertise", "share")
        return KeyAdvertisement(self.client, self.round_num, public_key(self._encryption), public_key(self._mask))

    def share(self, roster: Roster) -> EncryptedShares:
        """Split the seeds among all who advertised keys (phase 1).

        Raises:
            RunError: if the roster is of another round, too short or inconsistent, or has other keys of this client.
        """
        self._enter("share", "receive")
        roster.check()
        self._check_round(roster.round_num)
        own = KeyAdvertisement(self.client, self.round_num, public_key(self._encryption), public_key(self._mask))
        if own not in roster.keys:
            raise RunError(f"{self.who}: the keys that the server passes on are not those that this client advertised")
        needed = threshold_of(self.threshold_share, len(roster.keys))
        if roster.threshold < needed or len(roster.keys) < roster.threshold:
            raise RunError(
                f"{self.who}: {len(roster.keys)} clients advertised keys, the server asks for {roster.threshold} to "
                f"unmask, and this client for at least {needed}"
            )
        self.threshold = roster.threshold
        self._keys = {item.client: item for item in roster.keys}
        shares = [split_secret(seed, self.threshold, len(self._keys)) for seed in (self._mask_seed, self._self_seed)]
        ciphertexts = {}
        for receiver, of_mask, of_self in zip(roster.clients, *shares, strict=True):
            if receiver == self.client:
                self._held[receiver] = (of_mask, of_self)
            else:
                key = self._pair_key(receiver, _path(self.client, receiver, self.round_num))
                ciphertexts[receiver] = seal(key, of_mask + of_self, _path(self.client, receiver, self.round_num))
        return EncryptedShares(self.client, self.round_num, ciphertexts)

    def receive(self, delivery: ShareDelivery) -> None:
        """Take the others' shares; from now on this client masks with those who sent them (phase 1).

        Raises:
            RunError: if the delivery is another's, of another round, was changed on its way, or has too few shares.
        """
        self._enter("receive", "mask")
        delivery.check()
        self._check_round(delivery.round_num)
        if delivery.client != self.client:
            raise RunError(f"{self.who}: got the shares that client {delivery.client} was sent")
        for sender, text in delivery.ciphertexts.items():
            if sender not in self._keys or sender == self.client:
                raise RunError(f"{self.who}: shares from client {sender}, who advertised no keys")
            path = _path(sender, self.client, self.round_num)
            plain = unseal(self._pair_key(sender, path), text, path)
            self._held[sender] = (plain[:SEED_BYTES], plain[SEED_BYTES:])
        self._shared_rows = delivery.shared_rows
        if len(self._held) < self.threshold:
            raise RunError(f"{self.who}: {len(self._held)} clients shared their keys, {self.threshold} must")

    def mask(self, plain: PlainInput) -> MaskedUpdate:
        """Hide this client's input (phase 2).

        Raises:
            RunError: if the server's flags of rows in common are not one per row.
        """
        self._enter("mask", "reveal")
        table, common = plain.table.clone(), plain.common.clone()
        add_mask(self_mask_key(self._self_seed, self.client, self.round_num), common, table, None, 1)
        for peer in self.peers:
            rows = None
            if self._shared_rows is not None:
                flags = self._shared_rows[peer]
                if len(flags) != len(table):
                    raise RunError(
                        f"{self.who}: {len(flags)} flags of rows in common with client {peer}, not a row each"
                    )
                rows = flags.nonzero().flatten()
            elif plain.rows is not None:
                raise RunError(f"{self.who}: the server did not say which rows client {peer} has too")
            key = agree(self._mask, self._keys[peer].mask_key, pair_purpose(self.client, peer, self.round_num))
            add_mask(key, common, table, rows, sign_of(self.client, peer))
        return MaskedUpdate(self.client, self.round_num, table, common)

    def reveal(self, request: UnmaskRequest) -> RevealedShares:
        """Give the shares that unmask the sum (phase 3), once.

        Raises:
            RunError: if the request would give both secrets of a client, leaves too few in the sum, or does not fit
                the round: then this client reveals nothing.
        """
        self._enter("reveal", "done")
        request.check()
        self._check_round(request.round_num)
        survivors, dropped = set(request.survivors), set(request.dropped)
        both = survivors & dropped
        if both:
            raise RunError(
                f"{self.who}: refused to reveal both the self-mask and the key of client {min(both)}, which would "
                f"unmask what it sent"
            )
        if survivors | dropped != self._held.keys():
            raise RunError(f"{self.who}: asked to unmask other clients than those who shared their keys")
        if self.client not in survivors:
            raise RunError(f"{self.who}: asked to unmask a sum as if this client had sent nothing")
        if len(survivors) < self.threshold:
            raise RunError(
                f"{self.who}: asked to unmask the sum of {len(survivors)} clients, {self.threshold} must be in it"
            )
        return RevealedShares(
            self.client,
            self.round_num,
            {other: self._held[other][1] for other in sorted(survivors)},
            {other: self._held[other][0] for other in sorted(dropped)},
        )

    def _enter(self, expected: Phase, following: Phase) -> None:
        if self.phase != expected:
            raise RunError(f"{self.who}: asked to {expected} in the phase '{self.phase}' of secure aggregation")
        self.phase = following

    def _check_round(self, round_num: int) -> None:
        if round_num != self.round_num:
            raise RunError(f"{self.who}: a message of secure aggregation is of round {round_num}")

    def _pair_key(self, other: int, path: str) -> bytes:
        return agree(self._encryption, self._keys[other].encryption_key, path)


def self_mask_key(seed: bytes, client: int, round_num: int) -> bytes:
    """Return the key of a client's self-mask PRG(b_u)."""
    return derive(seed, f"self-mask of client {client}, round {round_num}")


def pair_purpose(client: int, other: int, round_num: int) -> str:
    """Name the mask of a pair of clients."""
    return f"mask of clients {min(client, other)} and {max(client, other)}, round {round_num}"


def sign_of(client: int, other: int) -> int:
    """Return the sign with which a client adds the mask that it has with another: the lower id adds it."""
    return 1 if client < other else -1


def _path(sender: int, receiver: int, round_num: int) -> str:
    return f"shares from client {sender} to client {receiver}, round {round_num}"
