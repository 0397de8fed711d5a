"""Clients that are trained and evaluated together (see `fedsim.federated.batches`)."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedsim.evaluation.consistency import ConsistencySums, TokenSample, sample_tokens, sum_samples
from fedsim.evaluation.imputation import measure_imputation
from fedsim.federated.attacks import Attack, Received, make_attack
from fedsim.federated.client import Client, impute_together, train_together
from fedsim.federated.messages import Broadcast, ClientUpdate
from fedsim.federated.reports import ClientEvaluation, ClientReport
from fedsim.federated.shelf import Shelf
from fedsim.federated.stacked_ranking import evaluate_together
from fedsim.randomness import torch_generator


def train_clients(
    clients: Sequence[Client], round_num: int, broadcast: Broadcast | None
) -> list[tuple[ClientUpdate | None, ClientReport]]:
    """Let clients take part in a round; results as of `Client.train`, in the order of `clients`.

    Args:
        clients: members of one batch.
        round_num: the round, from 1.
        broadcast: what the server published, of which each client gets its part; None without federation.
    """
    sent = [None if broadcast is None else client.own_part(broadcast) for client in clients]
    results = train_together(clients, round_num, sent)
    attack = make_attack(clients[0].config)
    if attack is None:
        return results
    attackers = clients[0].config.adversary.clients or ()
    return [
        (_craft(attack, client, own, update), report)
        if client.data.client in attackers and own is not None and update is not None
        else (update, report)
        for client, own, (update, report) in zip(clients, sent, results, strict=True)
    ]


def _craft(attack: Attack, client: Client, own: Broadcast, update: ClientUpdate) -> ClientUpdate:
    """Return what an attacker sends in place of its update."""
    rows = torch.searchsorted(client.shared_ids, update.entity_ids)
    generator = torch_generator(client.config.seed, "adversary", round_num=own.round_num, client=client.data.client)
    return attack.craft(update, Received(own.entity[rows], own.modules), generator)


def evaluate_clients(
    clients: Sequence[Client], split: str, round_num: int, choose: bool
) -> list[list[ClientEvaluation]]:
    """Rank the triples of a split at each client; results as of `Client.evaluate`, in the order of `clients`."""
    impute_together(clients, round_num)
    results = evaluate_together(clients, split, round_num, choose)
    for client in clients:
        client.forget_imputations()
    return results


def measure_clients(
    shelf: Shelf, clients: Sequence[Client], shared: Tensor, round_num: int
) -> tuple[list[dict[str, float]], ConsistencySums]:
    """Measure each client's imputation, and sum the clients' tokens of the shared entities, one after the other.

    Args:
        shelf: where the clients' state is when they are not at work.
        clients: to be measured.
        shared: global ids of the entities that are compared, sorted, int64 [num_shared].
        round_num: seeds the imputers' draws.
    """
    imputation: list[dict[str, float]] = []

    def samples() -> Iterator[TokenSample]:
        for client in clients:
            with shelf.at_work([client], changes=False):
                imputation.append(measure_imputation(client, round_num))
                sample = sample_tokens(client, shared, round_num)
                client.forget_imputations()
            yield sample

    sums = sum_samples(samples(), shared)
    return imputation, sums
