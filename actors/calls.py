"""Calls to actors: a bounded number in flight, results as they come, limits on every wait, and errors for people."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray import ObjectRef
from ray.exceptions import RayActorError, RayError, RayTaskError

from fedsim.errors import FedSimError, RunError
from fedsim.federated.timeline import Timeline

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEPTH = 2  # calls queued per actor: the second is there when the first ends, and memory stays bounded
REMIND_SECONDS = 60.0  # how often the log says for whom the run waits
MAX_NAMED = 8  # clients of a batch that a message names
GO_ON = "continue with `fedsim resume RUN`"


@dataclass(frozen=True)
class Call(Generic[T]):
    """One call to an actor.

    Attributes:
        who: whose work it is, for example ``client 3`` or ``the server``.
        actor: the actor's name.
        node: address of the actor's node.
        what: what it does, for example ``training in round 2``.
        submit: makes the call.
        clients: whose work it is, if it is a batch of clients.
    """

    who: str
    actor: str
    node: str
    what: str
    submit: "Callable[[], ObjectRef[T]]"
    clients: tuple[int, ...] = ()


@dataclass
class _Running:
    call: Call[Any]
    queue: int


def collect(
    queues: Sequence[Sequence[Call[T]]], timeout_seconds: float, timeline: Timeline | None = None
) -> Iterator[tuple[Call[T], T]]:
    """Make the calls of several actors and yield their results in order of completion.

    Args:
        queues: the calls of each actor; an actor does one after the other.
        timeout_seconds: longest time for one call.
        timeline: is told who worked when.

    Raises:
        RunError: if a call fails, its actor dies, or it takes too long. It says whose it was.
    """
    waiting = [deque(queue) for queue in queues]
    running: dict[ObjectRef[T], _Running] = {}
    busy = [0] * len(waiting)
    since = [time.monotonic()] * len(waiting)  # when the actor began what it does now

    def fill(index: int) -> None:
        while waiting[index] and busy[index] < DEPTH:
            call = waiting[index].popleft()
            running[call.submit()] = _Running(call, index)
            busy[index] += 1

    for index in range(len(waiting)):
        fill(index)
    while running:
        first = min(running.values(), key=lambda item: since[item.queue])
        left = since[first.queue] + timeout_seconds - time.monotonic()
        if left <= 0:
            if timeline is not None:
                timeline.ended(first.call.actor, first.call.what, timeout_seconds, failed=True)
            raise RunError(_too_late(first.call, timeout_seconds))
        ready, _ = ray.wait(list(running), timeout=min(left, REMIND_SECONDS), fetch_local=False)
        if not ready:
            names = ", ".join(sorted({item.call.who for item in running.values()}))
            logger.info("waiting for %s (%s)", names, first.call.what)
        for ref in ready:
            done = running.pop(ref)
            seconds, failed = time.monotonic() - since[done.queue], True
            try:
                result = _fetch(ref, done.call)
                failed = False
            finally:
                if timeline is not None:
                    timeline.ended(done.call.actor, done.call.what, seconds, failed=failed)
            since[done.queue] = time.monotonic()
            busy[done.queue] -= 1
            fill(done.queue)
            yield done.call, result


def result_of(call: Call[T], timeout_seconds: float, timeline: Timeline | None = None) -> T:
    """Make one call and wait for its result; errors as in `collect`."""
    ((_, result),) = collect([[call]], timeout_seconds, timeline)
    return result


def name_clients(clients: Sequence[int]) -> str:
    """Name clients in a message: ``client 3``, ``clients 0, 2``, ``clients 0, 1, 2 and 297 more``."""
    if len(clients) == 1:
        return f"client {clients[0]}"
    more = f" and {len(clients) - MAX_NAMED} more" if len(clients) > MAX_NAMED else ""
    return f"clients {', '.join(map(str, clients[:MAX_NAMED]))}{more}"


def _fetch(ref: "ObjectRef[T]", call: Call[Any]) -> T:
    """Take a result that is there; turn what went wrong into one message.

    The remote traceback stays in the chain of causes, which the command line writes to the run's log.
    """
    try:
        return ray.get(ref)
    except RayTaskError as err:
        cause = err.cause
        place = f"actor {call.actor} on node {call.node}"
        if isinstance(cause, FedSimError):
            named = str(cause) if str(cause).startswith(("client ", call.who)) else f"{call.who}, {call.what}: {cause}"
            raise RunError(f"{named} ({place})") from err
        if isinstance(cause, RayActorError):
            raise RunError(_died(call, cause)) from err
        text = " ".join(str(cause).split()) or "no message"
        raise RunError(f"{call.who}, {call.what} ({place}): {type(cause).__name__}: {text}; {GO_ON}") from err
    except RayActorError as err:
        raise RunError(_died(call, err)) from err
    except RayError as err:
        text = " ".join(str(err).split())
        raise RunError(f"{call.who}, {call.what} (actor {call.actor}): {text}; {GO_ON}") from err


def _died(call: Call[Any], err: RayActorError) -> str:
    """Say who died, and of what as far as Ray knows."""
    if err.actor_init_failed:
        return f"{call.who} (actor {call.actor}) did not start: {str(err).strip().splitlines()[-1].strip()}"
    # Ray's text: a sentence, indented fields, then sentences on the cause.
    lines = [line.strip() for line in str(err).splitlines()[1:] if line.strip() and not line.startswith("\t")]
    cause = (" ".join(lines) or str(err).strip()).partition(" Some common causes")[0].rstrip(". ")
    memory = "if the system ran out of memory, take fewer actors by runtime.placement pooled and runtime.num_actors"
    return f"{call.who} (actor {call.actor}) died, {call.what}; cause: {cause}; {memory}; {GO_ON}"


def _too_late(call: Call[Any], timeout_seconds: float) -> str:
    return (
        f"{call.who} (actor {call.actor} on node {call.node}) has not finished {call.what} in {timeout_seconds:g} "
        f"seconds; raise runtime.timeout_seconds if it needs longer, or {GO_ON}"
    )
