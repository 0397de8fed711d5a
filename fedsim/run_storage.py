"""The copy of a run folder at a URI, from which any machine can go on: S3, Google Cloud Storage, HDFS, a mounted disk.

A run works in its folder and hands what is new to the copy after each checkpoint. A checkpoint is whole there once its
manifest stands, which goes last when it is written and first when it is deleted; one without a manifest is never
fetched, and one that was altered later is found by the checksums in its manifest, as in any run folder.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import yaml

from fedsim.checkpoint import replace_text
from fedsim.config import dump_config, load_config
from fedsim.errors import RunError
from fedsim.parsing import parse_yaml

logger = logging.getLogger(__name__)

MANIFEST, RESULT, CONFIG = "manifest.json", "result.json", "config.yaml"
STATES = ("checkpoints", "models")  # folders of folders with a manifest, and one such folder
OBJECT_STORES = ("s3", "gcs")  # an object appears there whole or not at all, and needs no folder
BLOCK_BYTES = 1 << 22


class RunStorage:
    """The copy of one run folder.

    Args:
        uri: of the copy, for example ``s3://bucket/runs/trial``; what pyarrow does not know is asked of fsspec.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.sent: dict[str, tuple[int, int]] = {}  # name -> size and time of change of what stands there
        self._place: tuple[Any, str] | None = None

    def refuse_existing(self) -> None:
        """Refuse a place that cannot be used or holds a run, before anything costly is started.

        Raises:
            RunError: saying what is in the way.
        """
        with self._explained():
            self._check_bucket()
            if self._is_file(CONFIG):
                raise RunError(
                    f"storage {self.uri} holds a run; continue it with `fedsim resume {self.uri}`, or give another "
                    f"--storage"
                )
            if self._list(""):
                raise RunError(f"storage {self.uri} holds files but no run; give another --storage")

    def push(self, folder: Path) -> None:
        """Bring the copy up to date: files, then whole checkpoints and models, last the result.

        Raises:
            RunError: if the storage cannot be written, or holds something else; a copy that was there before can
                still be resumed.
        """
        with self._explained():
            if not self.sent:
                self._refuse_other(folder)
            result = folder / RESULT
            files = {path.relative_to(folder).as_posix(): path for path in sorted(_files(folder))}
            for name, path in files.items():
                if path != result and not _is_state(name):
                    self._put_file(path, name)
            self._delete_lost(folder, set(files))
            states = [*sorted((folder / "checkpoints").glob("round-*")), folder / "models"]
            for path in states:
                if (path / MANIFEST).is_file():
                    self._put_state(path, path.relative_to(folder).as_posix())
            kept = {path.name for path in states}
            for name in self._list_folders("checkpoints"):
                if name not in kept:
                    self._delete_state(f"checkpoints/{name}")
            if result.is_file():
                self._put_file(result, RESULT)

    def fetch(self, folder: Path, *, unfinished: bool = False) -> None:
        """Make a run folder of the copy, whole or not at all.

        Args:
            folder: to make.
            unfinished: refuse a run that is finished.

        Raises:
            RunError: if there is no run, or it is finished, or the folder exists or cannot be written.
        """
        temporary = folder.with_name(f".{folder.name}.tmp")
        if folder.exists():
            raise RunError(
                f"run folder {folder} exists; continue it with `fedsim resume {folder}`, or give another --output"
            )
        shutil.rmtree(temporary, ignore_errors=True)  # left by a fetch that was killed
        try:
            with self._explained():
                self._check_bucket()
                if not self._is_file(CONFIG):
                    raise RunError(f"storage {self.uri} holds no run (it has no {CONFIG}); check the URI")
                if unfinished and self._is_file(RESULT):
                    raise RunError(f"the run at {self.uri} is finished; get it with `fedsim fetch {self.uri}`")
                for name in self._whole_files():
                    self._get_file(name, temporary / name)
            config = load_config(temporary / CONFIG)
            if config.storage != self.uri:  # the copy was moved: the run goes on where it is now
                moved = config.model_copy(update={"storage": self.uri})
                replace_text(temporary / CONFIG, dump_config(moved))
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _refuse_other(self, folder: Path) -> None:
        """Refuse to write over, or to tidy up, what is not the copy of this run."""
        if self._is_file(CONFIG):
            if _identity(self._read(CONFIG)) != _identity((folder / CONFIG).read_bytes()):
                raise RunError(f"storage {self.uri} holds another run than {folder}; give another --storage")
        elif self._list(""):
            raise RunError(f"storage {self.uri} holds files but no run; give another --storage")

    def _delete_lost(self, folder: Path, names: set[str]) -> None:
        """Delete what was replaced under another name, as event files are; only in folders that the run has."""
        filesystem, root = self._open()
        for name in list(self._list_files()):
            top, below, _ = name.partition("/")
            if below and name not in names and not _is_state(name) and (folder / top).is_dir():
                filesystem.delete_file(f"{root}/{name}")
                self.sent.pop(name, None)

    def _whole_files(self) -> list[str]:
        """List the files of the copy; those of a checkpoint without a manifest are left out."""
        names = set(self._list_files())
        strange = [name for name in names if {"", ".", ".."} & set(name.split("/"))]
        if strange:  # an object's name is any text, and would be a path here
            raise RunError(f"storage {self.uri} holds {strange[0]!r}, which is no file of a run; delete it there")
        kept = []
        for name in sorted(names):
            place, _, _ = name.rpartition("/")
            if not _is_state(name) or f"{place}/{MANIFEST}" in names:
                kept.append(name)
            else:
                logger.warning("%s of %s is left out: its folder has no manifest, it is half-written", name, self.uri)
        return kept

    def _put_state(self, folder: Path, name: str) -> None:
        """Store a checkpoint or models that are not there yet."""
        manifest = f"{name}/{MANIFEST}"
        if self.sent.get(manifest) == _version(folder / MANIFEST):
            return
        if self._is_file(manifest):
            if self._read(manifest) == (folder / MANIFEST).read_bytes():  # stored by a process that is gone
                self.sent[manifest] = _version(folder / MANIFEST)
                return
            self._delete_state(name)
        for path in sorted(_files(folder)):
            if path.name != MANIFEST:
                self._put_file(path, f"{name}/{path.name}")
        self._put_file(folder / MANIFEST, manifest)

    def _delete_state(self, name: str) -> None:
        """Delete a checkpoint, its manifest first."""
        filesystem, root = self._open()
        self.sent = {sent: version for sent, version in self.sent.items() if not sent.startswith(f"{name}/")}
        if self._is_file(f"{name}/{MANIFEST}"):
            filesystem.delete_file(f"{root}/{name}/{MANIFEST}")
        filesystem.delete_dir(f"{root}/{name}")

    def _put_file(self, path: Path, name: str) -> None:
        """Store a file unless it is there as it is here; whole or not at all, as far as the file system can."""
        version = _version(path)
        if self.sent.get(name) == version:
            return
        filesystem, root = self._open()
        target = f"{root}/{name}"
        if filesystem.type_name in OBJECT_STORES:
            with path.open("rb") as source, filesystem.open_output_stream(target) as sink:
                _copy(source, sink)
        else:
            filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            temporary = f"{target}.tmp"
            with path.open("rb") as source, filesystem.open_output_stream(temporary) as sink:
                _copy(source, sink)
            filesystem.move(temporary, target)
        self.sent[name] = version

    def _get_file(self, name: str, path: Path) -> None:
        filesystem, root = self._open()
        path.parent.mkdir(parents=True, exist_ok=True)
        with filesystem.open_input_stream(f"{root}/{name}") as source, path.open("wb") as sink:
            _copy(source, sink)

    def _read(self, name: str) -> bytes:
        filesystem, root = self._open()
        with filesystem.open_input_stream(f"{root}/{name}") as source:
            return bytes(source.read())

    def _is_file(self, name: str) -> bool:
        filesystem, root = self._open()
        return bool(filesystem.get_file_info(f"{root}/{name}").is_file)

    def _list_files(self) -> Iterator[str]:
        for info in self._list("", recursive=True):
            if info.is_file and not info.base_name.endswith(".tmp"):
                yield info.path.removeprefix(f"{self._open()[1]}/")

    def _list_folders(self, name: str) -> list[str]:
        return sorted({info.base_name for info in self._list(name) if not info.is_file})

    def _list(self, name: str, *, recursive: bool = False) -> list[Any]:
        from pyarrow.fs import FileSelector

        filesystem, root = self._open()
        place = f"{root}/{name}".rstrip("/")
        return list(filesystem.get_file_info(FileSelector(place, allow_not_found=True, recursive=recursive)))

    def _check_bucket(self) -> None:
        """Look whether the bucket of an object store exists: without one, reads find nothing and writes fail late."""
        filesystem, root = self._open()
        bucket = root.partition("/")[0]
        if filesystem.type_name in OBJECT_STORES and filesystem.get_file_info(bucket).type.name == "NotFound":
            raise RunError(f"storage {self.uri}: there is no bucket '{bucket}'; create it, or mend the URI")

    def _open(self) -> tuple[Any, str]:
        """Return the file system and the path of the copy in it."""
        if self._place is None:
            filesystem, path = _open(self.uri)
            self._place = filesystem, path.rstrip("/")
        return self._place

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what a file system raises into one message."""
        try:
            yield
        except OSError as err:
            place = Path(str(err.filename)) if err.filename else None
            if place is not None and place.exists():  # a file of ours, not one of the storage
                raise
            raise RunError(f"storage {self.uri}: {_reason(err)}") from err


def fetch_run(uri: str, folder: Path | None = None, *, unfinished: bool = False) -> Path:
    """Make a run folder of the copy at a URI; its name is that of the copy, in ``runs/``, unless one is given."""
    place = folder or local_folder(uri)
    RunStorage(uri.rstrip("/")).fetch(place, unfinished=unfinished)
    return place


def local_folder(uri: str) -> Path:
    """Name the run folder of a copy."""
    return Path("runs") / Path(urlsplit(uri).path.rstrip("/") or urlsplit(uri).netloc).name


def is_uri(text: str) -> bool:
    """Return whether a run is named by the URI of its copy instead of a folder."""
    return "://" in text


def _open(uri: str) -> tuple[Any, str]:
    # Here, because actors import the run's other parts too, and pyarrow takes memory in each.
    from pyarrow import ArrowException, ArrowInvalid
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    try:
        filesystem, path = FileSystem.from_uri(uri)
        return filesystem, str(path)
    except ArrowInvalid as err:
        if "Unrecognized filesystem type" not in str(err):
            raise RunError(
                f"storage {uri} is not a usable URI: {_line(err)}; write for example s3://bucket/run"
            ) from err
    except (ArrowException, OSError) as err:
        raise RunError(f"storage {uri}: {_reason(err)}") from err
    import fsspec

    try:
        filesystem, path = fsspec.url_to_fs(uri)
    except (ValueError, ImportError) as err:
        raise RunError(
            f"storage {uri} has a scheme that neither pyarrow nor fsspec can use here ({_line(err)}); use s3, gs, hdfs "
            f"or file, or install fsspec's package for it"
        ) from err
    return PyFileSystem(FSSpecHandler(filesystem)), str(path)


def _reason(err: Exception) -> str:
    """Say in words that a user can act on why a storage refused; the file system's own words otherwise."""
    text = _line(err)
    if any(word in text for word in ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT", "HTTP status 403")):
        return (
            f"access is denied ({text}); give credentials that may read and write there by the environment "
            f"(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the machine's role)"
        )
    if "NO_SUCH_BUCKET" in text:
        return f"there is no such bucket ({text}); create it, or mend the URI"
    if any(word in text for word in ("NETWORK_CONNECTION", "Connection refused", "REQUEST_TIMEOUT", "resolve host")):
        return f"it cannot be reached ({text}); check the network and the endpoint (AWS_ENDPOINT_URL)"
    return text


def _line(err: Exception) -> str:
    return " ".join(str(err).split()).rstrip(".")


def _identity(config: bytes) -> dict[str, Any]:
    """Return what a run is, wherever it stands."""
    try:
        tree = parse_yaml(config)
    except yaml.YAMLError as err:
        raise RunError(f"{CONFIG} of the stored run is not YAML: {_line(err)}") from err
    if not isinstance(tree, dict):
        raise RunError(f"{CONFIG} of the stored run must hold sections (key: value), not a {type(tree).__name__}")
    return {name: value for name, value in tree.items() if name not in ("output", "storage")}


def _is_state(name: str) -> bool:
    return name.partition("/")[0] in STATES


def _files(folder: Path) -> Iterator[Path]:
    """Walk the files below a folder; what starts with a dot is about to be renamed or deleted."""
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            with contextlib.suppress(FileNotFoundError):
                yield from _files(Path(entry.path))
        elif entry.is_file():
            yield Path(entry.path)


def _version(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _copy(source: BinaryIO, sink: BinaryIO) -> None:
    shutil.copyfileobj(source, sink, BLOCK_BYTES)
