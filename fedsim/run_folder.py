"""The folder of a run: resolved config, versions, metrics, checkpoints, final models, result and log."""

import contextlib
import importlib.metadata
import json
import logging
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from fedsim.checkpoint import checkpoint_folder, newest_checkpoint, replace_text, write_failure, write_text
from fedsim.config import Config, dump_config, load_config
from fedsim.errors import RunError
from fedsim.parsing import parse_json
from fedsim.run_records import METRIC_ROW, TIMELINE_ROW, check_record
from fedsim.run_storage import RunStorage, local_folder

if TYPE_CHECKING:  # keeps torch out of a look at a folder
    from fedsim.federated.timeline import Span

logger = logging.getLogger(__name__)

VERSIONED = ("fedsim", "torch", "numpy", "ray", "scipy", "scikit-learn", "pydantic", "safetensors")


class RunFolder:
    """Paths and files of one run.

    Args:
        path: the folder.
        storage: where the run is kept as well.
    """

    def __init__(self, path: Path, storage: RunStorage | None = None) -> None:
        self.path, self.storage = path.absolute(), storage
        self.metrics_file = self.path / "metrics.jsonl"
        self.timeline_file = self.path / "timeline.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.models = self.path / "models"
        self.result_file = self.path / "result.json"

    @staticmethod
    def refuse_existing(config: Config) -> None:
        """Refuse a run folder or a stored run that exists, before anything costly is started.

        Raises:
            RunError: if the config names one that exists, or a storage that cannot be used.
        """
        name = default_output(config) if config.output is None and config.storage is not None else config.output
        if name is not None and Path(name).exists():
            raise RunError(_exists(name))
        if config.storage is not None:
            RunStorage(config.storage).refuse_existing()

    @classmethod
    def create(cls, config: Config) -> "RunFolder":
        """Make the folder of a new run and write what is known at its start.

        Raises:
            RunError: if the folder exists or cannot be made.
        """
        name = config.output or default_output(config)
        folder = cls(Path(name), _storage(config))
        try:
            folder.path.mkdir(parents=True)
        except FileExistsError as err:
            raise RunError(_exists(name)) from err
        except OSError as err:
            raise RunError(f"run folder {name} cannot be made: {err.strerror}; give another --output") from err
        try:
            write_text(folder.path / "config.yaml", dump_config(config))
            write_text(folder.path / "versions.json", json.dumps(versions(), indent=1) + "\n")
            write_text(folder.metrics_file, "")
            if folder.storage is not None:
                folder.storage.push(folder.path)
        except RunError:
            shutil.rmtree(folder.path, ignore_errors=True)
            raise
        except OSError as err:
            shutil.rmtree(folder.path, ignore_errors=True)  # without a config it could not be resumed
            raise RunError(
                f"run folder {name} cannot be written: {err.strerror}; nothing was kept; free some space, or give "
                f"another --output"
            ) from err
        return folder

    @classmethod
    def open(cls, path: Path) -> tuple["RunFolder", Config]:
        """Open a run that exists, with its config.

        Raises:
            RunError: if it is not a run folder.
        """
        file = path / "config.yaml"
        if not file.is_file():
            raise RunError(f"{path} is not a run folder (it has no config.yaml); give the folder of a `fedsim run`")
        config = load_config(file)
        return cls(path, _storage(config)), config

    def checkpoint(self, round_num: int) -> Path:
        """Return where a round's checkpoint stands."""
        return checkpoint_folder(self.checkpoints, round_num)

    def newest_checkpoint(self) -> tuple[Path | None, dict[str, Any] | None]:
        """Return the newest whole checkpoint and the progress in it; none if nothing was saved yet.

        Raises:
            RunError: if there are checkpoints, and none is whole.
        """
        if not self.checkpoints.is_dir() or not any(self.checkpoints.glob("round-*")):
            return None, None
        checkpoint, manifest = newest_checkpoint(self.checkpoints)
        return checkpoint, manifest["progress"]

    def append_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to metrics.jsonl."""
        try:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        except OSError as err:
            raise RunError(write_failure(self.metrics_file, str(err.strerror), err.errno)) from err

    def append_timeline(
        self, event: str, round_num: int, spans: "Sequence[Span]" = (), error: str | None = None
    ) -> None:
        """Add a row to timeline.jsonl: ``start``, ``work`` or ``stop``; a resumed run goes on in the same file."""
        row: dict[str, Any] = {"event": event, "time": round(time.time(), 3), "round": round_num}
        if spans:
            row["spans"] = [
                [span.actor, span.what, round(span.started, 3), round(span.seconds, 3), span.failed] for span in spans
            ]
        if error is not None:
            row["error"] = error
        # No number of the run depends on it: a full disk is told by the files that it needs.
        with contextlib.suppress(OSError), self.timeline_file.open("a", encoding="utf-8") as file:
            before = "\n" if event == "start" else ""  # ends a line that a kill cut off
            file.write(before + json.dumps(row) + "\n")

    def read_timeline(self) -> list[dict[str, Any]]:
        """Return the rows of timeline.jsonl that are whole; none if the run has no such file."""
        return _read_rows(self.timeline_file, TIMELINE_ROW, to_the_end=True) if self.timeline_file.is_file() else []

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl; a last line that was cut off by a kill is left out."""
        return _read_rows(self.metrics_file, METRIC_ROW)

    def rewind_metrics(self, round_num: int) -> None:
        """Keep the rows of rounds up to `round_num`: what came after the checkpoint will be done again."""
        rows = [row for row in self.read_metrics() if row["round"] <= round_num]
        replace_text(self.metrics_file, "".join(json.dumps(row) + "\n" for row in rows))

    def publish_models(self, checkpoint: Path) -> None:
        """Copy the client and server states of the best checkpoint to models/."""
        temporary = self.path / ".models.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(checkpoint, temporary)
            shutil.rmtree(self.models, ignore_errors=True)
            temporary.rename(self.models)
        except OSError as err:
            raise RunError(write_failure(self.models, str(err.strerror or err), err.errno)) from err
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def store(self) -> None:
        """Bring the stored copy up to date, if the run has one; until the run is finished, a failure is a warning."""
        if self.storage is None:
            return
        try:
            self.storage.push(self.path)
        except RunError as err:
            if self.result_file.is_file():
                raise RunError(f"{err}; the run is finished: bring it there with `fedsim store {self.path}`") from err
            logger.warning("%s; the run goes on in %s, and tries again with its next checkpoint", err, self.path)

    def remove_half_written(self) -> None:
        """Delete what an interrupted checkpoint left: actors may write until they end, after the driver cleaned up."""
        for folder in self.checkpoints.glob(".*.tmp"):
            shutil.rmtree(folder, ignore_errors=True)


def _read_rows(path: Path, kind: TypeAdapter[Any], *, to_the_end: bool = False) -> list[dict[str, Any]]:
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "it is not UTF-8 text"
        raise RunError(f"{path} cannot be read: {reason}; the run's folder is damaged") from err
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
        except ValueError:
            if not to_the_end:
                break
            continue
        check_record(row, kind, f"{path}:{number}")
        rows.append(row)
    return rows


def _storage(config: Config) -> RunStorage | None:
    return None if config.storage is None else RunStorage(config.storage)


def _exists(name: str) -> str:
    return f"run folder {name} exists; continue it with `fedsim resume {name}`, or give another --output"


def default_output(config: Config) -> str:
    """Name a run folder after its stored copy, or data set, strategy and time (in the same second with a number)."""
    if config.storage is not None:
        return str(local_folder(config.storage))
    data = Path(config.data.path).name
    base = f"runs/{data}-{config.federation.strategy}-{datetime.now():%Y%m%d-%H%M%S}"
    name, number = base, 2
    while Path(name).exists():
        name, number = f"{base}-{number}", number + 1
    return name


def versions() -> dict[str, Any]:
    """Return the versions, the machine and the git commit that a result depends on."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {
        "python": sys.version.split()[0],
        "packages": found,
        "machine": f"{platform.machine()} {platform.system()}",
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """Return the commit of the source tree, marked if there are changes; None outside a checkout."""
    source = Path(__file__).resolve().parent.parent
    try:
        command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
