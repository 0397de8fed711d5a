"""How a round's updates become sums: in their actor, then on their node, then at the server."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from ray import ObjectRef
from ray.actor import ActorProxy

from actors.placement import Batch
from actors.pool import Held
from actors.server import _ServerActor
from fedsim.federated.aggregation import PartialSums
from fedsim.federated.messages import Broadcast
from fedsim.federated.reports import ClientReport
from fedsim.privacy.secure_aggregation.sums import PartialMaskedSums

if TYPE_CHECKING:
    from actors.runtime import RayRuntime

Server = ActorProxy[_ServerActor]
Published = ObjectRef[Broadcast] | None


def train_and_sum(
    runtime: "RayRuntime", server: "Server", round_num: int, cohort: Sequence[int], broadcast: "Published"
) -> list[ClientReport]:
    """Train the cohort; updates are summed in their actor, then on their node, then at the server."""

    def train(held: Held, batch: Batch) -> "ObjectRef[tuple[list[ClientReport], int]]":
        return held.actor.train_and_sum.remote(batch, round_num, cast(Any, broadcast))

    reports = []
    for call, (done, at_once) in runtime.each_batch(f"training in round {round_num}", train, cohort):
        reports += done
        runtime.say_parts(call, at_once)
    partials: dict[str, ObjectRef[PartialSums | PartialMaskedSums]] = {}

    def submit(held: Held, others: Sequence[Held]) -> "ObjectRef[int]":
        refs = [partials.pop(other.name) for other in others]
        pair: Any = held.actor.sum_up.remote(round_num, *cast(Any, refs))
        partials[held.name], number = pair
        return cast("ObjectRef[int]", number)

    nodes: dict[str, list[Held]] = {}
    for held in _at_work(runtime, cohort):
        nodes.setdefault(held.node_id, []).append(held)
    what = f"summing updates in round {round_num}"
    followers = [held for _, *others in nodes.values() for held in others]
    list(runtime.each_actor(what, lambda held: submit(held, ()), followers))
    leaders = {held.name: others for held, *others in nodes.values()}
    firsts = [held for held, *_ in nodes.values()]
    list(runtime.each_actor(what, lambda held: submit(held, leaders[held.name]), firsts))
    for partial_sums in partials.values():
        runtime.await_server(server.merge.remote(partial_sums), what)
    return reports


def train_masked(
    runtime: "RayRuntime", server: "Server", round_num: int, cohort: Sequence[int], broadcast: "Published"
) -> list[ClientReport]:
    """Train the cohort between the phases of secure aggregation, whose messages the driver passes on."""
    what = f"keys of secure aggregation in round {round_num}"
    pool = _at_work(runtime, cohort)
    chosen = set(cohort)
    members = {held.name: [client for client in held.clients if client in chosen] for held in pool}
    runtime.await_server(server.secure_round.remote(round_num, list(cohort)), what)
    advertised = runtime.each_actor(
        what, lambda held: held.actor.advertise_keys.remote(members[held.name], round_num), pool
    )
    for _, keys in advertised:
        runtime.await_server(server.take_keys.remote(keys), what)
    roster = runtime.await_server(server.roster.remote(), what)
    for _, shares in runtime.each_actor(what, lambda held: held.actor.share_keys.remote(roster), pool):
        runtime.await_server(server.take_shares.remote(shares), what)
    deliveries = {held.name: runtime.await_server(server.deliveries.remote(members[held.name]), what) for held in pool}
    list(runtime.each_actor(what, lambda held: held.actor.take_shares.remote(deliveries[held.name]), pool))
    reports = train_and_sum(runtime, server, round_num, cohort, broadcast)
    what = f"unmasking the sum in round {round_num}"
    request = runtime.await_server(server.unmask_request.remote(), what)
    for _, revealed in runtime.each_actor(what, lambda held: held.actor.reveal_shares.remote(request), pool):
        runtime.await_server(server.take_revealed.remote(revealed), what)
    runtime.await_server(server.unmask.remote(), what)
    return reports


def _at_work(runtime: "RayRuntime", cohort: Sequence[int]) -> list[Held]:
    """Return the actors that hold clients of the cohort."""
    chosen = set(cohort)
    return [held for held in runtime.pool if not chosen.isdisjoint(held.clients)]
