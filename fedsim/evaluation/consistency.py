"""Semantic consistency: do clients mean the same by an entity? See method.md section 7.

Mean cosine, between clients, of the hyper-modal embeddings of the entities that they share. This is an instrument of
the simulation, not a message of the protocol: no client or server ever reads it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from fedsim.federated.aggregation import SCALE, encode

if TYPE_CHECKING:
    from fedsim.federated.client import Client

MAX_SHARED = 4096  # entities compared; their sums are what the instrument keeps


@dataclass(frozen=True)
class TokenSample:
    """One client's hyper-modal embeddings of shared entities.

    Attributes:
        entity_ids: global ids, int64 [num_shared].
        tokens: view -> [num_tokens, num_shared, dim].
        names: token names, structure first.
    """

    entity_ids: Tensor
    tokens: dict[str, Tensor]
    names: tuple[str, ...]


@dataclass(frozen=True)
class ConsistencySums:
    """Sums over clients of the unit vectors of shared entities; exact, and as large for many clients as for few.

    Attributes:
        owners: clients per entity, int64 [num_shared].
        units: ``<view>/<token>`` -> fixed-point sums of unit vectors, int64 [num_shared, width].
        squares: ``<view>/<token>`` -> fixed-point sums of their squared lengths, int64 [num_shared].
    """

    owners: Tensor
    units: dict[str, Tensor]
    squares: dict[str, Tensor]


def shared_entities(owned: Mapping[int, Tensor]) -> Tensor:
    """Return the sorted global ids that at least two clients own; of many, `MAX_SHARED` at even distances."""
    ids, counts = torch.cat(list(owned.values())).unique(return_counts=True)
    found: Tensor = ids[counts >= 2]
    if len(found) > MAX_SHARED:
        found = found[torch.arange(MAX_SHARED) * len(found) // MAX_SHARED]
    return found


def sample_tokens(client: "Client", shared: Tensor, round_num: int) -> TokenSample:
    """Take a client's complete hyper-modal embeddings of the shared entities that it owns."""
    mine = torch.isin(client.entity_ids, shared)
    tokens = {
        view: client.complete_tokens(view, round_num)[0][:, mine.to(client.device)].cpu()
        for view in client.strategy.views
    }
    return TokenSample(client.entity_ids[mine], tokens, ("structure", *client.model.feature_dims))


def sum_samples(samples: Iterable[TokenSample], shared: Tensor) -> ConsistencySums:
    """Add up what clients hold of the shared entities, sorted int64 [num_shared], one client after the other."""
    sums = ConsistencySums(torch.zeros(len(shared), dtype=torch.int64), {}, {})
    for sample in samples:
        rows = torch.searchsorted(shared, sample.entity_ids)
        sums.owners[rows] += 1
        for view, tokens in sample.tokens.items():  # [num_tokens, num_rows, dim]
            parts = dict(zip(sample.names, tokens, strict=True)) | {"total": tokens.transpose(0, 1).flatten(1)}
            for name, values in parts.items():
                unit = functional.normalize(values, dim=-1)
                width, key = unit.shape[1], f"{view}/{name}"
                total = sums.units.setdefault(key, torch.zeros(len(shared), width, dtype=torch.int64))
                total.index_add_(0, rows, encode(unit))
                squares = sums.squares.setdefault(key, torch.zeros(len(shared), dtype=torch.int64))
                squares.index_add_(0, rows, encode(unit.square().sum(-1)))
    return sums


def merge_sums(parts: Sequence[ConsistencySums]) -> ConsistencySums:
    """Add up the sums of several groups of clients."""
    owners = torch.stack([part.owners for part in parts]).sum(0)
    units, squares = (
        {name: sum((table[name] for table in tables[1:]), tables[0][name]) for name in tables[0]}
        for tables in ([part.units for part in parts], [part.squares for part in parts])
    )
    return ConsistencySums(owners, units, squares)


def semantic_consistency(sums: ConsistencySums) -> dict[str, float]:
    """Return ``<view>/<token>`` and ``<view>/total``: mean cosine over all (entity, pair of its owners).

    ``total`` compares the tokens of an entity side by side, as one object.
    """
    owners = sums.owners.double()
    num_pairs = float((owners * (owners - 1)).sum())
    if num_pairs == 0:
        return {}
    results = {}
    for name, total in sums.units.items():
        # The sum over ordered pairs of u_a . u_b is |sum u|^2 - sum |u|^2.
        length = total.double().div(SCALE).square().sum()
        results[name] = float((length - sums.squares[name].double().div(SCALE).sum()) / num_pairs)
    return results
