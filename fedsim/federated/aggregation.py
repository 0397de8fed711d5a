"""Exact, order-independent sums of the clients' updates (method.md eq. 3 and 11).

Float addition is not associative, so a sum would depend on who arrives first. Values are encoded as int64 fixed
point with 40 fractional bits; integer addition is exact, so any order of arrival and any partial sums give the same
bits. Secure aggregation needs this encoding too.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.errors import RunError
from fedsim.federated.compression import check_rows, decode_message
from fedsim.federated.messages import ClientUpdate, SentRows, SoftQueries, check_finite
from fedsim.federation_config import CommunicationConfig

FRACTION_BITS = 40
SCALE = float(1 << FRACTION_BITS)
_LIMIT = float(1 << 12)  # |value| below 4096 leaves room for 2,048 summands in 63 bits; see `range_limit` for more
_CHUNK_VALUES = 1 << 17  # encoded at once, so that temporaries stay in the processor's cache


def encode(values: Tensor) -> Tensor:
    """Encode floats that are in range as int64 fixed point.

    Scaling by a power of two is exact in single precision too, so no doubles are made of it.
    """
    return (values * SCALE).round_().to(torch.int64)


def range_limit(num_summands: int) -> float:
    """Return the bound on |value| under which so many encoded values can be summed in 63 bits."""
    return min(_LIMIT, 2.0 ** (63 - FRACTION_BITS) / max(num_summands, 1))


def in_range(values: Tensor, limit: float = _LIMIT) -> bool:
    """Return whether all values are finite and small enough to be summed exactly."""
    if not values.numel():
        return True
    low, high = values.aminmax()  # a NaN becomes both
    return bool((low > -limit) & (high < limit))


def check_range(values: Tensor, name: str, limit: float = _LIMIT) -> None:
    """Raise RunError if a value is not finite or too large to be summed exactly."""
    if not in_range(values, limit):
        largest = float(values.abs().max())
        raise RunError(
            f"'{name}' holds {largest}, beyond what can be summed ({limit:.0f}); lower training.learning_rate"
        )


def decode(total: Tensor, weight: Tensor) -> Tensor:
    """Turn a fixed-point sum and its weight (a count, or a fixed-point sum of weights) into a float32 mean."""
    return (total.double() / weight.double()).float()


class RowMean:
    """Running mean of rows over the clients that sent them: G[e] of eq. 3, Z_m[e] of eq. 11.

    Args:
        num_rows: rows of the table.
        dim: width of a row.
    """

    def __init__(self, num_rows: int, dim: int) -> None:
        self.total = torch.zeros(num_rows, dim, dtype=torch.int64)
        self.counts = torch.zeros(num_rows, dtype=torch.int64)

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Add values [n, dim], checked by `in_range`, at distinct rows, int64 [n]."""
        step = max(_CHUNK_VALUES // self.total.shape[1], 1)
        in_sequence = bool((rows[1:] - rows[:-1] == 1).all())
        for start in range(0, len(rows), step):
            places, encoded = rows[start : start + step], encode(values[start : start + step])
            if in_sequence:  # no look-up for a client that owns all entities
                first = int(places[0])
                self.total[first : first + len(places)] += encoded
            else:
                self.total.index_add_(0, places, encoded)
        self.counts[rows] += 1

    def merge(self, total: Tensor, counts: Tensor) -> None:
        """Add another running mean's sums."""
        self.total += total
        self.counts += counts

    def result(self, previous: Tensor) -> Tensor:
        """Return the mean where anything was added and `previous` elsewhere, [num_rows, dim]."""
        present = self.counts > 0
        mean = previous.clone()
        mean[present] = decode(self.total[present], self.counts[present].unsqueeze(1) * SCALE)
        return mean


class ModuleMean:
    """Running mean of the shared modules, weighted by training triples (eq. 3)."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.weight = torch.zeros((), dtype=torch.int64)

    def add(self, modules: Mapping[str, Tensor], share: float) -> None:
        """Add one client's modules, checked by `in_range`, weighted by its share (0..1) of all training triples."""
        weight = torch.tensor(share, dtype=torch.float64)
        encoded = {name: encode(value.double() * weight) for name, value in modules.items()}
        self.merge(encoded, (weight * SCALE).round().to(torch.int64))

    def merge(self, totals: Mapping[str, Tensor], weight: Tensor) -> None:
        """Add another running mean's sums."""
        for name, total in totals.items():
            self.totals[name] = self.totals[name] + total if name in self.totals else total
        self.weight += weight

    def result(self, previous: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weighted means, or `previous` if nothing was added."""
        return {name: decode(total, self.weight) for name, total in self.totals.items()} or previous


@dataclass(frozen=True)
class SumShape:
    """What a round's sums need to know of the federation.

    Attributes:
        num_entities: size of the global id space.
        dim: width of a row.
        num_modalities: of which tokens are summed; 0 without prototypes.
        num_clients: of the federation.
        num_triples: training triples of all clients.
        communication: precision and share of the rows that updates bring.
        keeps_rows: whether each client's rows are kept beside their sum.
    """

    num_entities: int
    dim: int
    num_modalities: int
    num_clients: int
    num_triples: int
    communication: CommunicationConfig
    keeps_rows: bool = False


@dataclass(frozen=True)
class PartialSums:
    """The updates of several clients in one message, from an actor that holds them to the server.

    Attributes:
        round_num: the round, from 1.
        clients: whose updates are in it.
        entity: fixed-point sums of rows, int64 [num_entities, dim].
        entity_counts: int64 [num_entities], clients that sent the row.
        modules: fixed-point weighted sums of the shared modules.
        module_weight: fixed-point sum of the weights, int64 [].
        tokens: fixed-point sums of projected tokens, int64 [num_modalities, num_entities, dim].
        token_counts: int64 [num_modalities, num_entities].
        soft_queries: client -> its soft queries, which are not summed.
        rows: client -> its rows, if the server keeps them; else empty.
        seconds: of checking and summing, of the slowest actor.
    """

    round_num: int
    clients: tuple[int, ...]
    entity: Tensor
    entity_counts: Tensor
    modules: dict[str, Tensor]
    module_weight: Tensor
    tokens: Tensor
    token_counts: Tensor
    soft_queries: dict[int, SoftQueries]
    rows: dict[int, SentRows]
    seconds: float


class RoundSums:
    """All that is summed in a round; its memory does not grow with the cohort (but for soft queries and kept rows).

    Args:
        shape: of the federation.
        round_num: the round, from 1.
        ownership: client -> the global ids of its entities, int64 [num_entities].
    """

    def __init__(self, shape: SumShape, round_num: int, ownership: Mapping[int, Tensor]) -> None:
        self.shape, self.round_num, self.ownership = shape, round_num, ownership
        self.rows = RowMean(shape.num_entities, shape.dim)
        self.modules = ModuleMean()
        self.tokens = [RowMean(shape.num_entities, shape.dim) for _ in range(shape.num_modalities)]
        self.soft_queries: dict[int, SoftQueries] = {}
        self.kept: dict[int, SentRows] = {}
        self.received: set[int] = set()
        self.own_seconds = self.merged_seconds = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of summing here, and at the slowest of those whose partial sums were merged."""
        return self.own_seconds + self.merged_seconds

    def add(self, update: ClientUpdate) -> None:
        """Add one client's update, in any order.

        Raises:
            RunError: if the update is of another round, of rows that the client does not own, came twice, or holds
                a value that is not finite or too large. The sums are not touched then.
        """
        started = time.perf_counter()
        update = decode_message(update)
        self._check(update)
        self.rows.add(update.entity_ids, update.entity)
        self.modules.add(update.modules, update.num_triples / self.shape.num_triples)
        if update.token_present is not None and update.tokens is not None:
            start = 0
            for index, mean in enumerate(self.tokens):
                rows = update.entity_ids[update.token_present[index]]
                mean.add(rows, update.tokens[start : start + len(rows)])
                start += len(rows)
        if update.soft_queries is not None:
            self.soft_queries[update.client] = update.soft_queries
        if self.shape.keeps_rows:
            self.kept[update.client] = SentRows(update.entity_ids, update.entity)
        self.received.add(update.client)
        self.own_seconds += time.perf_counter() - started

    def merge(self, partial: PartialSums) -> None:
        """Add the sums of several clients, checked update by update where they were made.

        Raises:
            RunError: if they are of another round, or hold the update of a client that is there already.
        """
        started = time.perf_counter()
        if partial.round_num != self.round_num:
            raise RunError(f"partial sums of round {partial.round_num} are stale, this is round {self.round_num}")
        twice = self.received.intersection(partial.clients)
        if twice:
            raise RunError(f"client {min(twice)}, round {self.round_num}: a second update in the same round")
        self.rows.merge(partial.entity, partial.entity_counts)
        self.modules.merge(partial.modules, partial.module_weight)
        for mean, total, counts in zip(self.tokens, partial.tokens, partial.token_counts, strict=True):
            mean.merge(total, counts)
        self.soft_queries |= partial.soft_queries
        self.kept |= partial.rows
        self.received.update(partial.clients)
        self.merged_seconds = max(self.merged_seconds, partial.seconds)
        self.own_seconds += time.perf_counter() - started

    def partial(self) -> PartialSums:
        """Return the sums as a message."""
        shape = self.shape
        tokens = torch.zeros(shape.num_modalities, shape.num_entities, shape.dim, dtype=torch.int64)
        counts = torch.zeros(shape.num_modalities, shape.num_entities, dtype=torch.int64)
        for index, mean in enumerate(self.tokens):
            tokens[index], counts[index] = mean.total, mean.counts
        return PartialSums(
            self.round_num,
            tuple(sorted(self.received)),
            self.rows.total,
            self.rows.counts,
            self.modules.totals,
            self.modules.weight,
            tokens,
            counts,
            self.soft_queries,
            self.kept,
            self.seconds,
        )

    def _check(self, update: ClientUpdate) -> None:
        """Refuse what does not belong into the sums, before any of it is added."""
        who = f"client {update.client}, round {update.round_num}"
        if update.round_num != self.round_num:
            raise RunError(f"{who}: the update is stale, the server is in round {self.round_num}")
        if update.client in self.received:
            raise RunError(f"{who}: a second update in the same round")
        if update.client not in self.ownership:
            raise RunError(f"{who}: an update of a client that is not registered")
        check_rows(self.shape.communication, update, self.ownership[update.client])
        limit = range_limit(self.shape.num_clients)
        parts = {"entity": update.entity, **update.modules}
        if update.tokens is not None:
            parts["tokens"] = update.tokens
        if update.soft_queries is None and all(in_range(value, limit) for value in parts.values()):
            return
        bad = check_finite(update)
        if bad is not None:
            raise RunError(f"{who}: '{bad}' in the update is not finite; lower training.learning_rate")
        for name, value in parts.items():
            check_range(value, f"{who}: {name}", limit)
