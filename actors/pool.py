"""A client actor as the driver knows it."""

from dataclasses import dataclass

from ray.actor import ActorProxy

from actors.client import _ClientActor
from actors.placement import Batch
from fedsim.errors import LostActorError

PARTS = (
    "the share of the GPU of actor %s ran out of memory, %s: of %d clients of a batch it trains %d at once from now "
    "on, which changes the last digits; lower runtime.clients_per_batch or raise runtime.gpus_per_client to avoid it"
)


class NoRoomError(LostActorError):
    """A new actor has not started in time: the cluster has no room for it."""


@dataclass
class Held:
    """One client actor: its handle, its name, its batches of clients, and where it is once it has started."""

    actor: ActorProxy[_ClientActor]
    name: str
    batches: tuple[Batch, ...]
    node: str = "not known yet"
    node_id: str = ""
    pid: int = 0
    private_bytes: float = 0.0

    @property
    def clients(self) -> list[int]:
        """All clients that the actor holds."""
        return [client for batch in self.batches for client in batch]

    def settle(self, place: tuple[str, str, int, float]) -> None:
        """Note where the actor is, as its `start` returned it."""
        self.node, self.node_id, self.pid, self.private_bytes = place
