"""What an honest-but-curious party sees of a federation, recorded while it runs."""

from dataclasses import dataclass, field

from torch import Tensor

from fedsim.federated.compression import decode_message
from fedsim.federated.messages import Broadcast, ClientUpdate
from fedsim.federated.runtime import Experiment, InProcessRuntime, make_strategy, num_shared
from fedsim.federated.server import Server, ServerReport


@dataclass(frozen=True)
class Observation:
    """Rows that went in and came out, of one round.

    Attributes:
        round_num: the round, from 1.
        before: [num_rows, dim].
        after: [num_rows, dim].
    """

    round_num: int
    before: Tensor
    after: Tensor


@dataclass
class Records:
    """What was seen.

    Attributes:
        by_server: client -> its rows as they were sent to it and as it sent them back, in the order of its ids.
        by_clients: the server's rows before and after each round, of all entities.
    """

    by_server: dict[int, list[Observation]] = field(default_factory=dict)
    by_clients: list[Observation] = field(default_factory=list)


class CuriousServer(Server):
    """A server that follows the protocol and keeps what it sees."""

    records: Records

    def begin_round(self, round_num: int) -> Broadcast:
        """Open a round as the server does, and remember its rows."""
        self._opened_with = self.global_model.entity
        return super().begin_round(round_num)

    def receive(self, update: ClientUpdate) -> None:
        """Keep the rows that a client was sent and sent back, and take the update."""
        arrived = decode_message(update)
        seen = Observation(update.round_num, self._opened_with[update.entity_ids], arrived.entity)
        self.records.by_server.setdefault(update.client, []).append(seen)
        super().receive(update)

    def finish_round(self) -> ServerReport:
        """Finish the round, and keep what the clients will see of it."""
        round_num, before = self.sums.round_num, self._opened_with
        report = super().finish_round()
        self.records.by_clients.append(Observation(round_num, before, self.global_model.entity))
        return report


def watched_runtime(experiment: Experiment) -> tuple[InProcessRuntime, Records]:
    """Make the clients of an experiment, with a curious server."""
    runtime = InProcessRuntime(experiment)
    server = CuriousServer(
        experiment.config, make_strategy(experiment.config), num_shared(experiment), experiment.feature_dims
    )
    server.records = Records()
    for client in runtime.clients.values():
        server.register(client.hello())
    runtime.server = server
    runtime.deliver(0)
    server.records = Records()
    return runtime, server.records
