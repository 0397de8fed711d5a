"""Exact, order-independent sums of the clients' updates (method.md eq. 3 and 11).

Float addition is not associative, so a sum would depend on who arrives first. Values are encoded as int64 fixed
point with 40 fractional bits; integer addition is exact, so any order of arrival and any partial sums give the same
bits. Secure aggregation needs this encoding too.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedsim.errors import RunError
from fedsim.federated.compression import decode_message
from fedsim.federated.message_checks import Rejection, UpdateFormat, find_fault, find_oversized
from fedsim.federated.messages import ClientUpdate, SentRows, SoftQueries
from fedsim.federated.robust import CollectedModules, CollectedRows, make_aggregator
from fedsim.models.parameters import Params
from fedsim.robustness_config import RobustnessConfig

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
        """Add values [n, dim], checked to be in range, at distinct rows, int64 [n]."""
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
        """Add one client's modules, checked to be in range, weighted by its share (0..1) of all training triples."""
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
        form: what an update looks like.
        aggregator: what combines them, by name.
        robustness: its parameters, and the bound on an update's size.
        holds_updates: whether updates are compared before they are combined, and so held until the round ends.
        max_failed_clients: clients of a round whose update may be rejected.
        keeps_rows: whether each client's rows are kept beside their sum.
    """

    num_entities: int
    form: UpdateFormat
    aggregator: str
    robustness: RobustnessConfig
    holds_updates: bool
    max_failed_clients: int
    keeps_rows: bool = False

    @property
    def dim(self) -> int:
        """Return the width of a row."""
        return self.form.dim

    @property
    def num_modalities(self) -> int:
        """Return the number of modalities whose tokens are summed; 0 without prototypes."""
        return self.form.num_modalities

    @property
    def num_clients(self) -> int:
        """Return the number of clients of the federation."""
        return len(self.form.num_triples)

    @cached_property
    def num_triples(self) -> int:
        """Return the number of training triples of all clients."""
        return sum(self.form.num_triples.values())


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
        rejected: updates that were refused and are in no sum.
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
    rejected: tuple[Rejection, ...] = ()


class Tally:
    """Whose updates are in a round's sums, which were refused, and how long it took."""

    def __init__(self) -> None:
        self.received: set[int] = set()
        self.rejected: list[Rejection] = []
        self.own_seconds = self.merged_seconds = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of summing here, and at the slowest of those whose partial sums were merged."""
        return self.own_seconds + self.merged_seconds


class RoundSums(Tally):
    """All that is summed in a round; its memory does not grow with the cohort (but for soft queries and kept rows).

    With a robust aggregator or a bound on sizes the updates themselves are held until `close`: then it does.

    Args:
        shape: of the federation.
        round_num: the round, from 1.
        ownership: client -> the global ids of its entities, int64 [num_entities].
    """

    def __init__(self, shape: SumShape, round_num: int, ownership: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.shape, self.round_num, self.ownership = shape, round_num, ownership
        self.limit = range_limit(shape.num_clients)
        self.rows = self._table(shape.dim)
        aggregator = make_aggregator(shape.aggregator, shape.robustness)
        self.modules = ModuleMean() if aggregator is None else CollectedModules(aggregator)
        self.tokens = [self._table(shape.form.token_dim) for _ in range(shape.num_modalities)]
        self.soft_queries: dict[int, SoftQueries] = {}
        self.kept: dict[int, SentRows] = {}
        self.held: dict[int, ClientUpdate] = {}

    def add(self, update: ClientUpdate) -> None:
        """Check one client's update and add it, in any order; one that does not belong is rejected and changes nothing.

        Raises:
            RunError: if more clients are rejected than may fail.
        """
        started = time.perf_counter()
        fault = find_fault(update, self.shape.form, self.round_num, self.ownership, self.received, self.limit)
        if fault is not None:
            self._reject(fault)
            return
        update = decode_message(update)
        self.received.add(update.client)
        if self.shape.holds_updates:
            self.held[update.client] = update
        else:
            self._sum(update)
        self.own_seconds += time.perf_counter() - started

    def close(self, entity: Tensor, modules: Params) -> None:
        """Reject the held updates that change too much, and add the others in the order of their clients.

        Args:
            entity: the server's rows before this round.
            modules: its modules.

        Raises:
            RunError: if more clients are rejected than may fail.
        """
        started = time.perf_counter()
        ratio = self.shape.robustness.max_norm_ratio
        if ratio is not None:
            for fault in find_oversized(self.held, entity, modules, ratio, self.round_num):
                assert fault.client is not None, "held updates name their clients"
                del self.held[fault.client]
                self.received.discard(fault.client)
                self._reject(fault)
        for client in sorted(self.held):
            self._sum(self.held.pop(client))
        self.own_seconds += time.perf_counter() - started

    def merge(self, partial: PartialSums) -> None:
        """Add the sums of several clients, checked update by update where they were made.

        Raises:
            RunError: if they are of another round, hold the update of a client that is there already, or are not of
                the right form; or if more clients are rejected than may fail.
        """
        started = time.perf_counter()
        if partial.round_num != self.round_num:
            raise RunError(f"partial sums of round {partial.round_num} are stale, this is round {self.round_num}")
        twice = self.received.intersection(partial.clients)
        if twice:
            raise RunError(f"client {min(twice)}, round {self.round_num}: a second update in the same round")
        self._check_form(partial)
        rows, modules, tokens = self._means()
        rows.merge(partial.entity, partial.entity_counts)
        modules.merge(partial.modules, partial.module_weight)
        for mean, total, counts in zip(tokens, partial.tokens, partial.token_counts, strict=True):
            mean.merge(total, counts)
        self.soft_queries |= partial.soft_queries
        self.kept |= partial.rows
        self.received.update(partial.clients)
        self.merged_seconds = max(self.merged_seconds, partial.seconds)
        self.own_seconds += time.perf_counter() - started
        for fault in partial.rejected:
            self._reject(fault)

    def partial(self) -> PartialSums:
        """Return the sums as a message."""
        rows, modules, means = self._means()
        form, num_entities = self.shape.form, self.shape.num_entities
        tokens = torch.zeros(form.num_modalities, num_entities, form.token_dim, dtype=torch.int64)
        counts = torch.zeros(form.num_modalities, num_entities, dtype=torch.int64)
        for index, mean in enumerate(means):
            tokens[index], counts[index] = mean.total, mean.counts
        return PartialSums(
            self.round_num,
            tuple(sorted(self.received)),
            rows.total,
            rows.counts,
            modules.totals,
            modules.weight,
            tokens,
            counts,
            self.soft_queries,
            self.kept,
            self.seconds,
            tuple(self.rejected),
        )

    def _table(self, dim: int) -> RowMean | CollectedRows:
        aggregator = make_aggregator(self.shape.aggregator, self.shape.robustness)
        num_rows = self.shape.num_entities
        return RowMean(num_rows, dim) if aggregator is None else CollectedRows(aggregator, num_rows)

    def _means(self) -> tuple[RowMean, ModuleMean, list[RowMean]]:
        """Return the running means, which alone make partial sums."""
        assert not self.shape.holds_updates, "updates that are held are sent one by one"
        assert isinstance(self.rows, RowMean)
        assert isinstance(self.modules, ModuleMean)
        return self.rows, self.modules, [mean for mean in self.tokens if isinstance(mean, RowMean)]

    def _sum(self, update: ClientUpdate) -> None:
        """Add an update that was checked."""
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

    def _reject(self, fault: Rejection) -> None:
        """Count and name an update that was refused; stop the run if too many clients failed."""
        self.rejected.append(fault)
        num_failed = len({item.client for item in self.rejected})
        allowed = self.shape.max_failed_clients
        if num_failed <= allowed:
            return
        if allowed == 0:
            raise RunError(f"{fault.message}, or raise federation.max_failed_clients to go on without such updates")
        raise RunError(
            f"round {self.round_num}: updates of {num_failed} clients were rejected, more than "
            f"federation.max_failed_clients {allowed}; the first: {self.rejected[0].message}"
        )

    def _check_form(self, partial: PartialSums) -> None:
        """Refuse partial sums that no checked updates can have made.

        Raises:
            RunError: naming the part.
        """
        form, num = self.shape.form, self.shape.num_entities
        shapes: dict[str, tuple[Tensor, tuple[int, ...]]] = {
            "entity": (partial.entity, (num, form.dim)),
            "entity_counts": (partial.entity_counts, (num,)),
            "module_weight": (partial.module_weight, ()),
            "tokens": (partial.tokens, (form.num_modalities, num, form.token_dim)),
            "token_counts": (partial.token_counts, (form.num_modalities, num)),
        }
        sent = form.modules if partial.clients else {}
        shapes |= {f"modules.{name}": (value, sent.get(name, ())) for name, value in partial.modules.items()}
        wrong = [name for name, (value, shape) in shapes.items() if (value.dtype, value.shape) != (torch.int64, shape)]
        if partial.modules.keys() != sent.keys():
            wrong.append("modules")
        for name in ("entity_counts", "token_counts"):
            counts = getattr(partial, name)
            if (
                name not in wrong
                and counts.numel()
                and not 0 <= int(counts.min()) <= int(counts.max()) <= len(partial.clients)
            ):
                wrong.append(name)
        if wrong:
            named = ", ".join(map(str, partial.clients))
            raise RunError(f"round {self.round_num}: '{wrong[0]}' in the partial sums of clients {named} is malformed")
