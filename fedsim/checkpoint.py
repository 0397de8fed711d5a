"""Checkpoints: safetensors and a JSON manifest with checksums, written to a temporary name and renamed.

A folder ``checkpoints/round-00003`` holds ``server.safetensors``, one ``clients-00000.safetensors`` per batch of
clients (named by its first one, each tensor by its client, as in ``00004/params/relation``) and ``manifest.json``.
It appears by one rename, so it is whole or absent; a file that was cut short or altered later is found by its
checksum, and the checkpoint before it is used.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsim.data.storage import sha256_file
from fedsim.errors import RunError
from fedsim.parsing import parse_json
from fedsim.run_records import MANIFEST, check_record

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2


def clients_file(folder: Path, clients: Iterable[int]) -> Path:
    """Return where the state of a batch of clients stands."""
    return folder / f"clients-{min(clients):05d}.safetensors"


def server_file(folder: Path) -> Path:
    """Return where the server's state stands."""
    return folder / "server.safetensors"


def checkpoint_folder(checkpoints: Path, round_num: int) -> Path:
    """Return where the checkpoint of a round stands."""
    return checkpoints / f"round-{round_num:05d}"


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors, flushed to disk.

    Raises:
        RunError: if there is no space left, or the place cannot be written.
    """
    try:
        save_file(tensors, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except SafetensorError as err:
        raise RunError(write_failure(path, str(err))) from err
    except OSError as err:
        raise RunError(write_failure(path, str(err.strerror or err), err.errno)) from err


def save_clients(states: Mapping[int, Mapping[str, Tensor]], folder: Path) -> None:
    """Write the states of a batch of clients as one file."""
    tensors = {f"{client:05d}/{name}": value for client, state in states.items() for name, value in state.items()}
    save_tensors(tensors, clients_file(folder, states))


def load_clients(clients: Iterable[int], folder: Path) -> dict[int, dict[str, Tensor]]:
    """Read what `save_clients` wrote of the same batch; RunError if the file is missing or not whole."""
    states: dict[int, dict[str, Tensor]] = {client: {} for client in clients}
    for path, value in load_tensors(clients_file(folder, states)).items():
        client, _, name = path.partition("/")
        states[int(client)][name] = value
    return states


def load_client(client: int, folder: Path) -> dict[str, Tensor]:
    """Read the state of one client, whatever batch it was saved with; RunError if there is none that is whole."""
    prefix = f"{client:05d}/"
    for path in sorted(folder.glob("clients-*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                mine = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
                if mine:
                    return {name.removeprefix(prefix): file.get_tensor(name) for name in mine}
        except (OSError, SafetensorError) as err:
            raise RunError(f"{path} cannot be read: {err}") from err
    raise RunError(f"{folder} has no state of client {client}; it is damaged")


def write_failure(path: Path, reason: str, code: int | None = None) -> str:
    """Say that a file of the run could not be written, and how to go on."""
    full = code == errno.ENOSPC or "No space left" in reason or "os error 28" in reason
    mend = "free some space" if full else "check the folder's permissions"
    what = "no space left" if full else reason
    return f"{path} cannot be written: {what}; {mend}, then continue with `fedsim resume {_run_of(path)}`"


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors; RunError if the file is missing or not whole."""
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as err:
        raise RunError(f"{path} cannot be read: {err}") from err


def write_checkpoint(checkpoints: Path, round_num: int, progress: dict[str, Any], save: Callable[[Path], None]) -> Path:
    """Write a checkpoint whole or not at all.

    Args:
        checkpoints: folder of all checkpoints.
        round_num: the completed round.
        progress: what the round loop needs to go on, as JSON.
        save: writes the state files into a folder.

    Returns:
        The checkpoint's folder.
    """
    final = checkpoint_folder(checkpoints, round_num)
    temporary = checkpoints / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save(temporary)
        files = {path.name: sha256_file(path) for path in sorted(temporary.glob("*.safetensors"))}
        manifest = {"format_version": FORMAT_VERSION, "round": round_num, "progress": progress, "sha256": files}
        write_text(temporary / "manifest.json", json.dumps(manifest, indent=1))
        sync_folder(temporary)  # its entries: they must not come to the disk later than its new name
        if final.exists():  # left by a run that was cut off between the rename and its next line
            shutil.rmtree(final)
        temporary.rename(final)
        sync_folder(checkpoints)
    except OSError as err:
        raise RunError(write_failure(final, str(err.strerror or err), err.errno)) from err
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def prune_checkpoints(checkpoints: Path, keep: int, best_round: int | None) -> None:
    """Delete all but the newest `keep` and the best one."""
    for folder in list_checkpoints(checkpoints)[keep:]:
        if best_round is None or folder.name != f"round-{best_round:05d}":
            shutil.rmtree(folder)


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the checkpoint folders, newest first."""
    return sorted(checkpoints.glob("round-*"), reverse=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and verify a checkpoint's manifest and files.

    Raises:
        RunError: naming the file that is missing, cut short or altered.
    """
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        files, version = dict(manifest["sha256"]), manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise RunError(f"{path} is missing or damaged ({err})") from err
    if version != FORMAT_VERSION:
        raise RunError(f"{path} has format version {version}; this fedsim reads version {FORMAT_VERSION}")
    check_record(manifest, MANIFEST, path)
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise RunError(f"{folder / name} is missing")
        if sha256_file(folder / name) != expected:
            raise RunError(f"{folder / name} was cut short or altered (its checksum differs)")
    return manifest


def newest_checkpoint(checkpoints: Path) -> tuple[Path, dict[str, Any]]:
    """Find the newest checkpoint that is whole; a damaged one is skipped with a warning.

    Raises:
        RunError: if there is none.
    """
    damage = []
    for folder in list_checkpoints(checkpoints):
        try:
            return folder, read_manifest(folder)
        except RunError as err:
            damage.append(str(err))
            logger.warning("checkpoint %s is not used: %s; trying the one before it", folder.name, err)
    detail = f" ({'; '.join(damage)})" if damage else ""
    raise RunError(f"{checkpoints} has no usable checkpoint{detail}; start the run anew with `fedsim run`")


def write_text(path: Path, text: str) -> None:
    """Write a text file, flushed to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_text(temporary, text)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as err:
        temporary.unlink(missing_ok=True)
        raise RunError(write_failure(path, str(err.strerror or err), err.errno)) from err


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _run_of(path: Path) -> Path:
    """Return the run folder that a checkpoint file belongs to."""
    for parent in path.parents:
        if parent.name == "checkpoints":
            return parent.parent
    return path.parent
