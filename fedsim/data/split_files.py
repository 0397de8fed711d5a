"""Reads split files and holds their rows to the graph; `splits` makes a federated split of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fedsim.data import storage
from fedsim.data.dataset import SPLIT_NAMES, KnowledgeGraph
from fedsim.errors import DataError
from fedsim.parsing import parse_json

Rows: TypeAlias = npt.NDArray[np.int64]  # [num_triples, 4] columns client, head, relation, tail


@dataclass(frozen=True)
class SplitRows:
    """Rows as they stand in a file."""

    parts: dict[str, Rows]  # train, valid, test
    lines: dict[str, npt.NDArray[np.int64]] | None = None  # line numbers of the rows, where the file is text

    def place(self, name: str, row: int) -> str:
        """Name a row so that it can be found in the file."""
        return f"{name} row {row}" if self.lines is None else f"line {int(self.lines[name][row])}"


def read_split_rows(path: Path) -> tuple[SplitRows, int]:
    """Read a split file; the number is how many triples had been moved to train when it was saved."""
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz, ".tsv": _read_tsv}
    if path.suffix not in readers:
        raise DataError(f"{path}: unknown kind of split file; give {', '.join(readers)}")
    return readers[path.suffix](path)


def check_split_rows(given: SplitRows, graph: KnowledgeGraph, source: str) -> None:
    """Hold the rows to the graph: ids in range, its triples all there, each once and at one client."""
    rows = given.parts
    _check_ids(given, graph, source)
    name_of = np.repeat(np.arange(len(rows)), [len(part) for part in rows.values()])
    row_of = np.concatenate([np.arange(len(part)) for part in rows.values()])
    client = np.concatenate([part[:, 0] for part in rows.values()])
    packed = np.concatenate([graph.pack(part[:, 1:]) for part in rows.values()])
    known = np.unique(np.concatenate([graph.pack(triples) for triples in graph.triples.values()]))

    def refuse(index: int, text: str) -> DataError:
        name = list(rows)[name_of[index]]
        return DataError(f"{source}: {given.place(name, int(row_of[index]))}: {text}")

    stray = ~np.isin(packed, known)
    if stray.any():
        raise refuse(int(np.argmax(stray)), f"this triple is not in {graph.name}; is it a split of another data set?")
    order = np.argsort(packed, kind="stable")
    same = packed[order][1:] == packed[order][:-1]
    torn = np.flatnonzero(same & (client[order][1:] != client[order][:-1]))
    if len(torn):
        first, second = int(order[torn[0]]), int(order[torn[0] + 1])
        raise refuse(second, f"client {client[second]} holds a triple that client {client[first]} holds too; keep one")
    twice = np.flatnonzero(same & (name_of[order][1:] == name_of[order][:-1]))
    if len(twice):
        raise refuse(int(order[twice[0] + 1]), "the same triple stands in an earlier row; remove one")
    absent = np.setdiff1d(known, packed)
    if len(absent):
        relation, tail = divmod(int(absent[0]) % (graph.num_relations * graph.num_entities), graph.num_entities)
        head = int(absent[0]) // (graph.num_relations * graph.num_entities)
        raise DataError(
            f"{source}: {len(absent)} triples of {graph.name} belong to no client, the first is "
            f"({head}, {relation}, {tail}); add them to the split"
        )


def _check_ids(given: SplitRows, graph: KnowledgeGraph, source: str) -> None:
    limits = np.array([np.iinfo(np.int64).max, graph.num_entities, graph.num_relations, graph.num_entities])
    for name, part in given.parts.items():
        if not len(part):
            raise DataError(f"{source}: {name} is empty; each of train, valid and test needs at least one triple")
        bad = np.argwhere((part < 0) | (part >= limits))
        if len(bad):
            row, column = bad[0].tolist()
            what = ("client", "head", "relation", "tail")[column]
            raise DataError(
                f"{source}: {given.place(name, row)}: {what} {part[row, column]} is out of range; "
                f"is this a split of {graph.name} ({graph.num_entities} entities, {graph.num_relations} relations)?"
            )


def _as_rows(parts: dict[str, npt.NDArray[np.generic]], path: Path) -> dict[str, Rows]:
    for name in SPLIT_NAMES:
        if name not in parts:
            raise DataError(f"{path}: no array {name!r}; a split holds train, valid and test")
        part = parts[name]
        if part.ndim != 2 or part.shape[1] != 4 or not np.issubdtype(part.dtype, np.integer):
            raise DataError(
                f"{path}: {name} is {part.dtype} {list(part.shape)}, need whole numbers [n, 4] with the columns "
                f"client, head, relation, tail"
            )
    return {name: parts[name].astype(np.int64) for name in SPLIT_NAMES}


def _read_safetensors(path: Path) -> tuple[SplitRows, int]:
    rows = _as_rows(storage.map_safetensors(path), path)
    with path.open("rb") as file:
        header = parse_json(file.read(int.from_bytes(file.read(8), "little")))
    found = header.get("__metadata__", {})
    num_moved = found.get("num_moved", "0") if isinstance(found, dict) else None
    if not (isinstance(num_moved, str) and storage.is_id(num_moved)):
        raise DataError(
            f"{path}: num_moved is {num_moved!r} in the metadata, need a whole number; save the split again"
        )
    return SplitRows(rows), int(num_moved)


def _read_npz(path: Path) -> tuple[SplitRows, int]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds a single array")
            storage.check_unpacked(path)
            parts = {name: np.asarray(archive[name]) for name in archive.files if name in SPLIT_NAMES}
    except Exception as err:  # a damaged file can raise anything
        raise DataError(f"{path}: not a readable npz file without pickle ({err})") from err
    return SplitRows(_as_rows(parts, path)), 0


def _read_tsv(path: Path) -> tuple[SplitRows, int]:
    columns = storage.read_table(path, ["split", "client", "head", "relation", "tail"])
    splits = np.array(columns["split"])
    strange = np.flatnonzero(~np.isin(splits, SPLIT_NAMES))
    if len(strange):
        found = columns["split"][strange[0]]
        raise DataError(f"{path}:{strange[0] + 2}: split is {found!r}, need {', '.join(SPLIT_NAMES)}")
    numbers = []
    for name in ("client", "head", "relation", "tail"):
        bad = [line for line, value in enumerate(columns[name], start=2) if not storage.is_id(value)]
        if bad:
            value = columns[name][bad[0] - 2]
            raise DataError(f"{path}:{bad[0]}: {name} is {value!r}, need an id (a whole number from 0)")
        numbers.append(np.array(columns[name], dtype=np.int64))
    table = np.column_stack(numbers)
    lines = {name: np.flatnonzero(splits == name) + 2 for name in SPLIT_NAMES}
    return SplitRows({name: table[lines[name] - 2] for name in SPLIT_NAMES}, lines), 0
