"""Semantic consistency: do clients mean the same by an entity? See method.md section 7.

Mean cosine, between clients, of the hyper-modal embeddings of the entities that they share. This is an instrument of
the simulation, not a message of the protocol: no client or server ever reads it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from fedsim.federated.client import Client


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


def shared_entities(owned: Mapping[int, Tensor]) -> Tensor:
    """Return the sorted global ids that at least two clients own."""
    ids, counts = torch.cat(list(owned.values())).unique(return_counts=True)
    found: Tensor = ids[counts >= 2]
    return found


def sample_tokens(client: "Client", shared: Tensor, round_num: int) -> TokenSample:
    """Take a client's complete hyper-modal embeddings of the shared entities that it owns."""
    mine = torch.isin(client.entity_ids, shared)
    tokens = {
        view: client.complete_tokens(view, round_num)[0][:, mine.to(client.device)].cpu()
        for view in client.strategy.views
    }
    return TokenSample(client.entity_ids[mine], tokens, ("structure", *client.model.feature_dims))


def semantic_consistency(samples: Sequence[TokenSample]) -> dict[str, float]:
    """Return ``<view>/<token>`` and ``<view>/total``: mean cosine over all (entity, pair of its owners).

    ``total`` compares the tokens of an entity side by side, as one object.
    """
    if not samples or sum(len(sample.entity_ids) for sample in samples) == 0:
        return {}
    ids, position = torch.cat([sample.entity_ids for sample in samples]).unique(return_inverse=True)
    owners = torch.zeros(len(ids)).index_add_(0, position, torch.ones(len(position)))
    num_pairs = (owners * (owners - 1)).sum()
    results = {}
    for view in samples[0].tokens:
        tokens = torch.cat([sample.tokens[view] for sample in samples], 1)  # [num_tokens, num_rows, dim]
        parts = dict(zip(samples[0].names, tokens, strict=True)) | {"total": tokens.transpose(0, 1).flatten(1)}
        for name, values in parts.items():
            unit = functional.normalize(values, dim=-1)
            # The sum over ordered pairs of u_a . u_b is |sum u|^2 - sum |u|^2.
            total = torch.zeros(len(ids), unit.shape[1]).index_add_(0, position, unit)
            cosine = (total.square().sum() - unit.square().sum()) / num_pairs
            results[f"{view}/{name}"] = float(cosine)
    return results
