"""The search of a message for what is private to a client."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.federated.client import Client

NUM_TOGETHER = 4  # neighbouring values that make up a secret: chance does not bring them together


@dataclasses.dataclass
class Secrets:
    """What is private to a client, as byte patterns of neighbouring values.

    Attributes:
        floats: kind -> patterns in half precision, in which every other precision is searched too.
        integers: kind -> patterns in 64 bits.
    """

    floats: dict[str, set[bytes]]
    integers: dict[str, set[bytes]]


def secrets(client: Client) -> Secrets:
    """Collect a client's features and triples, in local and global ids, in rows and columns, and its private rows.

    These are the relation embeddings; of a strategy that declares to share relations, the entity embeddings.
    """
    private = "relation" if client.strategy.shares == "entity" else "global/entity"
    rows = client.values.params[private].detach().numpy().reshape(-1, client.values.params[private].shape[-1])
    features = [row for item in client.data.features.values() for row in item.values]
    triples: set[bytes] = set()
    for group in client.data.groups:
        for local in group.triples.values():
            for ids in (local, _global_ids(client.data, local)):
                starts = range(0, max(len(ids) - 1, 0), 2)
                triples |= _patterns([ids[i : i + 2].ravel() for i in starts], np.int64, 6)
                triples |= _patterns([ids[:, 0], ids[:, 2]], np.int64, 6)
    return Secrets(
        {
            f"{private.removeprefix('global/')} embedding": _patterns(list(rows), np.float16, NUM_TOGETHER),
            "raw feature": _patterns(features, np.float16, NUM_TOGETHER),
        },
        {"triple": triples},
    )


def _global_ids(data: Any, triples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    columns = data.entity_ids[triples[:, 0]], data.relation_ids[triples[:, 1]], data.entity_ids[triples[:, 2]]
    return np.column_stack(columns)


def _patterns(rows: list[np.ndarray[Any, Any]], form: Any, num_together: int) -> set[bytes]:
    """Take the first values of each row, if they are not all alike."""
    starts = [row[:num_together].astype(form) for row in rows if len(row) >= num_together]
    return {start.tobytes() for start in starts if len(np.unique(start)) >= 3}


def leaks(message: Any, held: Secrets) -> list[str]:
    """Name what a message holds that it must not."""
    found = []
    for path, leaf in leaves(message):
        if isinstance(leaf, Tensor):
            found += [f"{path} holds a {kind}" for kind in _kinds_in(leaf.detach(), held)]
        elif isinstance(leaf, str | bytes):
            found.append(f"{path} is a text")
        elif leaf is not None and not isinstance(leaf, bool | int | float):
            found.append(f"{path} is a {type(leaf).__name__}")
    return found


def _kinds_in(tensor: Tensor, held: Secrets) -> set[str]:
    """Search a tensor for secrets, along each of its dimensions."""
    if tensor.dtype == torch.bool:
        return set()
    orders = [tensor.movedim(dim, -1).contiguous() for dim in range(tensor.dim())]
    halves = [order.half().numpy().tobytes() for order in orders]
    wholes = [order.long().numpy().tobytes() for order in orders]
    return {
        kind
        for contents, secret in ((halves, held.floats), (wholes, held.integers))
        for kind, patterns in secret.items()
        if any(pattern in content for pattern in patterns for content in contents)
    }


def leaves(message: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value in a message with its path."""
    if dataclasses.is_dataclass(message):
        # Not `fields`: what was put there without being declared is a value too.
        for name, value in vars(message).items():
            yield from leaves(value, f"{path}.{name}")
    elif isinstance(message, dict):
        for name, value in message.items():
            yield from leaves(value, f"{path}[{name}]")
    elif isinstance(message, list | tuple):
        for value in message:
            yield from leaves(value, path)
    else:
        yield path, message
