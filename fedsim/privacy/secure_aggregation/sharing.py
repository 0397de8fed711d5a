"""Shamir's secret sharing, of the library PyCryptodome: over GF(2^128), so a secret has 16 bytes.

The library is imported where it is used, as in `keys`.

Source: Shamir, "How to share a secret", Communications of the ACM 1979.
"""

import math
from collections.abc import Mapping


def threshold_of(share: float, num_clients: int) -> int:
    """Return t: the clients without whom nothing is unmasked, always more than half and at least two.

    More than half, so that no two groups of clients can be told different lists of those who dropped out.

    Args:
        share: of the clients, `secure_aggregation.threshold`.
        num_clients: that advertised keys or were asked to.
    """
    return max(math.ceil(share * num_clients - 1e-9), num_clients // 2 + 1, 2)


def split_secret(secret: bytes, threshold: int, num_shares: int) -> list[bytes]:
    """Split a secret of 16 bytes; the share at position i belongs to index i + 1."""
    from Crypto.Protocol.SecretSharing import Shamir

    return [share for _, share in Shamir.split(threshold, num_shares, secret)]


def join_shares(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Join a secret from at least `threshold` shares, index from 1 -> share."""
    from Crypto.Protocol.SecretSharing import Shamir

    chosen = sorted(shares.items())[:threshold]
    assert len(chosen) == threshold, "who joins has counted the shares"
    return bytes(Shamir.combine(chosen))
