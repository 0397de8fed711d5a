"""Clients that are trained and evaluated together (see `fedsim.federated.batches`)."""

from collections.abc import Sequence

from fedsim.federated.client import Client, ClientEvaluation, ClientReport, impute_together, train_together
from fedsim.federated.messages import Broadcast, ClientUpdate


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
    return train_together(clients, round_num, sent)


def evaluate_clients(
    clients: Sequence[Client], split: str, round_num: int, choose: bool
) -> list[list[ClientEvaluation]]:
    """Rank the triples of a split at each client; results as of `Client.evaluate`, in the order of `clients`."""
    impute_together(clients, round_num)
    results = [client.evaluate(split, round_num, choose=choose) for client in clients]
    for client in clients:
        client.forget_imputations()
    return results
