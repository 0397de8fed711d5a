"""Fixtures of the tests on Ray."""

from collections.abc import Iterator

import pytest

from live_run import LiveRun
from live_run import live_run as start_run


@pytest.fixture(scope="session")
def live_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRun]:
    """Start one run for all tests that look at a run from outside."""
    with start_run(tmp_path_factory.mktemp("live")) as run:
        yield run
