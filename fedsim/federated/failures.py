"""Clients that fail in a round: who they are, and how many a run goes on without (docs/faults.md)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from fedsim.config import Config
from fedsim.errors import RunError
from fedsim.federated.client import Client
from fedsim.federated.message_checks import Rejection


@dataclass(frozen=True)
class Failure:
    """A client that a round went on without: its work failed, its actor died too often, or it was late.

    Attributes:
        client: the client's id.
        round_num: the round.
        reason: what kind of failure.
        message: what happened, and where.
    """

    client: int
    round_num: int
    reason: Literal["error", "died", "late"]
    message: str


@contextmanager
def unchanged_on_failure(clients: Sequence[Client], config: Config) -> Iterator[None]:
    """Bring clients back to where they were if their work fails, in a run that goes on without them."""
    if config.federation.max_failed_clients == 0:
        yield
        return
    before = [{name: value.clone() for name, value in client.state().items()} for client in clients]
    try:
        yield
    except Exception:
        for client, state in zip(clients, before, strict=True):
            client.load_state(state)
        raise


def check_failures(
    config: Config, round_num: int, num_updates: int | None, failed: Sequence[Failure], rejected: Sequence[Rejection]
) -> None:
    """Hold a round to the numbers of clients that may fail and that must be left.

    Args:
        config: the experiment.
        round_num: the round.
        num_updates: clients whose update is in the new model; None without federation.
        failed: clients that the round went on without.
        rejected: updates that were refused.

    Raises:
        RunError: naming the first that failed.
    """
    faults: list[Failure | Rejection] = [*rejected, *failed]
    messages = {item.client: item.message for item in faults if item.client is not None}
    allowed = config.federation.max_failed_clients
    if len(messages) > allowed:
        raise RunError(
            f"round {round_num}: {len(messages)} clients failed, more than federation.max_failed_clients {allowed}; "
            f"the first: {messages[min(messages)]}"
        )
    fewest = config.faults.min_clients
    short = num_updates is not None and num_updates < fewest
    if short and (failed or (rejected and num_updates)):  # of rejections alone, participation.too_few may skip a round
        raise RunError(
            f"round {round_num}: {num_updates} update(s) are left, fewer than faults.min_clients {fewest}, as "
            f"{len(messages)} client(s) failed; the first: {messages[min(messages)]}"
        )
