"""What is lost is brought back: client actors alone, or the whole federation from its newest checkpoint.

An actor's state is that of the newest checkpoint and the work since then, and that work is a pure function of messages
that still exist: as long as it is one round, a new actor repeats its own part, and the other actors keep theirs. If
that is not enough (the server is gone, or a message that lay on a lost node), all actors go back to the checkpoint.
Either way a run ends with the bits of an unbroken one (docs/faults.md).
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import ObjectRef

from actors.calls import Call, DeadActorError, Mended, OverdueError, name_clients, result_of
from actors.crew import Crew
from actors.pool import Held, NoRoomError
from fedsim.data.clients import ClientData
from fedsim.errors import LostActorError, RunError
from fedsim.federated.failures import Failure
from fedsim.federated.runtime import prepare
from fedsim.process import return_freed_memory

logger = logging.getLogger(__name__)

Step = Callable[[Held], Sequence[ObjectRef[Any]]]
"""Work that changed what clients keep: makes the same calls to an actor once more."""


class Recovery:
    """Knows the newest checkpoint and the work since then, and mends what fails.

    Args:
        crew: the actors.
        load: brings client actors to a checkpoint; with None for the actors all of them, and the server.
        deliver: gives every client the server's first model.
    """

    def __init__(
        self, crew: Crew, load: Callable[[Path, Sequence[Held] | None], None], deliver: Callable[[], None]
    ) -> None:
        self.crew, self.load, self.deliver = crew, load, deliver
        self.max_restarts = crew.config.faults.max_restarts
        self.checkpoint: Path | None = None  # None: the start
        self.checkpoint_round: int | None = 0  # None: whatever comes before the next round
        self.journal: list[Step] | None = None  # since then; None if it is not kept, and all actors would go back
        self.round_num = 0
        self.failures: list[Failure] = []  # of the round
        self.deaths: Counter[str] = Counter()  # of an actor since the checkpoint
        self.rollbacks = 0  # since the checkpoint

    def begin(self, checkpoint: Path | None, round_num: int | None) -> None:
        """Take a checkpoint that all actors are at for the one that lost work is repeated from."""
        self.checkpoint, self.checkpoint_round, self.journal = checkpoint, round_num, []
        self.deaths.clear()
        self.rollbacks = 0

    def begin_round(self, round_num: int) -> None:
        """Open a round; what is older than the round before would have to be repeated with its messages."""
        self.round_num, self.failures = round_num, []
        if self.checkpoint_round is None:
            self.checkpoint_round = round_num - 1
        if self.checkpoint_round != round_num - 1:
            self.journal = None

    def note(self, step: Step) -> None:
        """Note work that all client actors have done."""
        if self.journal is not None:
            self.journal.append(step)

    @contextmanager
    def noted(self, step: Step) -> Iterator[None]:
        """Note work that is forgotten again after the block, which alone builds on it."""
        self.note(step)
        yield
        if self.journal is not None:
            self.journal.remove(step)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Mend nothing in the block: what fails there takes all actors back to the checkpoint."""
        guard, self.crew.guard = self.crew.guard, None
        try:
            yield
        finally:
            self.crew.guard = guard

    def forget(self) -> None:
        """Keep no journal until the next checkpoint: the work that comes cannot be repeated by one actor alone."""
        self.journal = None

    def mend(self, calls: Sequence[Call[Any]], error: RunError) -> Mended:
        """Mend what failed in calls to one client actor; see `actors.calls.Guard`.

        Raises:
            LostActorError: if all actors must go back to the checkpoint.
            RunError: if the run cannot go on.
        """
        if isinstance(error, LostActorError):
            if self.journal is None or not isinstance(error, DeadActorError):
                raise error
            held = self.crew.named(calls[0].actor)
            if self._may_restart(held.name):
                self._replace(held, error)
                return Mended.AGAIN
            self._leave_out(calls, RunError(self._too_often(error, held.name)), "died", error)
            self.deaths[held.name] = 0
            self._replace(held, error)
            return Mended.WITHOUT
        if not isinstance(error, OverdueError):
            self._leave_out(calls, error, "error")
            return Mended.LEFT_OUT
        self._leave_out(calls, error, "late")
        if self.journal is None:
            raise error
        self._replace(self.crew.named(calls[0].actor), error)  # the only way to end what it does
        return Mended.WITHOUT

    def roll_back(self, error: LostActorError, checkpoint: Path | None, round_num: int) -> None:
        """Replace all actors that are gone, and bring everything to a checkpoint, or to the start if there is none.

        Raises:
            RunError: if it has been tried too often, or the cluster has no room.
        """
        logger.debug("rolling back", exc_info=error)
        started, self.journal = time.monotonic(), None
        rollbacks, starting, new = self.rollbacks, self.crew.starting_seconds, _New()
        with self.off(), self.crew.timeline.span("all actors", f"going back to round {round_num}"):
            while True:
                rollbacks += 1
                if rollbacks > self.max_restarts:
                    raise RunError(
                        f"{error}; all actors went back to the last checkpoint {self.max_restarts} times without "
                        f"reaching the next one (faults.max_restarts)"
                    ) from error
                try:
                    self._restore_all(checkpoint, new)
                    break
                except LostActorError as again:
                    error = again
        same = (self.checkpoint, self.checkpoint_round) == (checkpoint, round_num)
        if checkpoint is not None:
            self.begin(checkpoint, round_num)
        if same:
            self.rollbacks = rollbacks
        logger.warning(
            "%s; replaced %s and went back to %s in %.1f s, of which %.1f s for processes to start",
            _short(error),
            ", ".join(dict.fromkeys(new.replaced)) or "nothing",
            f"round {round_num}" if checkpoint is not None else "the start",
            time.monotonic() - started,
            self.crew.starting_seconds - starting,
        )

    def _may_restart(self, name: str) -> bool:
        self.deaths[name] += 1
        return self.deaths[name] <= self.max_restarts

    def _too_often(self, error: RunError, name: str) -> str:
        return (
            f"{error}; round {self.round_num}: actor {name} died {self.deaths[name]} times since the last checkpoint "
            f"(faults.max_restarts {self.max_restarts})"
        )

    def _leave_out(
        self, calls: Sequence[Call[Any]], error: RunError, reason: Any, cause: BaseException | None = None
    ) -> None:
        """Count clients as failed; raise if the run cannot go on without them."""
        failures = [Failure(client, self.round_num, reason, str(error)) for call in calls for client in call.clients]
        self.failures += failures
        allowed = self.crew.config.federation.max_failed_clients
        if allowed == 0 or not all(call.optional for call in calls):
            raise error from cause or error.__cause__
        if len(self.failures) > allowed:
            raise RunError(
                f"round {self.round_num}: {len(self.failures)} clients failed, more than "
                f"federation.max_failed_clients {allowed}; the first: {self.failures[0].message}"
            ) from error
        logger.warning("round %d goes on without %s: %s", self.round_num, _clients(calls), _short(error))

    def _replace(self, held: Held, error: RunError) -> None:
        """Start an actor anew, and bring its clients to where they were before the calls that failed."""
        started, starting = time.monotonic(), self.crew.starting_seconds
        data = self._prepare()
        with self.off(), self.crew.timeline.span(held.name, "restarting"):
            while True:
                try:
                    self.crew.restart(held)
                    self.crew.give(data, [held])
                    if self.checkpoint is not None:
                        self.load(self.checkpoint, [held])
                    self._repeat(held)
                    break
                except DeadActorError as again:
                    if not self._may_restart(held.name):
                        raise RunError(self._too_often(again, held.name)) from again
        del data
        return_freed_memory()
        logger.warning(
            "%s; replaced on node %s in %.1f s, of which %.1f s for its process to start",
            _short(error),
            held.node,
            time.monotonic() - started,
            self.crew.starting_seconds - starting,
        )

    def _repeat(self, held: Held) -> None:
        """Let an actor do once more what its clients did since the checkpoint."""
        assert self.journal is not None, "only then one actor is replaced alone"
        what = f"repeating its work of round {self.round_num}"
        for step in self.journal:
            for ref in step(held):
                self._await(held, what, ref)

    def _await(self, held: Held, what: str, ref: "ObjectRef[Any]") -> None:
        call = Call(name_clients(held.clients), held.name, held.node, what, lambda: ref)
        result_of(call, self.crew.timeout, self.crew.timeline)

    def _restore_all(self, checkpoint: Path | None, new: "_New") -> None:
        """Replace who is gone and bring everybody to a checkpoint; `new` also has what earlier attempts left undone."""
        crew = self.crew
        lost = [held for held in crew.pool if not self._is_alive(held)]
        new.replaced += [held.name for held in lost]
        new.without_data |= {held.name for held in lost}
        if crew.server is not None and (checkpoint is None or not self._server_is_alive()):
            new.server = True
            new.replaced.append(crew.server_name)
            self._restart_server(new)
        for held in lost:
            if held not in crew.pool:
                continue  # made room for the server
            try:
                crew.restart(held)
            except NoRoomError as err:
                logger.warning("%s", err)
                new.without_data |= crew.dissolve(held)
        data = self._prepare()
        crew.give(data, [held for held in crew.pool if checkpoint is None or held.name in new.without_data])
        del data
        return_freed_memory()
        if new.server:
            crew.introduce()
        if checkpoint is None:
            self.begin(None, 0)
            self.deliver()
        else:
            self.load(checkpoint, None)

    def _restart_server(self, new: "_New") -> None:
        """Replace the server, if need be in the place of client actors, whose clients others take."""
        while True:
            try:
                self.crew.restart_server()
                return
            except NoRoomError as err:
                if len(self.crew.pool) == 1:
                    raise RunError(
                        f"{err}; add nodes, or continue where there is room with `fedsim resume RUN`"
                    ) from err
                new.without_data |= self.crew.dissolve(self.crew.pool[-1])

    def _is_alive(self, held: Held) -> bool:
        """Ask a client actor for a sign of life, which it gives after the work that it still has."""
        try:
            self._await(held, "its last work", held.actor.start.remote())
        except LostActorError:
            return False
        return True

    def _server_is_alive(self) -> bool:
        assert self.crew.server is not None, "there is one"
        try:
            self.crew.await_server(self.crew.server.start.remote(), "its last work")
        except LostActorError:
            return False
        return True

    def _prepare(self) -> dict[int, ClientData]:
        """Read and divide the data once more, which gives the same."""
        return self.crew.client_data(prepare(self.crew.config))


@dataclass
class _New:
    """What is new since all actors began to go back, over all attempts: one that fails may leave the rest undone.

    Attributes:
        replaced: names of actors that were replaced.
        without_data: client actors that were replaced or took over clients, and must be given data.
        server: whether the server was replaced, and so knows no client.
    """

    replaced: list[str] = field(default_factory=list)
    without_data: set[str] = field(default_factory=set)
    server: bool = False


def _clients(calls: Sequence[Call[Any]]) -> str:
    return name_clients([client for call in calls for client in call.clients])


def _short(error: RunError) -> str:
    """Leave out how to go on, which is what happens here."""
    return str(error).partition("; if the system")[0].partition("; continue with")[0]
