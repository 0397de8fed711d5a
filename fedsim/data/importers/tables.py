"""Reads triples and their entity and relation tables in the formats that people have."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedsim.data import storage
from fedsim.data.dataset import SPLIT_NAMES, Triples, index_keys, map_triples
from fedsim.errors import DataError

_FILE_NAMES = {
    "train": ("train.tsv", "train.txt"),
    "valid": ("valid.tsv", "valid.txt", "dev.tsv", "dev.txt", "val.tsv", "val.txt"),
    "test": ("test.tsv", "test.txt"),
}


@dataclass(frozen=True)
class Table:
    """Entities or relations in the order of their ids."""

    keys: list[str]
    labels: list[str]
    descriptions: list[str]
    pictures: list[str]


@dataclass(frozen=True)
class Source:
    """What was read from a source, before it is mended and written."""

    entities: Table
    relations: Table
    triples: dict[str, Triples]
    has_entity_order: bool  # False where ids were made up here, so that feature rows cannot refer to them


def detect_format(source: Path) -> str:
    """Guess the format of a source by its files."""
    if source.is_file() and source.suffix in (".pkl", ".pickle"):
        return "fede"
    if not source.is_dir():
        raise DataError(f"{source}: not found; give a folder with train, valid and test, or a FedE .pkl file")
    if (source / "train2id.txt").is_file():
        return "openke"
    train = _find(source, "train")
    rows = storage.read_rows(train, 3, delimiter=_delimiter(train))
    listed = _has_column(source / "entities.tsv", "id") or (source / "entity2id.txt").is_file()
    numbers = all(storage.is_id(value) for row in rows[:1000] for value in row)
    return "ids" if listed and numbers else "names"


def read_names(source: Path) -> Source:
    """Read tab- or space-separated `head relation tail` with keys; entities.tsv and relations.tsv are optional."""
    paths = {name: _find(source, name) for name in SPLIT_NAMES}
    rows = {name: storage.read_rows(path, 3, delimiter=_delimiter(path)) for name, path in paths.items()}
    listed = _listed(source, "entities", "entity2id.txt")
    # Ids in the order of first appearance, train first, where no table gives an order.
    entities = listed or _plain(
        dict.fromkeys(key for part in rows.values() for row in part for key in (row[0], row[2]))
    )
    relations = _listed(source, "relations", "relation2id.txt") or _plain(
        dict.fromkeys(row[1] for part in rows.values() for row in part)
    )
    entity_ids = {key: index for index, key in enumerate(entities.keys)}
    relation_ids = {key: index for index, key in enumerate(relations.keys)}
    triples = {name: map_triples(rows[name], paths[name], entity_ids, relation_ids) for name in SPLIT_NAMES}
    return Source(entities, relations, triples, has_entity_order=listed is not None)


def read_ids(source: Path) -> Source:
    """Read `head relation tail` as ids, with tables entities.tsv and relations.tsv or *2id.txt beside them."""
    entities, relations = _tables(source)
    triples = {}
    for name in SPLIT_NAMES:
        path = _find(source, name)
        rows = storage.read_rows(path, 3, delimiter=_delimiter(path))
        triples[name] = _id_triples(rows, path, entities, relations)
    return Source(entities, relations, triples, has_entity_order=True)


def read_openke(source: Path) -> Source:
    """Read OpenKE's id files: a first line with the number of lines, then `head tail relation`."""
    entities, relations = _tables(source)
    triples = {}
    for name in SPLIT_NAMES:
        path = source / f"{name}2id.txt"
        rows = storage.read_rows(path, 3, delimiter=None, first_line=2)
        _check_count(path, len(rows))
        triples[name] = _id_triples([(head, rel, tail) for head, tail, rel in rows], path, entities, relations, 2)
    return Source(entities, relations, triples, has_entity_order=True)


READERS: dict[str, Callable[[Path], Source]] = {"names": read_names, "ids": read_ids, "openke": read_openke}


def plain_table(num_rows: int) -> Table:
    """Make a table whose keys are the ids, for sources without names."""
    return _plain([str(index) for index in range(num_rows)])


def _plain(keys: Sequence[str] | dict[str, None]) -> Table:
    keys = list(keys)
    return Table(keys, keys, [""] * len(keys), [""] * len(keys))


def _find(source: Path, name: str) -> Path:
    for file_name in _FILE_NAMES[name]:
        if (source / file_name).is_file():
            return source / file_name
    raise DataError(f"{source}: no {name} triples; give one of {', '.join(_FILE_NAMES[name])}")


def _delimiter(path: Path) -> str | None:
    """Tell tab-separated files from space-separated ones by their first line."""
    with path.open("rb") as file:
        return "\t" if b"\t" in file.readline() else None


def _has_column(path: Path, name: str) -> bool:
    return path.is_file() and name in storage.read_text(path).split("\n", 1)[0].split("\t")


def _tables(source: Path) -> tuple[Table, Table]:
    tables = [_listed(source, "entities", "entity2id.txt"), _listed(source, "relations", "relation2id.txt")]
    for table, names in zip(tables, ("entities.tsv or entity2id.txt", "relations.tsv or relation2id.txt"), strict=True):
        if table is None:
            raise DataError(f"{source}: no {names}; ids need the table of their names")
    entities, relations = tables
    assert entities is not None
    assert relations is not None
    return entities, relations


def _listed(source: Path, kind: str, id_file: str) -> Table | None:
    """Read `<kind>.tsv` (with a header) or OpenKE's `<kind>2id.txt` (name, id), whichever is there."""
    if (source / f"{kind}.tsv").is_file():
        return _read_table(source / f"{kind}.tsv")
    if (source / id_file).is_file():
        return _read_id_file(source / id_file)
    return None


def _read_table(path: Path) -> Table:
    header = storage.read_text(path).split("\n", 1)[0].rstrip("\r").split("\t")
    key = next((name for name in ("key", "name", "label") if name in header), None)
    if key is None:
        raise DataError(f"{path}:1: no column key, name or label in the header ({', '.join(header)}); add one")
    label = next((name for name in ("label", "phrase") if name in header), key)
    columns = storage.read_table(path, [key], ["id", label, "description", "picture"])
    order = list(range(len(columns[key])))
    if "id" in header:
        order = _order_by_id(columns["id"], path, first_line=2)
    index_keys(columns[key], path)
    keys, labels = ([columns[name][row] for row in order] for name in (key, label))
    descriptions, pictures = ([columns[name][row] for row in order] for name in ("description", "picture"))
    return Table(keys, [text or fallback for text, fallback in zip(labels, keys, strict=True)], descriptions, pictures)


def _read_id_file(path: Path) -> Table:
    lines = storage.read_text(path).replace("\r\n", "\n").rstrip("\n").split("\n")
    first_line = 2 if lines[0].strip().isdecimal() else 1
    rows = [line.rsplit(None, 1) for line in lines[first_line - 1 :]]
    for line_num, row in enumerate(rows, start=first_line):
        if len(row) != 2:
            raise DataError(f"{path}:{line_num}: need a name and an id; mend or remove the line")
    if first_line == 2:
        _check_count(path, len(rows))
    keys = [name.strip() for name, _ in rows]
    index_keys(keys, path, first_line=first_line)
    order = _order_by_id([number for _, number in rows], path, first_line=first_line)
    return _plain([keys[row] for row in order])


def _order_by_id(ids: Sequence[str], path: Path, *, first_line: int) -> list[int]:
    """Return the row of each id; the ids must be 0..n-1 in some order."""
    row_of: dict[int, int] = {}
    for row, text in enumerate(ids):
        number = int(text) if storage.is_id(text) else -1
        if not 0 <= number < len(ids) or number in row_of:
            raise DataError(f"{path}:{row + first_line}: id {text!r}; ids must be 0..{len(ids) - 1}, each once")
        row_of[number] = row
    return [row_of[number] for number in range(len(ids))]


def _check_count(path: Path, num_rows: int) -> None:
    first = storage.read_text(path).split("\n", 1)[0].strip()
    if not storage.is_id(first) or int(first) != num_rows:
        raise DataError(
            f"{path}:1: the first line says {first!r} but {num_rows} lines follow; the file is cut short or the "
            f"number is wrong"
        )


def _id_triples(
    rows: Sequence[Sequence[str]], path: Path, entities: Table, relations: Table, first_line: int = 1
) -> Triples:
    """Turn rows of ids as text into triples [num_triples, 3]."""
    if not rows:
        raise DataError(f"{path}: empty split; each of train, valid and test needs at least one triple")
    for line_num, row in enumerate(rows, start=first_line):
        for value in row:
            if not storage.is_id(value):
                raise DataError(f"{path}:{line_num}: {value!r} is not an id; mend the line, or import as names")
    triples = np.array(rows, dtype=np.int64)
    bad = np.argwhere(triples >= np.array([len(entities.keys), len(relations.keys), len(entities.keys)]))
    if len(bad):
        row_num, column = bad[0].tolist()
        kind, table = ("relation", relations) if column == 1 else ("entity", entities)
        raise DataError(
            f"{path}:{row_num + first_line}: unknown {kind} id {triples[row_num, column]}; the table has "
            f"0..{len(table.keys) - 1}: add it there, or check the order of the columns"
        )
    return triples
