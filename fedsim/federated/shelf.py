"""The state of clients that are not at work, in a file instead of in memory.

With many clients, what they keep between rounds (tables, optimiser state) is most of a run's memory, and one batch of
them works at a time. The file has no name: it ends with its process, however that ends.
"""

import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from safetensors.torch import load, save

from fedsim.errors import RunError
from fedsim.federated.client import Client
from fedsim.process import return_freed_memory


@dataclass(frozen=True)
class _Place:
    """A client's part of the file, and how much of it is in use."""

    start: int
    num_bytes: int
    used_bytes: int


class Shelf:
    """Keeps clients' state in a file between two uses, or leaves it in memory if there is no folder.

    Args:
        folder: where the file is made; None keeps all in memory.
    """

    def __init__(self, folder: str | None) -> None:
        self.folder = folder
        self._file: IO[bytes] | None = None
        self._end = 0
        self._places: dict[int, _Place] = {}  # by client

    @contextmanager
    def at_work(self, clients: Sequence[Client], *, changes: bool = True) -> Iterator[None]:
        """Hold the state of clients in memory for the length of the block.

        Args:
            clients: of which something is asked.
            changes: whether that may change their state; if not, it is not written again.

        Raises:
            RunError: if the folder cannot be written or read.
        """
        if self.folder is None:
            yield
            return
        for client in clients:
            self._take(client)
        yield
        for client in clients:
            if changes or client.data.client not in self._places:
                self._put(client)
            client.load_state({})
        return_freed_memory()  # whoever keeps state in a file wants memory more than milliseconds

    def forget(self, client: int) -> None:
        """Give up what is kept of a client that goes elsewhere; its part of the file stays unused."""
        self._places.pop(client, None)

    def _take(self, client: Client) -> None:
        place = self._places.get(client.data.client)
        if place is None:
            return  # it is new, and was never put away
        try:
            file = self._open()
            file.seek(place.start)
            data = file.read(place.used_bytes)
        except OSError as err:
            raise RunError(self._failure(err)) from err
        if len(data) != place.used_bytes:
            raise RunError(
                f"client {client.data.client}: its state in 'runtime.scratch' = '{self.folder}' is cut short; "
                f"continue from the last checkpoint with `fedsim resume`"
            )
        client.load_state(load(data))

    def _put(self, client: Client) -> None:
        data = save(client.state())
        old = self._places.get(client.data.client)
        if old is not None and len(data) <= old.num_bytes:
            place = _Place(old.start, old.num_bytes, len(data))
        else:  # what it had is left unused: a client's state grows no more than a few times in a run
            place = _Place(self._end, len(data), len(data))
        try:
            file = self._open()
            file.seek(place.start)
            file.write(data)
            file.flush()  # what cannot be written is said now, not at the next client
        except OSError as err:
            raise RunError(self._failure(err)) from err
        self._end = max(self._end, place.start + place.num_bytes)
        self._places[client.data.client] = place

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 (open to the end)
            weakref.finalize(self, self._file.close)
        return self._file

    def _failure(self, err: OSError) -> str:
        return (
            f"config field 'runtime.scratch' = '{self.folder}': {err.strerror or err}; give a folder on every node "
            f"that can be written and has room for the clients' state, or null to keep it in memory"
        )
