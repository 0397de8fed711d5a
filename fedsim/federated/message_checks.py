"""What an update must be before it touches a sum: checked where it arrives, at the server or in an actor that sums.

An update that is not is rejected: it changes nothing, it is counted and named (client, round, reason), and its client
counts as failed in the round. `federation.max_failed_clients` says how many of them a round may have.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedsim.errors import RunError
from fedsim.federated.compression import check_rows
from fedsim.federated.messages import ClientUpdate, SoftQueries, check_finite
from fedsim.federation_config import CommunicationConfig
from fedsim.models.parameters import Params

Reason = Literal[
    "malformed",
    "unknown_client",
    "stale",
    "duplicate",
    "wrong_weight",
    "foreign_rows",
    "not_finite",
    "out_of_range",
    "oversized",
]
MIN_COMPARED = 3  # fewer updates have no median that one of them does not decide


@dataclass(frozen=True)
class Rejection:
    """An update that was refused.

    Attributes:
        client: the client that it names; None if it names none.
        round_num: the round in which it arrived, from 1.
        reason: what kind of fault.
        message: the fault in words, for people.
    """

    client: int | None
    round_num: int
    reason: Reason
    message: str


@dataclass(frozen=True)
class UpdateFormat:
    """What every update of a federation looks like.

    Attributes:
        dim: width of a row.
        token_dim: width of a projected token, and of a soft query.
        num_modalities: of which tokens are sent; 0 without prototypes.
        modules: name -> shape of each shared module.
        soft_queries: (parts, queries, most candidates); None if the strategy sends none.
        num_triples: client -> its training triples, as it said before the first round.
        communication: precision and share of the rows.
    """

    dim: int
    token_dim: int
    num_modalities: int
    modules: dict[str, tuple[int, ...]]
    soft_queries: tuple[int, int, int] | None
    num_triples: dict[int, int]
    communication: CommunicationConfig

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of all floats that are sent."""
        return torch.float16 if self.communication.dtype == "float16" else torch.float32


def find_fault(
    update: object,
    form: UpdateFormat,
    round_num: int,
    ownership: Mapping[int, Tensor],
    received: Collection[int],
    limit: float,
) -> Rejection | None:
    """Say what is wrong with an update that arrived, if anything is; whatever it is, this does not fail.

    Args:
        update: as it was sent, before its floats are decoded.
        form: what it must look like.
        round_num: the round that the server is in.
        ownership: client -> global ids of its rows, sorted, int64 [num_rows].
        received: clients whose update of this round is there already.
        limit: bound on |value| under which sums are exact.
    """

    def reject(reason: Reason, fault: str) -> Rejection:
        return Rejection(client, round_num, reason, f"{who}: {fault}")

    client: int | None = None
    who = f"round {round_num}"
    if not isinstance(update, ClientUpdate):
        return reject("malformed", f"what arrived is no update but a {type(update).__name__}")
    for name in ("client", "round_num", "num_triples"):
        if type(getattr(update, name)) is not int:
            return reject("malformed", f"'{name}' in the update is not a whole number")
    client, who = update.client, f"client {update.client}, round {update.round_num}"
    if client not in ownership:
        return reject("unknown_client", "an update of a client that is not registered")
    if update.round_num != round_num:
        return reject("stale", f"the update is stale, the server is in round {round_num}")
    if client in received:
        return reject("duplicate", "a second update in the same round")
    fault = next(_format_faults(update, form), None)
    if fault is not None:
        return reject("malformed", fault)
    if update.num_triples != form.num_triples.get(client, update.num_triples):
        said = form.num_triples[client]
        return reject("wrong_weight", f"the update claims {update.num_triples} training triples, registered are {said}")
    try:
        check_rows(form.communication, update, ownership[client])
    except RunError as err:
        return Rejection(client, round_num, "foreign_rows", str(err))
    if update.soft_queries is not None and not bool(
        torch.isin(update.soft_queries.candidates, ownership[client]).all()
    ):
        return reject("foreign_rows", "the update has soft queries about entities that the client does not own")
    return _value_fault(update, round_num, limit)


def find_oversized(
    updates: Mapping[int, ClientUpdate], entity: Tensor, modules: Params, ratio: float, round_num: int
) -> list[Rejection]:
    """Name the updates that change more than `ratio` times what the middle one changes.

    Compared are root mean squares: of the change of the rows sent, of the change of the modules, and of the tokens. Of
    an even number the lower middle one counts. Fewer than three updates are not compared.

    Args:
        updates: client -> its update of this round, in float32.
        entity: the server's rows, [num_rows, dim].
        modules: the server's modules.
        ratio: of the longest change to the median.
        round_num: the round.
    """
    if len(updates) < MIN_COMPARED:
        return []
    sizes = {client: _sizes(update, entity, modules) for client, update in sorted(updates.items())}
    rejections: dict[int, Rejection] = {}
    for part in ("rows", "modules", "tokens"):
        measured = {client: own[part] for client, own in sizes.items() if part in own}
        middle = sorted(measured.values())[(len(measured) - 1) // 2] if len(measured) >= MIN_COMPARED else 0.0
        for client, size in measured.items():
            if size > ratio * middle > 0:
                message = (
                    f"client {client}, round {round_num}: the update's {part} measure {size:.4g}, more than "
                    f"{ratio:g} times the cohort's median {middle:.4g} (robustness.max_norm_ratio)"
                )
                rejections.setdefault(client, Rejection(client, round_num, "oversized", message))
    return [rejections[client] for client in sorted(rejections)]


def in_range(values: Tensor, limit: float) -> bool:
    """Return whether all values are finite and small enough to be summed exactly."""
    if not values.numel():
        return True
    low, high = values.aminmax()  # a NaN becomes both
    return bool((low > -limit) & (high < limit))


def check_range(values: Tensor, name: str, limit: float) -> None:
    """Raise RunError if a value is not finite or too large to be summed exactly."""
    if not in_range(values, limit):
        largest = float(values.abs().max())
        raise RunError(f"{name} holds {largest}, beyond what can be summed ({limit:.0f}); lower training.learning_rate")


def _format_faults(update: ClientUpdate, form: UpdateFormat) -> Iterator[str]:
    """Yield what is not of the right type, dtype or shape; later checks rely on earlier ones."""
    yield from _wrong(update.entity_ids, "entity_ids", torch.int64, (None,))
    num_rows = len(update.entity_ids)
    yield from _wrong(update.entity, "entity", form.dtype, (num_rows, form.dim))
    if not isinstance(update.modules, dict) or update.modules.keys() != form.modules.keys():
        yield "'modules' of the update are not the shared modules"
        return
    for name, shape in form.modules.items():
        yield from _wrong(update.modules[name], f"modules.{name}", form.dtype, shape)
    if (update.token_present is None) != (update.tokens is None):
        yield "'token_present' and 'tokens' of the update go together"
    if update.token_present is not None:
        if not form.num_modalities:
            yield "the update has 'tokens', which the strategy does not send"
        yield from _wrong(update.token_present, "token_present", torch.bool, (form.num_modalities, num_rows))
        yield from _wrong(update.tokens, "tokens", form.dtype, (int(update.token_present.sum()), form.token_dim))
    soft = update.soft_queries
    if soft is not None:
        if form.soft_queries is None or not isinstance(soft, SoftQueries):
            yield "the update has 'soft_queries', which the strategy does not send"
            return
        num_parts, num_queries, most = form.soft_queries
        yield from _wrong(soft.queries, "soft_queries.queries", form.dtype, (num_parts, num_queries, form.token_dim))
        yield from _wrong(soft.candidates, "soft_queries.candidates", torch.int64, (num_queries, None))
        if soft.candidates.shape[1] > most:
            yield f"'soft_queries' have {soft.candidates.shape[1]} candidates each, more than {most}"
        yield from _wrong(soft.log_labels, "soft_queries.log_labels", form.dtype, tuple(soft.candidates.shape))


def _wrong(value: object, name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> Iterator[str]:
    """Yield a fault if a value is no tensor of that type and shape; None in a shape is any number."""
    if not isinstance(value, Tensor):
        yield f"'{name}' in the update is no tensor but a {type(value).__name__}"
        return
    if value.is_nested or value.is_meta:  # neither has a shape or numbers to look at
        yield f"'{name}' in the update is no plain tensor"
        return
    fits = value.dim() == len(shape) and all(
        wanted is None or wanted == size for wanted, size in zip(shape, value.shape, strict=False)
    )
    if value.dtype != dtype or not fits or value.layout != torch.strided:
        wanted_shape = ", ".join("any" if size is None else str(size) for size in shape)
        found = f"{_name(value.dtype)} [{', '.join(map(str, value.shape))}]"
        yield f"'{name}' in the update is {found} instead of {_name(dtype)} [{wanted_shape}]"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _value_fault(update: ClientUpdate, round_num: int, limit: float) -> Rejection | None:
    """Find a number that is not finite or too large to be summed."""
    parts = {"entity": update.entity, **update.modules}
    if update.tokens is not None:
        parts["tokens"] = update.tokens
    if update.soft_queries is None and all(in_range(value, limit) for value in parts.values()):
        return None
    who = f"client {update.client}, round {round_num}"
    bad = check_finite(update)
    if bad is not None:
        message = f"{who}: '{bad}' in the update is not finite; lower training.learning_rate"
        return Rejection(update.client, round_num, "not_finite", message)
    try:
        for name, value in parts.items():
            check_range(value, f"{who}: '{name}' in the update", limit)
    except RunError as err:
        return Rejection(update.client, round_num, "out_of_range", str(err))
    return None


def _sizes(update: ClientUpdate, entity: Tensor, modules: Params) -> dict[str, float]:
    """Measure the parts of an update as root mean squares."""
    sizes = {"rows": _root_mean_square([update.entity - entity[update.entity_ids]])}
    if modules:
        sizes["modules"] = _root_mean_square([update.modules[name] - modules[name] for name in sorted(modules)])
    if update.tokens is not None and len(update.tokens):
        sizes["tokens"] = _root_mean_square([update.tokens])
    return sizes


def _root_mean_square(values: list[Tensor]) -> float:
    flat = torch.cat([value.flatten() for value in values]).double()
    return float(flat.square().mean().sqrt()) if len(flat) else 0.0
