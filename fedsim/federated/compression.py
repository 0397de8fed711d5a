"""Smaller messages: half precision, and only the rows that changed most (method.md section 5).

Source of the second: FedS (Zhang et al., "Communication-Efficient Federated Knowledge Graph Embedding with Entity-Wise
Top-K Sparsification", arXiv 2406.13225), of which we know the abstract: clients send the Top-K entity rows that
changed most, the server sends each client its Top-K, and now and then all rows are synchronised. The rest is inferred.

Client and server both know R_c[e], the value of row e that last crossed between them, in either direction. In a full
round (1, 1 + `full_every`, ...) all rows cross, both ways. In any other round (eq. 14)

- down: the K rows with the largest ||G[e] - R_c[e]||. The client's global copy takes them over and keeps its own last
  value of the others, so that small changes add up until they are worth sending;
- up: the K rows with the largest ||G_c[e] - R_c[e]||. The mean of eq. 3 is over the clients that sent a row, and a row
  that nobody sent keeps the server's value;

with K = `top_k` times the client's entities, at least one; of equal changes the lower id comes first. Tokens and
prototypes go with the row of their entity; modules and soft queries are always sent. A deployed server would hold R_c
for each client; here the copy at the client serves both ends, and only what the rule picks crosses.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedsim.errors import RunError
from fedsim.federated.messages import Broadcast, ClientUpdate, PrototypeTable
from fedsim.federation_config import CommunicationConfig
from fedsim.models.client_model import Prototypes
from fedsim.models.parameters import Params

M = TypeVar("M", Broadcast, ClientUpdate)


@dataclass
class SentTokens:
    """Tokens that a client last sent, as they arrived.

    Attributes:
        values: [num_modalities, num_entities, dim].
        rounds: the round each went in, int64 [num_modalities, num_entities]; 0 for never.
    """

    values: Tensor
    rounds: Tensor


class Exchange:
    """A client's end of the exchange: picks, encodes and unpacks what crosses, and remembers it; all on the CPU.

    Args:
        config: precision and share of rows.
        client: the client's id, for messages.
        entity_ids: global ids of its entities, sorted, int64 [num_entities].
    """

    def __init__(self, config: CommunicationConfig, client: int, entity_ids: Tensor) -> None:
        self.config, self.client, self.entity_ids = config, client, entity_ids
        self.exchanged: Tensor | None = None  # R_c, [num_entities, dim]; None if all rows are always sent
        self.sent: SentTokens | None = None

    def download(self, broadcast: Broadcast) -> Broadcast:
        """Make the message that the server sends this client.

        Args:
            broadcast: the server's model for all of this client's entities.

        Raises:
            RunError: if a number is too large for the precision.
        """
        rows = self._changed(broadcast.round_num, broadcast.entity)
        if rows is not None:
            prototypes = broadcast.prototypes.for_entities(rows) if broadcast.prototypes is not None else None
            broadcast = replace(broadcast, entity=broadcast.entity[rows], prototypes=prototypes, rows=rows)
        message = self._encode(broadcast, broadcast.round_num)
        self._remember(rows, message.entity)
        return message

    def unpack(
        self, broadcast: Broadcast, own: Tensor | None, known: Prototypes | None
    ) -> tuple[Params, Prototypes | None]:
        """Return what a client has after a message of `download`.

        Args:
            broadcast: the message.
            own: the client's rows before, [num_entities, dim]; None before the first exchange.
            known: the prototypes it had before.

        Returns:
            ``entity`` and the shared modules; and the prototypes, the client's own tokens taken out.
        """
        arrived = decode_message(broadcast)
        entity, rows = arrived.entity, arrived.rows
        if rows is not None:
            assert own is not None, "the first exchange is a full one"
            entity = own.cpu().index_copy(0, rows, entity)
        params = {"entity": entity, **arrived.modules}
        if arrived.prototypes is None:
            return params, known
        prototypes = self._of_others(arrived.prototypes, rows)
        device = own.device if own is not None else entity.device
        if rows is not None:
            values = entity.new_zeros(len(prototypes.values), *entity.shape)
            present = torch.zeros(values.shape[:2], dtype=torch.bool)
            if known is not None:
                values, present = known.values.cpu(), known.present.cpu()
            prototypes = Prototypes(
                values.index_copy(1, rows, prototypes.values), present.index_copy(1, rows, prototypes.present)
            )
        return params, Prototypes(prototypes.values.to(device), prototypes.present.to(device))

    def upload(self, update: ClientUpdate) -> ClientUpdate:
        """Make the message that this client sends, of an update with all of its entities.

        Raises:
            RunError: if a number is too large for the precision.
        """
        rows = self._changed(update.round_num, update.entity)
        if rows is not None:
            present, tokens = update.token_present, update.tokens
            if present is not None and tokens is not None:
                kept = torch.zeros(present.shape[1], dtype=torch.bool)
                kept[rows] = True
                tokens = tokens[kept.expand_as(present)[present]]
                present = present[:, rows]
            ids, entity = update.entity_ids[rows], update.entity[rows]
            update = replace(update, entity_ids=ids, entity=entity, token_present=present, tokens=tokens)
        message = self._encode(update, update.round_num)
        self._remember(rows, message.entity)
        if message.token_present is not None and message.tokens is not None:
            self._remember_tokens(message.round_num, rows, message.token_present, message.tokens.float())
        return message

    def state(self) -> Params:
        """Return what must be kept between rounds."""
        state = {} if self.exchanged is None else {"rows": self.exchanged}
        if self.sent is not None:
            state |= {"tokens": self.sent.values, "token_rounds": self.sent.rounds}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.exchanged = state.get("rows")
        self.sent = SentTokens(state["tokens"], state["token_rounds"]) if "tokens" in state else None

    def _changed(self, round_num: int, entity: Tensor) -> Tensor | None:
        """Pick the positions of the rows to send, sorted, int64 [num_rows]; None for all."""
        count = num_rows_sent(self.config, round_num, len(entity))
        if count is None:
            return None
        assert self.exchanged is not None, "the first exchange is a full one"
        change = (entity - self.exchanged).square().sum(1)
        return change.argsort(descending=True, stable=True)[:count].sort().values

    def _remember(self, rows: Tensor | None, sent: Tensor) -> None:
        """Keep the rows that crossed, as both sides know them."""
        if self.config.top_k is None:
            return
        if rows is None:
            self.exchanged = sent.float().clone()
        else:
            assert self.exchanged is not None, "the first exchange is a full one"
            self.exchanged = self.exchanged.index_copy(0, rows, sent.float())

    def _remember_tokens(self, round_num: int, rows: Tensor | None, present: Tensor, tokens: Tensor) -> None:
        """Keep the tokens that went up."""
        shape = (len(present), len(self.entity_ids))
        values = torch.zeros(*shape, tokens.shape[1]) if self.sent is None else self.sent.values.clone()
        rounds = torch.zeros(shape, dtype=torch.int64) if self.sent is None else self.sent.rounds.clone()
        modality, column = present.nonzero().T
        place = (modality, column if rows is None else rows[column])
        values[place] = tokens
        rounds[place] = round_num
        self.sent = SentTokens(values, rounds)

    def _of_others(self, table: PrototypeTable, rows: Tensor | None) -> Prototypes:
        """Take this client's own tokens out, or the denoiser would be shown what it has to recover."""
        values, counts = table.values, table.counts
        if self.sent is not None:
            tokens, rounds = self.sent.values, self.sent.rounds
            if rows is not None:
                tokens, rounds = tokens[:, rows], rounds[:, rows]
            own = (rounds > 0) & (table.rounds == rounds)
            counts = counts - own.to(counts.dtype)
            total = values * (counts + own).unsqueeze(-1) - tokens * own.unsqueeze(-1)
            values = torch.where(own.unsqueeze(-1), total / counts.clamp(min=1).unsqueeze(-1), values)
        has_any = counts > 0
        return Prototypes(values * has_any.unsqueeze(-1), has_any)

    def _encode(self, message: M, round_num: int) -> M:
        if self.config.dtype == "float32":
            return message
        who = f"client {self.client}, round {round_num}, {type(message).__name__}"
        encoded: M = _convert(message, lambda value, name: _to_half(value, f"{who}: '{name}'"))
        return encoded


def num_rows_sent(config: CommunicationConfig, round_num: int, num_entities: int) -> int | None:
    """Return how many of a client's rows cross in a round; None for all."""
    if config.top_k is None or round_num == 0 or (round_num - 1) % config.full_every == 0:
        return None
    return min(max(1, round(config.top_k * num_entities)), num_entities)


def decode_message(message: M) -> M:
    """Turn a message that arrived into float32."""
    if message.entity.dtype == torch.float32:
        return message
    decoded: M = _convert(message, lambda value, name: value.float())
    return decoded


def check_rows(config: CommunicationConfig, update: ClientUpdate, owned: Tensor) -> None:
    """Hold an update's entities to those that the client owns, sorted, int64 [num_entities].

    Raises:
        RunError: if there are others among them, one is there twice, or not as many as the round asks for.
    """
    ids = update.entity_ids
    who = f"client {update.client}, round {update.round_num}"
    count = num_rows_sent(config, update.round_num, len(owned))
    # The length first: by a stride of zero, a message of a few bytes can claim any number of ids.
    own = torch.equal(ids, owned) if count is None else len(ids) <= len(owned) and bool(torch.isin(ids, owned).all())
    if not own:
        raise RunError(f"{who}: the update has rows of entities that the client does not own")
    if count is not None and not (len(ids) == count and bool((ids.diff() > 0).all())):
        raise RunError(f"{who}: the update has {len(ids)} rows, in this round there must be {count}, sorted, each once")


def _to_half(value: Tensor, name: str) -> Tensor:
    half = value.half()
    if bool(torch.isfinite(value).all()) and not bool(torch.isfinite(half).all()):
        raise RunError(
            f"{name} holds {float(value.abs().max()):.6g}, beyond float16 ({torch.finfo(torch.float16).max:.0f}); "
            f"set communication.dtype to float32, or lower training.learning_rate"
        )
    return half


def _convert(value: Any, convert: Callable[[Tensor, str], Tensor], name: str = "") -> Any:
    """Convert every float tensor in a message; names are dotted paths."""
    if isinstance(value, Tensor):
        return convert(value, name) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _convert(item, convert, f"{name}.{key}") for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {item.name: getattr(value, item.name) for item in fields(value)}
        prefix = f"{name}." if name else ""
        return replace(value, **{key: _convert(item, convert, f"{prefix}{key}") for key, item in parts.items()})
    return value
