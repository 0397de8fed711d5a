"""Sums of masked updates modulo 2^64: in any order, at the server, or in parts at the actors that hold clients."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.errors import RunError
from fedsim.federated.aggregation import Tally
from fedsim.federated.message_checks import Rejection
from fedsim.privacy.secure_aggregation.messages import MaskedUpdate, check_numbers


@dataclass(frozen=True)
class PartialMaskedSums:
    """The masked updates of several clients in one message, from an actor that holds them to the server.

    Attributes:
        round_num: the round, from 1.
        clients: whose updates are in it.
        table: int64 [num_rows, width].
        common: int64 [num_common].
        rejected: updates that were refused before they were masked, and are in no sum.
        seconds: of summing, of the slowest actor.
    """

    round_num: int
    clients: tuple[int, ...]
    table: Tensor
    common: Tensor
    rejected: tuple[Rejection, ...]
    seconds: float


class MaskedSums(Tally):
    """All that is summed in a round.

    Args:
        round_num: the round, from 1.
        num_rows: of the global id space.
        width: of a row.
        num_common: numbers that all clients send.
        ownership: client -> the global ids of its rows, sorted, int64 [num_rows]; None if it is hidden, and all clients
            send all rows.
    """

    def __init__(
        self, round_num: int, num_rows: int, width: int, num_common: int, ownership: Mapping[int, Tensor] | None
    ) -> None:
        super().__init__()
        self.round_num, self.ownership = round_num, ownership
        self.table = torch.zeros(num_rows, width, dtype=torch.int64)
        self.common = torch.zeros(num_common, dtype=torch.int64)

    def rows_of(self, client: int) -> Tensor | None:
        """Return the rows that a client sends, int64 [num_rows]; None for all."""
        return None if self.ownership is None else self.ownership[client]

    def rows_in_common(self, client: int, others: Iterable[int]) -> dict[int, Tensor] | None:
        """Return, for each other client, which of this client's rows it has too, bool [num_rows]; None if hidden."""
        if self.ownership is None:
            return None
        own = self.ownership[client]
        return {other: torch.isin(own, self.ownership[other], assume_unique=True) for other in others}

    def add(self, update: MaskedUpdate | Rejection) -> None:
        """Add one client's masked update, in any order; or note that it has none, which makes it a dropout.

        Raises:
            RunError: if it is of another round, of the wrong shape, came twice or from a client that is not registered.
        """
        started = time.perf_counter()
        if isinstance(update, Rejection):
            self.rejected.append(update)
            return
        if not isinstance(update, MaskedUpdate):
            raise RunError(f"round {self.round_num}: what arrived is no masked update but a {type(update).__name__}")
        check_numbers(update, "client", "round_num")
        who = f"client {update.client}, round {update.round_num}"
        if update.round_num != self.round_num:
            raise RunError(f"{who}: the masked update is stale, the server is in round {self.round_num}")
        if update.client in self.received:
            raise RunError(f"{who}: a second masked update in the same round")
        if self.ownership is not None and update.client not in self.ownership:
            raise RunError(f"{who}: a masked update of a client that is not registered")
        rows = self.rows_of(update.client)
        num_rows, width = self.table.shape
        update.check(num_rows if rows is None else len(rows), width, len(self.common))
        if rows is None:
            self.table += update.table
        else:
            self.table.index_add_(0, rows, update.table)
        self.common += update.common
        self.received.add(update.client)
        self.own_seconds += time.perf_counter() - started

    def merge(self, partial: PartialMaskedSums) -> None:
        """Add the sums of several clients.

        Raises:
            RunError: if they are of another round, or hold the update of a client that is there already.
        """
        started = time.perf_counter()
        if partial.round_num != self.round_num:
            raise RunError(f"masked sums of round {partial.round_num} are stale, this is round {self.round_num}")
        twice = self.received.intersection(partial.clients)
        if twice:
            raise RunError(f"client {min(twice)}, round {self.round_num}: a second masked update in the same round")
        self.table += partial.table
        self.common += partial.common
        self.received.update(partial.clients)
        self.rejected += partial.rejected
        self.merged_seconds = max(self.merged_seconds, partial.seconds)
        self.own_seconds += time.perf_counter() - started

    def partial(self) -> PartialMaskedSums:
        """Return the sums as a message."""
        clients = tuple(sorted(self.received))
        return PartialMaskedSums(self.round_num, clients, self.table, self.common, tuple(self.rejected), self.seconds)
