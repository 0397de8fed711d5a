"""Reads and writes the files that a data set is made of, without pickle and with errors that name file and line."""

import hashlib
import json
import math
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.errors import DataError
from fedsim.parsing import parse_json

MAX_ID_DIGITS = 18  # below 2^63
# Zeros compress to a thousandth, real features to about a half.
MAX_UNPACKED_RATIO, MIN_UNPACKED_BYTES = 200, 1 << 28

_SAFETENSORS_DTYPES: dict[str, type[np.generic]] = {
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "I32": np.int32,
    "I64": np.int64,
}


def read_text(path: Path) -> str:
    """Read a UTF-8 file whole."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as err:
        raise DataError(f"{path}: file not found; the folder is incomplete, import the data set again") from err
    except UnicodeDecodeError as err:
        raise DataError(f"{path}: not UTF-8 at byte {err.start}; convert the file to UTF-8") from err
    except OSError as err:
        raise DataError(f"{path}: cannot be read ({err.strerror})") from err


def read_rows(
    path: Path, num_columns: int | None = None, *, delimiter: str | None = "\t", first_line: int = 1
) -> list[list[str]]:
    r"""Read a delimited file into rows of strings; row i stands on line first_line + i.

    Args:
        path: the file.
        num_columns: the number of columns that each row must have; None asks only that all rows are alike.
        delimiter: the column separator; None splits at any white space.
        first_line: the line at which the rows begin; those before it are left out.
    """
    # Not str.splitlines: labels may hold the exotic line separators that it also splits at.
    lines = read_text(path).replace("\r\n", "\n").split("\n")
    while lines and not lines[-1]:
        lines.pop()
    rows = [line.split(delimiter) for line in lines[first_line - 1 :]]
    if rows and num_columns is None:
        num_columns = len(rows[0])
    for line_num, row in enumerate(rows, start=first_line):
        if len(row) != num_columns:
            separator = "white space" if delimiter is None else repr(delimiter)
            raise DataError(
                f"{path}:{line_num}: {len(row)} columns where {num_columns} are expected "
                f"(separated by {separator}); mend or remove the line"
            )
    return rows


def read_table(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, list[str]]:
    """Read a tsv file with a header into columns by name; an absent optional column is all empty strings."""
    rows = read_rows(path)
    if not rows:
        raise DataError(f"{path}: empty file; its first line must be the header {', '.join([*required, *optional])}")
    header = rows[0]
    for name in required:
        if name not in header:
            raise DataError(f"{path}:1: no column {name!r} in the header ({', '.join(header)}); add it")
    columns = {name: [row[index] for row in rows[1:]] for index, name in enumerate(header)}
    return {name: columns.get(name, [""] * (len(rows) - 1)) for name in [*required, *optional]}


def write_rows(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Write rows as tsv; a tab or line break inside a value becomes a space."""
    clean = str.maketrans("\t\r\n", "   ")
    text = "".join("\t".join(value.translate(clean) for value in row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        value = parse_json(read_text(path))
    except json.JSONDecodeError as err:
        raise DataError(f"{path}:{err.lineno}: not valid JSON ({err.msg}); mend the line") from err
    except ValueError as err:
        raise DataError(f"{path}: not valid JSON ({err}); mend it") from err
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a JSON {type(value).__name__} where an object is expected")
    return value


def map_safetensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Memory-map the tensors of a safetensors file, read-only: all processes of a node share one copy.

    The library's own numpy reader copies each tensor into memory, therefore the header is read here.
    """
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            (header_bytes,) = struct.unpack("<Q", prefix)
            file_bytes = path.stat().st_size
            if header_bytes > file_bytes:
                raise ValueError("header longer than the file")
            header = parse_json(file.read(header_bytes))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        tensors: dict[str, npt.NDArray[Any]] = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype, shape = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]]), tuple(entry["shape"])
            if not all(type(size) is int and 0 <= size <= file_bytes for size in (begin, end, *shape)):
                raise ValueError(f"tensor {name!r} has sizes or offsets that are not sizes")
            offset = 8 + header_bytes + begin
            if math.prod(shape) * dtype.itemsize != end - begin or 8 + header_bytes + end > file_bytes:
                raise ValueError(f"tensor {name!r} does not fit into the file")
            empty = np.empty(shape, dtype)
            tensors[name] = np.memmap(path, dtype, "r", offset, shape) if end > begin else empty
    except FileNotFoundError as err:
        raise DataError(f"{path}: file not found") from err
    except (OSError, ValueError, KeyError, TypeError, struct.error) as err:
        raise DataError(f"{path}: not a whole safetensors file ({err}); write or fetch it again") from err
    return tensors


def is_id(text: str) -> bool:
    """Tell whether a text is a whole number from 0 that fits into 64 bits."""
    return text.isascii() and text.isdecimal() and len(text) <= MAX_ID_DIGITS


def check_unpacked(path: Path, members: Iterable[str] | None = None) -> None:
    """Refuse a zip file that unpacks to far more than it is, before anything is unpacked.

    Args:
        path: the zip file.
        members: that will be unpacked; None for all.

    Raises:
        ValueError: saying how much it would be.
    """
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist() if members is None else [archive.getinfo(member) for member in members]
    unpacked_bytes = sum(info.file_size for info in infos)
    if unpacked_bytes > max(MIN_UNPACKED_BYTES, MAX_UNPACKED_RATIO * path.stat().st_size):
        raise ValueError(f"it would unpack to {unpacked_bytes:,} bytes, more than {MAX_UNPACKED_RATIO} times its size")


def sha256_file(path: Path) -> str:
    """Hash a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` when the block ends well and vanishes when it does not."""
    if path.exists():
        raise DataError(f"{path}: already exists; choose another output folder or remove this one")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as err:
        raise DataError(f"{path}: cannot be created ({err.strerror}); choose another output folder") from err
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.rename(path)
    except OSError as err:
        raise DataError(f"{path}: cannot be written ({err.strerror or err}); nothing was kept") from err
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
