"""Reads the pickles in which FedE publishes its federated splits, without executing what a pickle may ask for.

Such a file is a list of dicts, one per client; each has train, valid and test with `edge_index_ori` [2, n] (head,
tail) and `edge_type_ori` [n] in global ids, beside client-local ids that are not needed here.
"""

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.data.dataset import SPLIT_NAMES
from fedsim.data.split_files import Rows, SplitRows
from fedsim.errors import DataError

# A table of entities is made as long as the largest id: one wrong id must not fill the memory.
SPARE_IDS, MAX_GAP = 100_000, 100

NUMBERS = ("?", "b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8")


class _Type:
    """Stands for numpy.dtype."""

    name, order = "", "="

    def __init__(self, name: Any = "", *_: Any) -> None:
        if name not in NUMBERS:
            raise pickle.UnpicklingError(f"it holds an array of {name!r}, only numbers are accepted")
        self.name = name

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("the type of an array is damaged")
        self.order = state[1]

    def read(self, content: Any, shape: Any, by_columns: Any) -> npt.NDArray[Any]:
        """Make the array whose memory the pickle holds."""
        if isinstance(content, str):  # as Python 2 wrote bytes
            content = content.encode("latin1")
        kind = np.dtype(self.order + self.name)
        sizes = shape if isinstance(shape, tuple) else (shape,)
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise pickle.UnpicklingError("the shape of an array is damaged")
        if not isinstance(content, bytes | bytearray) or len(content) != math.prod(sizes) * kind.itemsize:
            raise pickle.UnpicklingError("an array is not as long as its shape says")
        return np.frombuffer(content, kind).reshape(sizes, order="F" if by_columns else "C")


class _Array:
    """Stands for numpy.ndarray."""

    values: npt.NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _Type):
            raise pickle.UnpicklingError("an array is damaged")
        _, shape, kind, by_columns, content = state
        self.values = kind.read(content, shape, by_columns)


def _new_array(*_: Any) -> _Array:
    return _Array()


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any = "C", *_: Any) -> _Array:
    """Stand for what arrays are pickled as by protocol 5."""
    made = _Array()
    made.__setstate__((1, shape, kind, order == "F", content))
    return made


def _number(kind: Any, content: Any = b"", *_: Any) -> int | float:
    """Stand for a single number of numpy's."""
    if not isinstance(kind, _Type):
        raise pickle.UnpicklingError("a number is damaged")
    value: int | float = kind.read(content, (), False).item()
    return value


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Stand for what bytes are pickled as by protocol 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes are damaged")
    return text.encode("latin1")


# What a pickled numpy array refers to, by the names of numpy 1 and 2. Numpy's own functions are not called: what they
# do with a state that was made to harm is not known.
_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
}
for _core in ("numpy.core", "numpy._core"):
    _STAND_INS |= {
        (f"{_core}.multiarray", "_reconstruct"): _new_array,
        (f"{_core}.multiarray", "scalar"): _number,
        (f"{_core}.numeric", "_frombuffer"): _from_buffer,
    }


class _NumpyUnpickler(pickle.Unpickler):
    """Builds plain containers and arrays of numbers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, only numpy arrays are accepted")
        return _STAND_INS[module, name]


def read_fede(path: Path) -> SplitRows:
    """Read a FedE pickle as rows client, head, relation, tail."""
    try:
        with path.open("rb") as file:
            clients = _NumpyUnpickler(file).load()
    except FileNotFoundError as err:
        raise DataError(f"{path}: file not found") from err
    except Exception as err:  # a damaged pickle can raise anything
        raise DataError(f"{path}: refused, not a FedE pickle ({err})") from err
    if not isinstance(clients, list) or not clients:
        raise DataError(f"{path}: holds a {type(clients).__name__}, a FedE pickle is a list with a dict per client")
    parts = {
        name: np.concatenate([_client_rows(path, data, client, name) for client, data in enumerate(clients)])
        for name in SPLIT_NAMES
    }
    for name, part in parts.items():
        if not len(part):
            raise DataError(f"{path}: {name} is empty at all clients; it needs at least one triple")
    return SplitRows(parts)


def _values(read: Any) -> npt.NDArray[Any]:
    """Take the array out of its stand-in, or make one of lists."""
    if isinstance(read, _Array) and read.values is None:
        raise ValueError("an array is empty")
    return np.asarray(read.values if isinstance(read, _Array) else read)


def _client_rows(path: Path, data: Any, client: int, name: str) -> Rows:
    """Return one client's rows of a split, [num_triples, 4]."""
    place = f"{path}: client {client}, {name}"
    try:
        edges, relation = _values(data[name]["edge_index_ori"]), _values(data[name]["edge_type_ori"])
    except (KeyError, TypeError, IndexError, ValueError) as err:
        raise DataError(f"{place}: no edge_index_ori and edge_type_ori ({err}); FedE pickles hold both") from err
    if edges.size == 0 and relation.size == 0:
        return np.empty((0, 4), dtype=np.int64)
    if edges.ndim != 2 or len(edges) != 2 or relation.shape != edges.shape[1:]:
        raise DataError(
            f"{place}: edge_index_ori is {list(edges.shape)} and edge_type_ori {list(relation.shape)}, "
            f"need [2, n] and [n]"
        )
    if not (np.issubdtype(edges.dtype, np.integer) and np.issubdtype(relation.dtype, np.integer)):
        raise DataError(f"{place}: ids are {edges.dtype} and {relation.dtype}, need whole numbers")
    rows = np.column_stack([np.full(len(relation), client), edges[0], relation, edges[1]]).astype(np.int64)
    bad = (rows < 0) | (rows >= SPARE_IDS + MAX_GAP * len(rows))
    if bad.any():
        row = int(np.argmax(bad.any(axis=1)))
        raise DataError(
            f"{place}: triple {row} has the id {rows[row][bad[row]][0]}; ids count from 0, and a table is made of all "
            f"up to the largest"
        )
    return rows
