"""Event files for TensorBoard: the scalars of a run by round.

They are made of the rows of metrics.jsonl (see `fedsim.results.metric_rows`) and nothing else: whoever opens the file
of a run that goes on writes the rounds before anew, so that no point is there twice.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

# The writer that works at once: tensorboardX's SummaryWriter adds a thread and a queue between processes.
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from fedsim.checkpoint import write_failure
from fedsim.errors import RunError

FOLDER = "tensorboard"  # in the run folder
VERSION = "brain.Event:2"  # of the file format


class EventFile:
    """The event file of a run.

    Args:
        run_folder: the run's folder; event files that are there are replaced.
        rows: of the rounds that are done, as metrics.jsonl holds them.
        per_client: write each client's loss, seconds and validation MRR too.

    Raises:
        RunError: if it cannot be written.
    """

    def __init__(self, run_folder: Path, rows: Sequence[Mapping[str, Any]] = (), *, per_client: bool = True) -> None:
        self.folder = run_folder / FOLDER
        self.per_client = per_client
        try:
            self.folder.mkdir(exist_ok=True)
            for old in self.folder.glob("events.out.tfevents.*"):
                old.unlink()
            # Named anew each time: a TensorBoard that is looking at the old file goes on to the next one.
            self.path = self.folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}.fedsim"
            self._writer = RecordWriter(str(self.path))
            self._write(Event(wall_time=time.time(), file_version=VERSION))
            # Tells a TensorBoard that has shown the old file to drop what it knows.
            self._write(Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START)))
        except OSError as err:
            raise RunError(write_failure(self.folder, str(err.strerror), err.errno)) from err
        self.add(rows)

    def __enter__(self) -> "EventFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the scalars of finished rounds.

        Raises:
            RunError: if they cannot be written.
        """
        finished = {row["round"]: row.get("unix_seconds", time.time()) for row in rows if row["client"] is None}
        try:
            for row in rows:
                if row["client"] is None or self.per_client:
                    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row)]
                    when = finished.get(row["round"], time.time())
                    self._write(Event(wall_time=when, step=row["round"], summary=Summary(value=values)))
            self._writer.flush()
        except OSError as err:
            raise RunError(write_failure(self.path, str(err.strerror), err.errno)) from err

    def _write(self, event: Event) -> None:
        self._writer.write(event.SerializeToString())


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield tag and value of each scalar in a row of metrics.jsonl; a client's tags begin with its number."""
    if row["client"] is not None:
        client = f"client_{row['client']:05d}"
        if "losses" in row:
            yield f"{client}/loss", row["losses"]["total"]
            yield f"{client}/train_seconds", row["seconds"]
        if "valid" in row:
            yield f"{client}/valid_mrr", row["valid"]["mrr"]
        return
    if row.get("loss") is not None:
        yield "round/loss", row["loss"]
    for name, value in row.get("valid", {}).items():
        if name != "num_queries":
            yield f"valid/{name}", value
    yield from ((f"seconds/{phase}", value) for phase, value in row["phase_seconds"].items())
    yield from (("bytes/up", row["bytes_up"]), ("bytes/down", row["bytes_down"]))
    yield from ((f"server_loss/{name}", value) for name, value in row["server_losses"].items())
    for name, metrics in row.get("imputation", {}).items():
        yield from _named(f"imputation/{name}", metrics.items())
    yield from _named("consistency", row.get("consistency", {}).items())


def _named(prefix: str, values: Iterable[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    return ((f"{prefix}/{name}", value) for name, value in values)
