"""Relation reconstruction: which relation links two entities of a client? (docs/privacy.md).

Source: the attack on FedE that Zhang et al. describe in "Efficient Federated Learning on Knowledge Graphs via
Privacy-preserving Relation Embedding Aggregation" (FedR), Findings of EMNLP 2022. Of the paper we know the abstract
("the known entity embedding can be used to infer whether a specific relation between two entities exists in a private
client") and summaries: a server colludes with one client, whose relation embeddings it learns; it infers a relation of
the target client by r' = t' - h', and names it after the most similar known one. The form for DistMult and ComplEx,
the cosine and the measures here are our inference, and so is the second source of known relations.

An attacker needs references, vectors of relations whose names it knows:

- from a colluding client, its relation embeddings (`told_by_client`). Here each client draws its relation table by
  itself and never shares it, so the tables of two clients are hardly alike, and this attack is weak;
- from some known triples of the target, the mean of r' over those of a relation (`told_by_triples`).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedsim.data.clients import ClientData
from fedsim.errors import RunError
from fedsim.privacy.attacks.membership import mean_estimates
from fedsim.privacy.attacks.quality import AttackQuality, attack_quality
from fedsim.privacy.attacks.relation_estimate import estimate_relation


@dataclass(frozen=True)
class References:
    """Relations of the target that the attacker has vectors of.

    Attributes:
        relation: their positions at the target, int64 [num_known].
        vectors: [num_known, dim].
    """

    relation: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class Reconstruction:
    """How much of a client's triples an attacker recovers.

    Attributes:
        accuracy: share of the linked pairs whose relation is named rightly.
        majority: the same for always naming their most frequent relation.
        links: how well the highest cosine tells linked pairs from unlinked ones.
    """

    accuracy: float
    majority: float
    links: AttackQuality


def told_by_client(target: ClientData, colluding: ClientData, relations: Tensor) -> References:
    """Take the relations that a colluding client has in common with the target.

    Args:
        target: whose positions are meant.
        colluding: the client that tells.
        relations: its relation embeddings, in its order, [num_relations, dim].

    Raises:
        RunError: if the two clients have no relation in common.
    """
    _, own, theirs = np.intersect1d(target.relation_ids, colluding.relation_ids, return_indices=True)
    if not len(own):
        raise RunError(
            f"clients {target.client} and {colluding.client} have no relation in common, and the attack needs some: "
            f"set data.split to dirichlet"
        )
    return References(torch.from_numpy(own), relations[torch.from_numpy(theirs)])


def told_by_triples(scorer: str, rows: Tensor, known: Tensor) -> References:
    """Estimate relations from triples of the target that are known, int64 [num_triples, 3]."""
    relation = known[:, 1].unique()
    return References(relation, mean_estimates(scorer, rows, known)[relation])


def reconstruct_relations(
    scorer: str, rows: Tensor, target: ClientData, triples: Tensor, references: References, draws: np.random.Generator
) -> Reconstruction:
    """Name the relations of a client's pairs of entities, and tell which pairs are linked at all.

    Args:
        scorer: of the federation.
        rows: those that the target sent, in the order of its entities, [num_entities, dim].
        target: the truth.
        triples: training triples of it that the attacker does not know, int64 [num_triples, 3].
        references: what it does know.
        draws: of unlinked pairs.
    """
    linked = triples[torch.isin(triples[:, 1], references.relation)]
    name, confidence = name_relations(scorer, rows, linked[:, [0, 2]], references.vectors)
    truth = linked[:, 1]
    pairs = unlinked_pairs(torch.from_numpy(target.train), len(target.entity_ids), len(linked), draws)
    others = name_relations(scorer, rows, pairs, references.vectors)[1]
    return Reconstruction(
        accuracy=float((references.relation[name] == truth).double().mean()),
        majority=float(truth.bincount().max() / len(truth)),
        links=attack_quality(confidence, others),
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
