"""Runs cells: one that is finished is read, one that was stopped goes on, another is started."""

import logging
import shutil
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim import simulation
from fedsim.benchmark.folder import locked
from fedsim.benchmark.plan import Cell
from fedsim.config import load_config
from fedsim.errors import FedSimError, RunError
from fedsim.parsing import parse_json
from fedsim.run_folder import RunFolder
from fedsim.run_records import FULL_RESULT, check_record

logger = logging.getLogger(__name__)

LOCK_SECONDS = 60.0  # a worker of a killed benchmark may live on for a while


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: with the contents of its result.json, or with a message.

    Attributes:
        folder: the cell's run folder.
        result: the result; None if the run failed.
        error: why it failed.
    """

    folder: Path
    result: dict[str, Any] | None = None
    error: str = ""


Outcomes = Generator[Outcome, None, None]
Executor = Callable[[Sequence[Cell]], Outcomes]
"""Runs cells and yields their outcomes as they come; what still runs when it is closed is ended."""


def read_finished(cell: Cell) -> Outcome | None:
    """Return a cell's outcome if its run is finished; None if it is not."""
    folder = RunFolder(cell.folder)
    if not folder.result_file.is_file():
        return None
    try:
        _check_same(cell)
        return Outcome(cell.folder, _read_result(folder.result_file))
    except FedSimError as err:
        return Outcome(cell.folder, error=str(err))
    except (OSError, ValueError) as err:
        return Outcome(cell.folder, error=f"{folder.result_file} cannot be read ({err}); remove {cell.folder}")


def _read_result(path: Path) -> dict[str, Any]:
    """Read a result that a table can be made of; RunError or ValueError if it is none."""
    result = parse_json(path.read_text(encoding="utf-8"))
    check_record(result, FULL_RESULT, path)
    return dict(result)


def run_in_process(cells: Sequence[Cell], *, keep_models: bool) -> Outcomes:
    """Run cells one after the other in this process."""
    return (run_cell(cell, keep_models) for cell in cells)


def run_cell(cell: Cell, keep_models: bool) -> Outcome:
    """Run a cell to its end; what goes wrong becomes its outcome, for the other cells go on.

    Args:
        cell: what to run.
        keep_models: keep the checkpoints and models of the finished run; they are most of its bytes.
    """
    failure = cell.folder.with_name(f"{cell.folder.name}.failed.txt")
    started = time.perf_counter()
    try:
        busy = f"{cell.folder} is being run by another process; wait for it, or end it"
        with locked(cell.folder.with_name(f".{cell.folder.name}.lock"), busy, LOCK_SECONDS):
            failure.unlink(missing_ok=True)
            _run_or_resume(cell)
            if not keep_models:
                for name in ("checkpoints", "models"):
                    shutil.rmtree(cell.folder / name, ignore_errors=True)
    except Exception as err:  # noqa: BLE001 (whatever it is, it stops this cell alone, and is told and kept)
        return _failed(cell, failure, err)
    logger.info("%s took %.1f s", cell.name, time.perf_counter() - started)
    outcome = read_finished(cell)
    assert outcome is not None, "a run ends with a result"
    return outcome


def _run_or_resume(cell: Cell) -> None:
    folder = RunFolder(cell.folder)
    if folder.path.exists() and not folder.metrics_file.is_file():
        shutil.rmtree(folder.path)  # killed while the folder was made: there is nothing to go on from
    if not folder.path.exists():
        simulation.run(cell.config)
        return
    _check_same(cell)
    if not folder.result_file.is_file():
        simulation.resume(folder.path)


def _check_same(cell: Cell) -> None:
    """Refuse a run folder that holds a run of another config."""
    stored = load_config(cell.folder / "config.yaml")
    if stored.model_copy(update={"output": cell.config.output}) != cell.config:
        raise RunError(f"{cell.folder} was run with another config; remove it, or give another --output")


def _failed(cell: Cell, failure: Path, err: Exception) -> Outcome:
    text = " ".join(str(err).split()) or "no message"
    if isinstance(err, FedSimError):
        return Outcome(cell.folder, error=text)
    message = f"{type(err).__name__}: {text}"
    try:
        failure.write_text(traceback.format_exc(), encoding="utf-8")
    except OSError:  # a full disk is often why it failed; the message says enough
        return Outcome(cell.folder, error=message)
    return Outcome(cell.folder, error=f"{message} (traceback in {failure})")
