"""The messages between clients and server: all that ever leaves either side (method.md section 5).

A field that is not declared here cannot be sent. No triple, raw feature, text or picture is. A strategy declares what
its rows belong to (`Strategy.shares`): with ``entity`` no relation embedding is sent, with ``relation`` (FedR) no
entity row; ids and rows of a message are then those of relations.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.models.parameters import Params


@dataclass(frozen=True)
class PrototypeTable:
    """Prototypes Z_m[e] of eq. 11, over the server's entities or a client's.

    Attributes:
        values: [num_modalities, num_entities, dim].
        counts: int64 [num_modalities, num_entities], clients that contributed; 0 where there is no prototype.
        rounds: int64 [num_modalities, num_entities], the round they contributed in.
    """

    values: Tensor
    counts: Tensor
    rounds: Tensor

    def for_entities(self, rows: Tensor) -> "PrototypeTable":
        """Keep some entities' prototypes, int64 [num_rows]."""
        return PrototypeTable(self.values[:, rows], self.counts[:, rows], self.rounds[:, rows])


@dataclass(frozen=True)
class Broadcast:
    """Server to clients, once per round.

    As published by the server it covers all entities; `for_client` cuts out what one client is sent.

    Attributes:
        round_num: the round, from 1.
        entity: structure rows G, [num_entities, dim].
        modules: shared modules.
        prototypes: or None if the strategy has none (yet).
        rows: positions of the rows and prototypes among the client's entities, int64 [num_rows]; None if all are there.
        personal: client -> structure rows of its own, which it is sent in place of G's; None if all are sent G's.
    """

    round_num: int
    entity: Tensor
    modules: Params
    prototypes: PrototypeTable | None
    rows: Tensor | None = None
    personal: dict[int, Tensor] | None = None

    def for_client(self, client: int, ids: Tensor) -> "Broadcast":
        """Keep what one client is sent: the rows of its ids, int64 [num_rows], from its own table if it has one."""
        cut = self.for_entities(ids)
        own = (self.personal or {}).get(client)
        return cut if own is None else replace(cut, entity=own)

    def for_entities(self, entity_ids: Tensor) -> "Broadcast":
        """Keep G's rows of some entities, int64 [num_entities]."""
        prototypes = self.prototypes.for_entities(entity_ids) if self.prototypes is not None else None
        return Broadcast(self.round_num, self.entity[entity_ids], self.modules, prototypes)


@dataclass(frozen=True)
class SoftQueries:
    """Query vectors with soft labels over a few candidates (eq. 13).

    Attributes:
        queries: q = phi(head, relation), [num_parts, num_queries, dim].
        candidates: global entity ids, int64 [num_queries, num_candidates].
        log_labels: log probabilities at temperature tau, [num_queries, num_candidates].
    """

    queries: Tensor
    candidates: Tensor
    log_labels: Tensor


@dataclass(frozen=True)
class SentRows:
    """A client's rows apart from all sums, for a server that keeps them.

    Attributes:
        ids: global ids, sorted, int64 [num_rows].
        values: [num_rows, dim].
    """

    ids: Tensor
    values: Tensor


@dataclass(frozen=True)
class ClientUpdate:
    """Client to server, once per round.

    All of the client's entities are in it, or with `communication.top_k` those whose rows changed most.

    Attributes:
        client: the client's id.
        round_num: the round, from 1.
        num_triples: training triples, the weight of its modules.
        entity_ids: global ids of the entities in it, sorted, int64 [num_entities].
        entity: its rows of the global copy, [num_entities, dim].
        modules: its shared modules.
        token_present: bool [num_modalities, num_entities], o_m(e); None if the strategy sends no tokens.
        tokens: projected tokens x_m(e) of really available modalities, [num_present, dim], in the order of
            `token_present.nonzero()`.
        soft_queries: or None.
    """

    client: int
    round_num: int
    num_triples: int
    entity_ids: Tensor
    entity: Tensor
    modules: Params
    token_present: Tensor | None
    tokens: Tensor | None
    soft_queries: SoftQueries | None


@dataclass(frozen=True)
class ClientHello:
    """Client to server, before the first round: ownership and size.

    Attributes:
        client: the client's id.
        entity_ids: global ids of its entities, int64 [num_entities]; none if `secure_aggregation.hide_ownership`.
        num_triples: training triples.
    """

    client: int
    entity_ids: Tensor
    num_triples: int


Message = Broadcast | ClientUpdate | ClientHello


def message_bytes(message: Any) -> int:
    """Count the bytes of all arrays and numbers in a message (numbers count 8, and so do the ids that are keys)."""
    if message is None:
        return 0
    if isinstance(message, bytes):
        return len(message)
    if isinstance(message, tuple):
        return sum(message_bytes(value) for value in message)
    if isinstance(message, Tensor):
        return message.numel() * message.element_size()
    if isinstance(message, np.ndarray):
        return message.nbytes
    if isinstance(message, dict):
        return sum(message_bytes(value) + 8 * isinstance(key, int) for key, value in message.items())
    if isinstance(message, bool | int | float):
        return 8
    return sum(message_bytes(getattr(message, item.name)) for item in fields(message))


def check_finite(message: ClientUpdate) -> str | None:
    """Name the first field of an update that holds a NaN or infinity, or return None."""
    parts = {"entity": message.entity, **{f"modules.{name}": value for name, value in message.modules.items()}}
    if message.tokens is not None:
        parts["tokens"] = message.tokens
    if message.soft_queries is not None:
        parts["soft_queries"] = message.soft_queries.queries
        parts["soft_queries.log_labels"] = message.soft_queries.log_labels
    for name, value in parts.items():
        if not bool(torch.isfinite(value).all()):
            return name
    return None
