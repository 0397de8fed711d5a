"""Calls to actors: a bounded number in flight, results as they come, limits on every wait, and errors for people."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

import ray
from ray import ObjectRef
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
)

from fedsim.errors import FedSimError, LostActorError, RunError
from fedsim.federated.timeline import Timeline

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEPTH = 2  # calls queued per actor: the second is there when the first ends, and memory stays bounded
REMIND_SECONDS = 60.0  # how often the log says for whom the run waits
MAX_NAMED = 8  # clients of a batch that a message names
GO_ON = "continue with `fedsim resume RUN`"
LOST = (RayActorError, ObjectLostError, NodeDiedError, LocalRayletDiedError)


class DeadActorError(LostActorError):
    """The actor that a call was made to is dead; with `LostActorError` itself it may be another one."""


class OverdueError(RunError):
    """A call has taken longer than it may."""


class Mended(Enum):
    """What became of a queue in which a call failed."""

    AGAIN = "its actor is as it was before the queue began: all its calls are made again"
    WITHOUT = "the same, but the calls that failed are left out"
    LEFT_OUT = "the calls that failed are left out, the actor goes on"


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
        optional: whether a round can go on without it.
    """

    who: str
    actor: str
    node: str
    what: str
    submit: "Callable[[], ObjectRef[T]]"
    clients: tuple[int, ...] = ()
    optional: bool = False


Guard = Callable[[Sequence[Call[Any]], RunError], Mended]
"""Is given calls of one actor that failed, and the error; mends the actor, or raises what ends the whole."""


def collect(
    queues: Sequence[Sequence[Call[T]]],
    timeout_seconds: float,
    timeline: Timeline | None = None,
    guard: Guard | None = None,
    deadline: float = math.inf,
) -> Iterator[tuple[Call[T], T]]:
    """Make the calls of several actors and yield their results in order of completion, each once.

    Args:
        queues: the calls of each actor; an actor does one after the other.
        timeout_seconds: longest time for one call.
        timeline: is told who worked when.
        guard: mends what fails; None raises it.
        deadline: time of `time.monotonic` at which calls that have not ended have failed.

    Raises:
        RunError: if a call fails, its actor dies, or it takes too long. It says whose it was.
    """
    return _Collection(queues, timeout_seconds, timeline or Timeline(), guard, deadline).results()


_Place = tuple[int, int]  # queue, and position in it


class _Collection(Generic[T]):
    """The calls of `collect`: what waits, what runs, what is done."""

    def __init__(
        self,
        queues: Sequence[Sequence[Call[T]]],
        timeout_seconds: float,
        timeline: Timeline,
        guard: Guard | None,
        deadline: float,
    ) -> None:
        self.queues, self.timeout, self.timeline, self.guard = queues, timeout_seconds, timeline, guard
        self.deadline = deadline
        self.waiting = [deque(range(len(queue))) for queue in queues]
        self.running: dict[ObjectRef[T], _Place] = {}
        self.done: set[_Place] = set()
        self.left_out: set[_Place] = set()
        self.since = [time.monotonic()] * len(queues)  # when the actor began what it does now

    def results(self) -> Iterator[tuple[Call[T], T]]:
        for queue in range(len(self.queues)):
            self._fill(queue)
        while self.running:
            for ref in self._ready():
                if ref in self.running:  # else its queue has begun anew
                    yield from self._take(ref)

    def _fill(self, queue: int) -> None:
        busy = sum(place[0] == queue for place in self.running.values())
        while self.waiting[queue] and busy < DEPTH:
            position = self.waiting[queue].popleft()
            self.running[self.queues[queue][position].submit()] = (queue, position)
            busy += 1

    def _ready(self) -> "list[ObjectRef[T]]":
        """Wait for results, as long as the longest call may take."""
        queue, position = min(self.running.values(), key=lambda place: (self.since[place[0]], place))
        call, now = self.queues[queue][position], time.monotonic()
        if self.deadline <= now:
            self._close_round()
            return []
        left = self.since[queue] + self.timeout - now
        if left <= 0:
            self.timeline.ended(call.actor, call.what, self.timeout, failed=True)
            self._mend(queue, [position], OverdueError(_too_late(call, self.timeout)))
            return []
        wait_seconds = min(left, REMIND_SECONDS, self.deadline - now)
        ready, _ = ray.wait(list(self.running), timeout=wait_seconds, fetch_local=False)
        if not ready and wait_seconds == REMIND_SECONDS:
            names = ", ".join(sorted({self.queues[place[0]][place[1]].who for place in self.running.values()}))
            logger.info("waiting for %s (%s)", names, call.what)
        return ready

    def _take(self, ref: "ObjectRef[T]") -> Iterator[tuple[Call[T], T]]:
        """Take a result that is there, or what went wrong."""
        place = self.running[ref]
        queue, position = place
        call = self.queues[queue][position]
        seconds, failed = time.monotonic() - self.since[queue], True
        try:
            result = _fetch(ref, call, self.timeout)
            failed = False
        except RunError as err:
            fault = err
        finally:
            self.timeline.ended(call.actor, call.what, seconds, failed=failed)
        if failed:
            if isinstance(fault, DeadActorError):  # whatever was queued fails alike: it died of the first
                position = min(other for at, other in self.running.values() if at == queue)
            self._mend(queue, [position], fault)
            return
        del self.running[ref]
        self.since[queue] = time.monotonic()
        self._fill(queue)
        if place not in self.done:
            self.done.add(place)
            yield call, result

    def _close_round(self) -> None:
        """Leave out all calls that are not done; a queue whose calls were done before is waited for."""
        self.deadline = math.inf
        for queue, calls in enumerate(self.queues):
            late = [position for position in range(len(calls)) if (queue, position) not in self.done | self.left_out]
            if late:
                error = OverdueError(f"{calls[late[0]].who} (actor {calls[late[0]].actor}) is late, {calls[0].what}")
                self._mend(queue, late, error)

    def _mend(self, queue: int, positions: Sequence[int], error: RunError) -> None:
        """Let the guard mend what failed, and make the calls anew that this takes."""
        if self.guard is None:
            raise error
        began = time.monotonic()
        how = self.guard([self.queues[queue][position] for position in positions], error)
        paused = time.monotonic() - began
        self.since = [since + paused for since in self.since]
        if how is not Mended.AGAIN:
            self.left_out |= {(queue, position) for position in positions}
        if how is Mended.LEFT_OUT:
            gone = self.left_out
        else:
            gone = {place for place in self.running.values() if place[0] == queue}
            again = (position for position in range(len(self.queues[queue])) if (queue, position) not in self.left_out)
            self.waiting[queue] = deque(again)
        self.running = {ref: place for ref, place in self.running.items() if place not in gone}
        self.since[queue] = time.monotonic()
        self._fill(queue)


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


def _fetch(ref: "ObjectRef[T]", call: Call[Any], timeout_seconds: float) -> T:
    """Take a result that is there; turn what went wrong into one message.

    The remote traceback stays in the chain of causes, which the command line writes to the run's log.
    """
    try:
        return ray.get(ref, timeout=timeout_seconds)
    except RayTaskError as err:
        cause = err.cause
        place = f"actor {call.actor} on node {call.node}"
        if isinstance(cause, FedSimError):
            named = str(cause) if str(cause).startswith(("client ", call.who)) else f"{call.who}, {call.what}: {cause}"
            raise RunError(f"{named} ({place})") from err
        if isinstance(cause, LOST):
            raise LostActorError(_died(call, cause)) from err
        text = " ".join(str(cause).split()) or "no message"
        raise RunError(f"{call.who}, {call.what} ({place}): {type(cause).__name__}: {text}; {GO_ON}") from err
    except RayActorError as err:
        if err.actor_init_failed:
            why = str(err).strip().splitlines()[-1].strip()
            raise RunError(f"{call.who} (actor {call.actor}) did not start: {why}") from err
        raise DeadActorError(_died(call, err)) from err
    except LOST as err:
        raise LostActorError(_died(call, err)) from err
    except RayError as err:
        text = " ".join(str(err).split())
        raise RunError(f"{call.who}, {call.what} (actor {call.actor}): {text}; {GO_ON}") from err


def _died(call: Call[Any], err: RayError) -> str:
    """Say who died, and of what as far as Ray knows."""
    if not isinstance(err, RayActorError):
        what_was_lost = " ".join(str(err).split()).partition(". ")[0]
        return f"{call.who} (actor {call.actor}), {call.what}: {what_was_lost}; {GO_ON}"
    # Ray's text: a sentence, indented fields, then sentences on the cause.
    lines = [line.strip() for line in str(err).splitlines()[1:] if line.strip() and not line.startswith("\t")]
    cause = (" ".join(lines) or str(err).strip()).partition(" Some common causes")[0].rstrip(". ")
    memory = "if the system ran out of memory, take fewer actors by runtime.placement pooled and runtime.num_actors"
    who = f"{call.who} (actor {call.actor} on node {call.node}) died"
    return f"{who}, {call.what}; cause: {cause}; {memory}; {GO_ON}"


def _too_late(call: Call[Any], timeout_seconds: float) -> str:
    return (
        f"{call.who} (actor {call.actor} on node {call.node}) has not finished {call.what} in {timeout_seconds:g} "
        f"seconds; raise runtime.timeout_seconds if it needs longer, or {GO_ON}"
    )
