"""The messages of secure aggregation; each is checked where it arrives (`check`)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.errors import RunError
from fedsim.privacy.secure_aggregation.keys import KEY_BYTES, SEED_BYTES, TAG_BYTES

MAX_NUMBER = 1 << 31  # of clients and rounds
SEALED_BYTES = 2 * SEED_BYTES + TAG_BYTES  # a share of each secret, and the tag


@dataclass(frozen=True)
class KeyAdvertisement:
    """Client to server, phase 0.

    Attributes:
        client: the client's id.
        round_num: the round, from 1.
        encryption_key: public key c_u.
        mask_key: public key s_u.
    """

    client: int
    round_num: int
    encryption_key: bytes
    mask_key: bytes

    def check(self) -> None:
        """Raise RunError if a key has the wrong size."""
        check_numbers(self, "client", "round_num")
        for name in ("encryption_key", "mask_key"):
            _check_bytes(getattr(self, name), KEY_BYTES, f"{_who(self.client, self.round_num)}: {name}")


@dataclass(frozen=True)
class Roster:
    """Server to clients, phase 0: the keys of all who advertised, by client id.

    Attributes:
        round_num: the round, from 1.
        threshold: t.
        keys: in order of client ids.
    """

    round_num: int
    threshold: int
    keys: tuple[KeyAdvertisement, ...]

    @property
    def clients(self) -> list[int]:
        """Return who advertised keys, sorted."""
        return [item.client for item in self.keys]

    def check(self) -> None:
        """Raise RunError if a client or key is there twice, out of order, of another round or of the wrong size."""
        check_numbers(self, "round_num", "threshold")
        if not isinstance(self.keys, tuple) or not all(isinstance(item, KeyAdvertisement) for item in self.keys):
            raise RunError(f"round {self.round_num}: the keys are no advertisements of keys")
        for item in self.keys:
            item.check()
            if item.round_num != self.round_num:
                raise RunError(f"round {self.round_num}: client {item.client}'s keys are of round {item.round_num}")
        if self.clients != sorted(set(self.clients)):
            raise RunError(f"round {self.round_num}: the keys are not in the order of clients, each once")
        distinct = {key for item in self.keys for key in (item.encryption_key, item.mask_key)}
        if len(distinct) != 2 * len(self.keys):
            raise RunError(f"round {self.round_num}: two clients advertise the same key")


@dataclass(frozen=True)
class EncryptedShares:
    """Client to server, phase 1.

    Attributes:
        client: the client's id.
        round_num: the round, from 1.
        ciphertexts: receiver -> its shares of the sender's two secrets, encrypted for it.
    """

    client: int
    round_num: int
    ciphertexts: dict[int, bytes]

    def check(self) -> None:
        """Raise RunError if a ciphertext has the wrong size."""
        check_numbers(self, "client", "round_num")
        _check_shares(self.ciphertexts, SEALED_BYTES, f"{_who(self.client, self.round_num)}: shares for client")


@dataclass(frozen=True)
class ShareDelivery:
    """Server to one client, phase 1.

    Attributes:
        client: the receiver.
        round_num: the round, from 1.
        ciphertexts: sender -> shares encrypted for the receiver.
        shared_rows: sender -> which of the receiver's rows the sender has too, bool [num_rows]; None if ownership is
            hidden.
    """

    client: int
    round_num: int
    ciphertexts: dict[int, bytes]
    shared_rows: dict[int, Tensor] | None

    def check(self) -> None:
        """Raise RunError if a ciphertext has the wrong size, or rows are not flags of the senders."""
        check_numbers(self, "client", "round_num")
        who = f"{_who(self.client, self.round_num)}"
        _check_shares(self.ciphertexts, SEALED_BYTES, f"{who}: shares from client")
        if self.shared_rows is None:
            return
        right = isinstance(self.shared_rows, dict) and all(
            is_plain(flags) and flags.dtype == torch.bool and flags.dim() == 1 for flags in self.shared_rows.values()
        )
        if not right or self.shared_rows.keys() != self.ciphertexts.keys():
            raise RunError(f"{who}: the rows in common are not one flag per row for each sender of shares")


@dataclass(frozen=True)
class PlainInput:
    """What a client adds to the sum, x_u; it never leaves the client.

    Attributes:
        rows: global ids of the table's rows, sorted, int64 [num_rows]; None for all there are.
        table: int64 [num_rows, width].
        common: int64 [num_common], what all clients have.
    """

    rows: Tensor | None
    table: Tensor
    common: Tensor


@dataclass(frozen=True)
class MaskedUpdate:
    """Client to server, phase 2: y_u, uniform modulo 2^64 to all who cannot unmask it.

    Attributes:
        client: the client's id.
        round_num: the round, from 1.
        table: int64 [num_rows, width].
        common: int64 [num_common].
    """

    client: int
    round_num: int
    table: Tensor
    common: Tensor

    def check(self, num_rows: int, width: int, num_common: int) -> None:
        """Raise RunError if a part has another type or shape than the round asks for."""
        check_numbers(self, "client", "round_num")
        for name, value, shape in (("table", self.table, (num_rows, width)), ("common", self.common, (num_common,))):
            if not is_plain(value):
                raise RunError(f"{_who(self.client, self.round_num)}: '{name}' of the masked update is no plain tensor")
            if value.dtype != torch.int64 or tuple(value.shape) != shape:
                raise RunError(
                    f"{_who(self.client, self.round_num)}: '{name}' of the masked update is {value.dtype} "
                    f"{list(value.shape)}, in this round it must be int64 {list(shape)}"
                )


@dataclass(frozen=True)
class UnmaskRequest:
    """Server to clients, phase 3.

    Attributes:
        round_num: the round, from 1.
        survivors: who sent a masked update, sorted.
        dropped: who shared keys and sent none, sorted.
    """

    round_num: int
    survivors: tuple[int, ...]
    dropped: tuple[int, ...]

    def check(self) -> None:
        """Raise RunError if those to unmask are not clients."""
        check_numbers(self, "round_num")
        for name in ("survivors", "dropped"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(type(client) is int for client in value):
                raise RunError(f"round {self.round_num}: '{name}' of the request to unmask are no clients")


@dataclass(frozen=True)
class RevealedShares:
    """Client to server, phase 3: of every client one share, and never of both its secrets.

    Attributes:
        client: the client's id.
        round_num: the round, from 1.
        self_seeds: survivor -> share of b_u.
        mask_seeds: dropped client -> share of the secret of s_u.
    """

    client: int
    round_num: int
    self_seeds: dict[int, bytes]
    mask_seeds: dict[int, bytes]

    def check(self) -> None:
        """Raise RunError if a share has the wrong size."""
        check_numbers(self, "client", "round_num")
        for shares in (self.self_seeds, self.mask_seeds):
            _check_shares(shares, SEED_BYTES, f"{_who(self.client, self.round_num)}: share of client")


ToServer = KeyAdvertisement | EncryptedShares | RevealedShares


def _who(client: int, round_num: int) -> str:
    return f"client {client}, round {round_num}"


def is_plain(value: object) -> bool:
    """Tell whether a value is a tensor that has its numbers in memory, in rows of one length."""
    return isinstance(value, Tensor) and not value.is_nested and not value.is_meta and value.layout == torch.strided


def check_numbers(message: object, *names: str) -> None:
    """Raise RunError if a field of a message is not a whole number."""
    for name in names:
        value = getattr(message, name)
        if type(value) is not int or not 0 <= value < MAX_NUMBER:
            raise RunError(f"'{name}' of a {type(message).__name__} must be a whole number, not {str(value)[:40]!r}")


def _check_shares(shares: object, size: int, name: str) -> None:
    """Hold shares by client to their type and size."""
    if not isinstance(shares, dict) or not all(type(other) is int for other in shares):
        raise RunError(f"{name}s: they are no shares by client")
    for other, share in shares.items():
        _check_bytes(share, size, f"{name} {other}")


def _check_bytes(value: bytes, size: int, name: str) -> None:
    if not isinstance(value, bytes) or len(value) != size:
        found = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
        raise RunError(f"{name} must be {size} bytes, not {found}")
