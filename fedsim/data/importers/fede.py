"""Reads the pickles in which FedE publishes its federated splits, without executing what a pickle may ask for.

Such a file is a list of dicts, one per client; each has train, valid and test with `edge_index_ori` [2, n] (head,
tail) and `edge_type_ori` [n] in global ids, beside client-local ids that are not needed here.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.data.dataset import SPLIT_NAMES
from fedsim.data.split_files import Rows, SplitRows
from fedsim.errors import DataError

# What a pickled numpy array refers to, by the names of numpy 1 and 2.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


# A table of entities is made as long as the largest id: one wrong id must not fill the memory.
SPARE_IDS, MAX_GAP = 100_000, 100


class _NumpyUnpickler(pickle.Unpickler):
    """Builds plain containers and numpy arrays, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, only numpy arrays are accepted")
        if module.startswith("numpy.core") and int(np.__version__.split(".")[0]) >= 2:
            module = module.replace("numpy.core", "numpy._core")
        return super().find_class(module, name)


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


def _client_rows(path: Path, data: Any, client: int, name: str) -> Rows:
    """Return one client's rows of a split, [num_triples, 4]."""
    place = f"{path}: client {client}, {name}"
    try:
        edges, relation = np.asarray(data[name]["edge_index_ori"]), np.asarray(data[name]["edge_type_ori"])
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
