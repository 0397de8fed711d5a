"""Checkpoints of actors: each writes and reads its own files where it sees the run's folder, else by the driver.

The driver's machine has the run's folder. Other machines may share it (then everybody writes at once), or have a
folder of the same name that is another one: a mark tells which.
"""

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedsim.checkpoint import save_clients, save_tensors, server_file, write_failure
from fedsim.errors import RunError
from fedsim.models.parameters import Params


@contextmanager
def marked(folder: Path) -> Iterator[Path]:
    """Put a mark into a folder, for as long as actors look for it."""
    mark = folder.absolute() / f".{uuid.uuid4().hex}"
    try:
        mark.touch()
    except OSError as err:
        raise RunError(write_failure(mark, str(err.strerror), err.errno)) from err
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


def keep_server(state: Params | None, folder: Path) -> None:
    """Write what the server could not write where it is."""
    if state is not None:
        save_tensors(state, server_file(folder))


def keep_clients(states: Mapping[int, Params] | None, folder: Path) -> None:
    """Write what an actor could not write where it is."""
    if states is not None:
        save_clients(states, folder)
