"""Relation reconstruction: which relation links two entities of a client? (docs/privacy.md).

Source: the attack on FedE that Zhang et al. describe in "Efficient Federated Learning on Knowledge Graphs via
Privacy-preserving Relation Embedding Aggregation" (FedR), Findings of EMNLP 2022. Of the paper we know the abstract
("the known entity embedding can be used to infer whether a specific relation between two entities exists in a private
client") and summaries: a server colludes with one client, whose relation embeddings it learns; it infers a relation
of the target client by r' = t' - h', and names it after the most similar known one. The form for DistMult and
ComplEx, the cosine and the measures here are our inference.

Rows of all clients live in one space, since each round starts from the same global rows; that is why the colluding
client's relations fit the target's entities.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedsim.data.clients import ClientData
from fedsim.errors import RunError
from fedsim.privacy.attacks.quality import AttackQuality, attack_quality
from fedsim.privacy.attacks.relation_estimate import estimate_relation


@dataclass(frozen=True)
class Reconstruction:
    """How much of a client's triples an attacker recovers.

    Attributes:
        accuracy: share of the linked pairs whose relation is named rightly.
        majority: the same for always naming their most frequent relation.
        links: how well the highest cosine tells linked pairs from unlinked ones.
        num_known: relations of the target that the colluding client has as well.
    """

    accuracy: float
    majority: float
    links: AttackQuality
    num_known: int


def reconstruct_relations(
    scorer: str,
    rows: Tensor,
    target: ClientData,
    relations: Tensor,
    colluding: ClientData,
    generator: np.random.Generator,
) -> Reconstruction:
    """Attack one client with the help of another.

    Args:
        scorer: of the federation.
        rows: those that the target sent, in the order of its entities, [num_entities, dim].
        target: the truth.
        relations: embeddings of the colluding client's relations, in its order, [num_relations, dim].
        colluding: the client that tells.
        generator: draws unlinked pairs.

    Raises:
        RunError: if the two clients have no relation in common.
    """
    shared, own, theirs = np.intersect1d(target.relation_ids, colluding.relation_ids, return_indices=True)
    train = torch.from_numpy(target.train)
    linked = train[torch.isin(train[:, 1], torch.from_numpy(own))]
    if not len(linked):
        raise RunError(
            f"clients {target.client} and {colluding.client} have no relation in common, and the attack needs some: "
            f"set data.split to dirichlet"
        )
    known = relations[torch.from_numpy(theirs)]  # [num_known, dim]
    name, confidence = name_relations(scorer, rows, linked[:, [0, 2]], known)
    truth = linked[:, 1]
    named = torch.from_numpy(own)[name]
    pairs = unlinked_pairs(train, len(target.entity_ids), len(linked), generator)
    counts = truth.bincount()
    return Reconstruction(
        accuracy=float((named == truth).double().mean()),
        majority=float(counts.max() / len(truth)),
        links=attack_quality(confidence, name_relations(scorer, rows, pairs, known)[1]),
        num_known=len(shared),
    )


def name_relations(scorer: str, rows: Tensor, pairs: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Name the relation of each pair of entities.

    Args:
        scorer: of the federation.
        rows: [num_entities, dim].
        pairs: of heads and tails, int64 [num_pairs, 2].
        known: relation embeddings, [num_known, dim].

    Returns:
        The place of the most similar known relation, int64 [num_pairs], and its cosine, [num_pairs].
    """
    estimates = estimate_relation(scorer, rows[pairs[:, 0]], rows[pairs[:, 1]])
    cosine = functional.normalize(estimates, dim=1) @ functional.normalize(known, dim=1).T
    best = cosine.max(1)
    return best.indices, best.values


def unlinked_pairs(train: Tensor, num_entities: int, num_pairs: int, generator: np.random.Generator) -> Tensor:
    """Draw pairs of entities that no training triple links, int64 [num_pairs, 2]."""
    linked = (train[:, 0] * num_entities + train[:, 2]).numpy()
    drawn = generator.integers(num_entities**2, size=4 * num_pairs)
    free = drawn[~np.isin(drawn, linked)][:num_pairs]
    return torch.from_numpy(np.stack([free // num_entities, free % num_entities], axis=1))
