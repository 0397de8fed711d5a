"""Which names are the same at several clients, without telling anybody the names (docs/security.md).

Union, for the ids of a federation: a name is hashed to a point P of Curve25519, every client multiplies it by a secret
of its own, one after the other, and since multiplications commute, k_1 k_2 ... k_C P is the same whoever began. The
server, which passes the points on, compares them at the end and numbers them. It learns how many names each client
has, how many there are in all, and which ids each client has; not a name, nor can it try names out, as it would have to
know all secrets. A client learns the ids of its own names, and how many the others have.

Intersection of two clients: the first learns which of its names the second has, and how many that one has in all.

Sources: Meadows, IEEE Symposium on Security and Privacy 1986, and Huberman, Franklin and Hogg, EC 1999, for two;
Vaidya and Clifton, Journal of Computer Security 2005, for the ring of many. Hashing by trying: Boneh, Lynn and Shacham,
ASIACRYPT 2001. All parties are honest but curious. Multiplication is X25519 (RFC 7748) of the library `cryptography`,
which works on the x coordinate alone.
"""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from fedsim.errors import DataError

POINT_BYTES = 32
_P = 2**255 - 19  # the field of Curve25519, y^2 = x^3 + A x^2 + x
_A = 486662


@dataclass(frozen=True)
class BlindedNames:
    """A client's names on their way from client to client; all that is ever sent of them.

    Attributes:
        owner: whose names they are.
        points: multiplied by the secrets of the owner and of those who had them before, in the owner's order.
    """

    owner: int
    points: tuple[bytes, ...]

    def check(self) -> None:
        """Raise DataError if a point has the wrong size."""
        if not isinstance(self.points, tuple) or not all(isinstance(point, bytes) for point in self.points):
            raise DataError(f"client {self.owner}: the blinded names are no points")
        wrong = [len(point) for point in self.points if len(point) != POINT_BYTES]
        if wrong:
            raise DataError(f"client {self.owner}: a blinded name has {wrong[0]} bytes instead of {POINT_BYTES}")


@dataclass(frozen=True)
class Union:
    """What the server knows in the end.

    Attributes:
        ids: client -> the ids of its names, in its own order of names; ids are 0 to `num_names` - 1.
        num_names: of all clients, each once.
        num_bytes: sent by all clients to each other and to the server; each client is sent as much.
    """

    ids: dict[int, tuple[int, ...]]
    num_names: int
    num_bytes: int


class AlignmentParty:
    """A client: it knows its names and its secret, and lets neither out.

    Args:
        client: the client's id.
        names: distinct; compared byte by byte in UTF-8, so that clients must agree how to write them.

    Raises:
        DataError: if a name is there twice.
    """

    def __init__(self, client: int, names: Sequence[str]) -> None:
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})[0]
            raise DataError(f"client {client}: the name '{twice}' is there twice, and can have one id only")
        self.client, self.names = client, tuple(names)
        self._secret = X25519PrivateKey.generate()
        self._order = list(range(len(names)))  # in which they are sent: that of a file would tell of the names
        secrets.SystemRandom().shuffle(self._order)

    def begin(self) -> BlindedNames:
        """Blind this client's own names."""
        points = tuple(hash_to_point(self.names[place]) for place in self._order)
        return self.blind(BlindedNames(self.client, points))

    def blind(self, names: BlindedNames) -> BlindedNames:
        """Multiply points by this client's secret.

        Raises:
            DataError: if there is something that is not a point.
        """
        names.check()
        try:
            points = tuple(self._secret.exchange(X25519PublicKey.from_public_bytes(point)) for point in names.points)
        except ValueError as err:
            raise DataError(f"client {names.owner}: what it sent for a name is not a point ({err})") from err
        return BlindedNames(names.owner, points)

    def in_own_order(self, values: Sequence[int]) -> tuple[int, ...]:
        """Bring what came back for this client's points into the order of its names."""
        found = [0] * len(values)
        for place, value in zip(self._order, values, strict=True):
            found[place] = value
        return tuple(found)


def private_union(parties: Sequence[AlignmentParty]) -> Union:
    """Number the names of all clients: each set goes from client to client once around, then to the server.

    The server draws the numbers. If they followed the points, whoever was the last to blind another's names could see
    from its own ids which of them it has too.
    """
    travelling = [party.begin() for party in parties]
    num_bytes = sum(len(names.points) for names in travelling) * POINT_BYTES * len(parties)
    for step in range(1, len(parties)):
        travelling = [parties[(place + step) % len(parties)].blind(names) for place, names in enumerate(travelling)]
    points = sorted({point for names in travelling for point in names.points})
    secrets.SystemRandom().shuffle(points)
    number = {point: index for index, point in enumerate(points)}
    ids = {
        party.client: party.in_own_order([number[point] for point in names.points])
        for party, names in zip(parties, travelling, strict=True)
    }
    return Union(ids, len(points), num_bytes)


def private_intersection(first: AlignmentParty, second: AlignmentParty) -> tuple[int, ...]:
    """Return the places of the first client's names that the second has too; the first learns them, nobody else."""
    own = second.blind(first.begin())
    others = set(first.blind(second.begin()).points)
    found = first.in_own_order([int(point in others) for point in own.points])
    return tuple(place for place, there in enumerate(found) if there)


def hash_to_point(name: str) -> bytes:
    """Hash a name to the x coordinate of a point of Curve25519: the first try that is one.

    One that is not lies on the curve's twist, and stays there under multiplication: whether it does would be a bit
    about the name that everybody sees.
    """
    for attempt in range(256):
        digest = hashlib.sha256(b"fedsim alignment/" + bytes([attempt]) + name.encode()).digest()
        x = int.from_bytes(digest, "little") % 2**255
        square = (x * x * x + _A * x * x + x) % _P
        if x < _P and square and pow(square, (_P - 1) // 2, _P) == 1:
            return x.to_bytes(POINT_BYTES, "little")
    raise AssertionError("half of all numbers are x coordinates")
