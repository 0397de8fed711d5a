"""Keys, encryption and masks, all of the library `cryptography`.

X25519 (RFC 7748) agrees on secrets, HKDF with SHA-256 (RFC 5869) makes keys of them, ChaCha20-Poly1305 (RFC 8439)
encrypts shares, and ChaCha20 expands a key into a mask. Seeds come from the operating system and not from the run's
seed: a mask that can be computed from a config hides nothing, and no result depends on it, because masks cancel.

The library is imported where it is used: every process of every run imports this module, and most runs mask nothing.
"""

import secrets
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsim.errors import RunError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

SEED_BYTES = 16  # what the library of secret sharing takes; X25519 too has 128 bits of security
KEY_BYTES = 32
TAG_BYTES = 16
_CHUNK_VALUES = 1 << 16  # of a mask that are drawn at once, so that they stay in the processor's cache
_ZEROS = bytes(8 * _CHUNK_VALUES)
_NONCE = bytes(12)  # every key encrypts one message
_START = bytes(16)  # every key makes one mask: counter and nonce of ChaCha20


def new_seed() -> bytes:
    """Draw a seed."""
    return secrets.token_bytes(SEED_BYTES)


def derive(secret: bytes, purpose: str) -> bytes:
    """Derive the key for a purpose from a secret."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), KEY_BYTES, salt=None, info=f"fedsim secure aggregation/{purpose}".encode()).derive(secret)


def private_key(seed: bytes) -> "X25519PrivateKey":
    """Make the private key of a seed."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(derive(seed, "private key"))


def public_key(private: "X25519PrivateKey") -> bytes:
    """Return the public key as bytes."""
    return private.public_key().public_bytes_raw()


def agree(own: "X25519PrivateKey", other: bytes, purpose: str) -> bytes:
    """Agree with the owner of a public key on the key for a purpose.

    Raises:
        RunError: if the public key is one that agrees on the same with everybody.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    try:
        return derive(own.exchange(X25519PublicKey.from_public_bytes(other)), purpose)
    except ValueError as err:
        raise RunError(f"{purpose}: not a usable public key ({err})") from err


def seal(key: bytes, text: bytes, context: str) -> bytes:
    """Encrypt the one message of a key, bound to its context."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(key).encrypt(_NONCE, text, context.encode())


def unseal(key: bytes, ciphertext: bytes, context: str) -> bytes:
    """Decrypt what `seal` encrypted.

    Raises:
        RunError: if it was changed on its way, or is of another sender, receiver or round.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, ciphertext, context.encode())
    except InvalidTag as err:
        raise RunError(f"{context}: the encrypted shares were changed on their way") from err


class MaskStream:
    """The numbers of a mask, uniform modulo 2^64, in sequence.

    Args:
        key: of the mask; equal keys give equal masks.
    """

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        self._cipher = Cipher(algorithms.ChaCha20(key, _START), mode=None).encryptor()

    def draw(self, count: int) -> Tensor:
        """Return the next numbers, int64 [count]; at most `_CHUNK_VALUES`."""
        buffer = bytearray(8 * count)
        self._cipher.update_into(_ZEROS[: 8 * count], buffer)
        return torch.frombuffer(buffer, dtype=torch.int64)


def add_mask(key: bytes, common: Tensor, table: Tensor, rows: Tensor | None, sign: int) -> None:
    """Add a mask in place, modulo 2^64.

    Args:
        key: of the mask.
        common: int64 [num_common], masked as a whole.
        table: int64 [num_rows, width].
        rows: of the table that are masked, int64 [num_masked]; None for all.
        sign: 1 to add, -1 to subtract.
    """
    stream = MaskStream(key)
    for start in range(0, len(common), _CHUNK_VALUES):
        part = common[start : start + _CHUNK_VALUES]
        part.add_(stream.draw(len(part)), alpha=sign)
    width = table.shape[1]
    step = max(_CHUNK_VALUES // max(width, 1), 1)
    num_masked = len(table) if rows is None else len(rows)
    for start in range(0, num_masked, step):
        stop = min(start + step, num_masked)
        values = stream.draw((stop - start) * width).view(stop - start, width)
        if rows is None:
            table[start:stop].add_(values, alpha=sign)
        else:
            table.index_add_(0, rows[start:stop], values, alpha=sign)
