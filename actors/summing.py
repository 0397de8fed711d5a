"""How a round's updates become sums: in their actor, then on their node, then at the server."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

from ray import ObjectRef
from ray.actor import ActorProxy

from actors.crew import Crew
from actors.placement import Batch
from actors.pool import Held
from actors.server import _ServerActor
from fedsim.federated.aggregation import PartialSums
from fedsim.federated.messages import Broadcast
from fedsim.federated.reports import ClientReport
from fedsim.federated.runtime import sampled
from fedsim.privacy.secure_aggregation.sums import PartialMaskedSums

if TYPE_CHECKING:
    from actors.recovery import Recovery

Server = ActorProxy[_ServerActor]
Published = ObjectRef[Broadcast] | None


def train_and_sum(
    crew: Crew,
    server: "Server",
    round_num: int,
    cohort: Sequence[int],
    broadcast: "Published",
    deadline: float,
    recovery: "Recovery | None" = None,
) -> list[ClientReport]:
    """Train the cohort; updates are summed in their actor, then on their node, then at the server.

    Args:
        crew: the actors.
        server: the server's actor.
        round_num: the round.
        cohort: its clients.
        broadcast: what they start from.
        deadline: as in `collect`.
        recovery: is told of the work that an actor may have to do once more.
    """

    def train(held: Held, batch: Batch) -> "ObjectRef[tuple[list[ClientReport], int]]":
        return held.actor.train_and_sum.remote(batch, round_num, cast(Any, broadcast))

    reports, trained = [], set[int]()
    what = f"training in round {round_num}"
    for call, (done, at_once) in crew.each_batch(what, train, cohort, optional=True, deadline=deadline):
        reports += done
        trained.update(call.clients)
        crew.say_parts(call, at_once)
    if recovery is not None:
        recovery.note(lambda held: [train(held, batch) for batch in sampled(held.batches, trained)])
    partials: dict[str, ObjectRef[PartialSums | PartialMaskedSums]] = {}

    def submit(held: Held, others: Sequence[Held]) -> "ObjectRef[int]":
        refs = [partials[other.name] for other in others]
        pair: Any = held.actor.sum_up.remote(round_num, *cast(Any, refs))
        partials[held.name], number = pair
        return cast("ObjectRef[int]", number)

    nodes: dict[str, list[Held]] = {}
    for held in _at_work(crew, trained):
        nodes.setdefault(held.node_id, []).append(held)
    what = f"summing updates in round {round_num}"
    followers = [held for _, *others in nodes.values() for held in others]
    list(crew.each_actor(what, lambda held: submit(held, ()), followers))
    leaders = {held.name: others for held, *others in nodes.values()}
    firsts = [held for held, *_ in nodes.values()]
    list(crew.each_actor(what, lambda held: submit(held, leaders[held.name]), firsts))
    for held in firsts:
        crew.await_server(server.merge.remote(partials[held.name]), what)
    return reports


def train_masked(
    crew: Crew, server: "Server", round_num: int, cohort: Sequence[int], broadcast: "Published", deadline: float
) -> list[ClientReport]:
    """Train the cohort between the phases of secure aggregation, whose messages the driver passes on."""
    what = f"keys of secure aggregation in round {round_num}"
    pool = _at_work(crew, cohort)
    chosen = set(cohort)
    members = {held.name: [client for client in held.clients if client in chosen] for held in pool}
    crew.await_server(server.secure_round.remote(round_num, list(cohort)), what)
    advertised = crew.each_actor(
        what, lambda held: held.actor.advertise_keys.remote(members[held.name], round_num), pool
    )
    for _, keys in advertised:
        crew.await_server(server.take_keys.remote(keys), what)
    roster = crew.await_server(server.roster.remote(), what)
    for _, shares in crew.each_actor(what, lambda held: held.actor.share_keys.remote(roster), pool):
        crew.await_server(server.take_shares.remote(shares), what)
    deliveries = {held.name: crew.await_server(server.deliveries.remote(members[held.name]), what) for held in pool}
    list(crew.each_actor(what, lambda held: held.actor.take_shares.remote(deliveries[held.name]), pool))
    reports = train_and_sum(crew, server, round_num, cohort, broadcast, deadline)
    what = f"unmasking the sum in round {round_num}"
    request = crew.await_server(server.unmask_request.remote(), what)
    for _, revealed in crew.each_actor(what, lambda held: held.actor.reveal_shares.remote(request), pool):
        crew.await_server(server.take_revealed.remote(revealed), what)
    crew.await_server(server.unmask.remote(), what)
    return reports


def _at_work(crew: Crew, cohort: Collection[int]) -> list[Held]:
    """Return the actors that hold clients of the cohort."""
    chosen = set(cohort)
    return [held for held in crew.pool if not chosen.isdisjoint(held.clients)]
