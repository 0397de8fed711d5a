"""Who worked when, as the process that drives the run saw it.

No client or server sends anything for this: the driver notes when it asked for a piece of work and when the answer
came. What waits in an actor's queue is not work, so a span begins when the actor was last seen to end another one.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """One piece of work.

    Attributes:
        actor: who did it.
        what: what it was, for example ``training in round 3``.
        started: seconds since 1970.
        seconds: how long it took.
        failed: whether it ended in an error.
    """

    actor: str
    what: str
    started: float
    seconds: float
    failed: bool = False


class Timeline:
    """Spans that were not taken yet; the round loop takes them after each round, so they stay few."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    def ended(self, actor: str, what: str, seconds: float, *, failed: bool = False) -> None:
        """Note work that ended just now."""
        self._spans.append(Span(actor, what, time.time() - seconds, seconds, failed))

    @contextmanager
    def span(self, actor: str, what: str) -> Iterator[None]:
        """Note the work that is done within."""
        started, failed = time.perf_counter(), True
        try:
            yield
            failed = False
        finally:
            self.ended(actor, what, time.perf_counter() - started, failed=failed)

    def take(self) -> list[Span]:
        """Return the spans noted since the last call, and forget them."""
        spans, self._spans = self._spans, []
        return spans
