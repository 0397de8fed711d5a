"""A multimodal knowledge graph and its folder on disk.

A data set is a folder: `meta.json`, `entities.tsv` and `relations.tsv` (row order is the id), `triples/*.tsv` (or
`.parquet`) with keys, `features/<modality>.safetensors`, and optionally `splits/` and `pictures/`. Loading checks
all of it, so that nothing behind this module meets a broken file.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from fedsim.data import storage
from fedsim.errors import DataError

FORMAT_VERSION = 1
SPLIT_NAMES = ("train", "valid", "test")
DATA_VARIABLE = "FEDSIM_DATA"

Triples: TypeAlias = npt.NDArray[np.int64]  # [num_triples, 3] columns head, relation, tail

_BUNDLED = Path(__file__).parent.parent / "datasets"
_CHECK_ROWS = 8192  # rows of features looked at together, so that checking a large file needs little memory


@dataclass(frozen=True)
class Features:
    """The frozen feature vectors of one modality, for the entities that have it."""

    values: npt.NDArray[np.floating[Any]]  # [num_available, dim], float16 or float32
    entity: npt.NDArray[np.int64]  # [num_available], increasing entity ids

    @property
    def dim(self) -> int:
        """Return the width of a feature vector."""
        return int(self.values.shape[1])

    def available(self, num_entities: int) -> npt.NDArray[np.bool_]:
        """Mark the entities that have this modality, [num_entities]."""
        mask = np.zeros(num_entities, dtype=bool)
        mask[self.entity] = True
        return mask


@dataclass(frozen=True)
class KnowledgeGraph:
    """A knowledge graph with texts, picture names and features; ids are the positions in the lists."""

    name: str
    entity_keys: list[str]
    entity_labels: list[str]
    entity_descriptions: list[str]
    entity_pictures: list[str]  # file names under pictures/, "" where there is none
    relation_keys: list[str]
    relation_labels: list[str]
    train: Triples
    valid: Triples
    test: Triples
    features: dict[str, Features]
    path: Path | None
    meta: dict[str, Any]

    @property
    def num_entities(self) -> int:
        """Count the entities."""
        return len(self.entity_keys)

    @property
    def num_relations(self) -> int:
        """Count the relations."""
        return len(self.relation_keys)

    @property
    def triples(self) -> dict[str, Triples]:
        """Return the triples by split name."""
        return {"train": self.train, "valid": self.valid, "test": self.test}

    def pack(self, triples: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Turn triples [num_triples, 3] into one integer each, [num_triples], for set operations."""
        head, relation, tail = triples[:, 0].astype(np.int64), triples[:, 1], triples[:, 2]
        packed: npt.NDArray[np.int64] = (head * self.num_relations + relation) * self.num_entities + tail
        return packed


def resolve_dataset(name_or_path: str) -> Path:
    """Find a data set by the name of a bundled one, by its folder, or by its name under $FEDSIM_DATA."""
    candidates = [Path(name_or_path).expanduser()]
    if Path(name_or_path).name == name_or_path:
        candidates.insert(0, _BUNDLED / name_or_path)
    root = os.environ.get(DATA_VARIABLE)
    if root:
        candidates.append(Path(root).expanduser() / name_or_path)
    for candidate in candidates:
        if (candidate / "meta.json").is_file():
            return candidate
    for candidate in candidates:
        if candidate.is_dir():
            raise DataError(f"{candidate}: no meta.json, not a fedsim data set; make one with `fedsim data import`")
    bundled = sorted(folder.name for folder in _BUNDLED.iterdir() if folder.is_dir()) if _BUNDLED.is_dir() else []
    raise DataError(
        f"data set {name_or_path!r} not found; give a folder, one of the bundled names ({', '.join(bundled)}), "
        f"or set ${DATA_VARIABLE} to the folder that holds it"
    )


def load_dataset(path: Path) -> KnowledgeGraph:
    """Load a data set folder and check all of it; features are memory-mapped."""
    path = Path(path)
    meta = storage.read_json(path / "meta.json")
    if meta.get("format_version") != FORMAT_VERSION:
        found = meta.get("format_version")
        raise DataError(f"{path / 'meta.json'}: format_version is {found!r}, this fedsim reads {FORMAT_VERSION}")
    entities = storage.read_table(path / "entities.tsv", ["key"], ["label", "description", "picture"])
    relations = storage.read_table(path / "relations.tsv", ["key"], ["label"])
    entity_ids = index_keys(entities["key"], path / "entities.tsv")
    relation_ids = index_keys(relations["key"], path / "relations.tsv")
    triples = {name: _load_triples(path, name, entity_ids, relation_ids) for name in SPLIT_NAMES}
    features = {
        file.stem: load_features(file, len(entity_ids)) for file in sorted((path / "features").glob("*.safetensors"))
    }
    _check_meta(path, meta, features)
    return KnowledgeGraph(
        name=str(meta.get("name", path.name)),
        entity_keys=entities["key"],
        entity_labels=[label or key for label, key in zip(entities["label"], entities["key"], strict=True)],
        entity_descriptions=entities["description"],
        entity_pictures=entities["picture"],
        relation_keys=relations["key"],
        relation_labels=[label or key for label, key in zip(relations["label"], relations["key"], strict=True)],
        train=triples["train"],
        valid=triples["valid"],
        test=triples["test"],
        features=features,
        path=path,
        meta=meta,
    )


def save_dataset(graph: KnowledgeGraph, path: Path, pictures_dir: Path | None = None) -> None:
    """Write a data set to a new folder, all or nothing.

    Args:
        graph: what to write.
        path: the folder, which must not exist.
        pictures_dir: the folder that holds the files of `entity_pictures`; they are copied.
    """
    with storage.new_folder(Path(path)) as folder:
        write_dataset(graph, folder, pictures_dir)


def write_dataset(graph: KnowledgeGraph, folder: Path, pictures_dir: Path | None = None) -> None:
    """Write the files of a data set into an existing folder; `save_dataset` makes that safe."""
    texts = [graph.entity_keys, graph.entity_labels, graph.entity_descriptions, graph.entity_pictures]
    storage.write_rows(folder / "entities.tsv", [("key", "label", "description", "picture"), *zip(*texts, strict=True)])
    relation_rows = zip(graph.relation_keys, graph.relation_labels, strict=True)
    storage.write_rows(folder / "relations.tsv", [("key", "label"), *relation_rows])
    files = ["entities.tsv", "relations.tsv"]
    for name, triples in graph.triples.items():
        rows = [
            (graph.entity_keys[head], graph.relation_keys[relation], graph.entity_keys[tail])
            for head, relation, tail in triples.tolist()
        ]
        files.append(f"triples/{name}.tsv")
        storage.write_rows(folder / files[-1], rows)
    for modality, features in graph.features.items():
        files.append(f"features/{modality}.safetensors")
        (folder / files[-1]).parent.mkdir(exist_ok=True)
        tensors = {"values": np.ascontiguousarray(features.values), "entity": np.ascontiguousarray(features.entity)}
        save_file(tensors, str(folder / files[-1]))
    if pictures_dir is not None:
        _copy_pictures(graph.entity_pictures, pictures_dir, folder / "pictures")
    checksums = {file: storage.sha256_file(folder / file) for file in files}
    meta = json.dumps(_describe(graph, checksums), indent=2, ensure_ascii=False)
    (folder / "meta.json").write_text(meta + "\n", encoding="utf-8")


def index_keys(keys: Sequence[str], path: Path, *, first_line: int = 2) -> dict[str, int]:
    """Map keys to their positions; an empty or repeated key is an error that names its line."""
    ids: dict[str, int] = {}
    for position, key in enumerate(keys):
        if not key:
            raise DataError(f"{path}:{position + first_line}: empty key; give each row a key of its own")
        if ids.setdefault(key, position) != position:
            first = ids[key] + first_line
            raise DataError(f"{path}:{position + first_line}: key {key!r} already stands on line {first}; remove one")
    if not ids:
        raise DataError(f"{path}: no rows; a data set needs at least one")
    return ids


def map_triples(
    rows: Sequence[Sequence[str]],
    path: Path,
    entity_ids: dict[str, int],
    relation_ids: dict[str, int],
    *,
    first_line: int = 1,
) -> Triples:
    """Turn rows (head key, relation key, tail key) into ids [num_triples, 3]; rows begin at `first_line`."""
    if not rows:
        raise DataError(f"{path}: empty split; each of train, valid and test needs at least one triple")
    triples = np.array(
        [(entity_ids.get(head, -1), relation_ids.get(rel, -1), entity_ids.get(tail, -1)) for head, rel, tail in rows],
        dtype=np.int64,
    )
    bad = np.argwhere(triples < 0)
    if len(bad):
        row, column = bad[0].tolist()
        kind, table = ("relation", "relations.tsv") if column == 1 else ("entity", "entities.tsv")
        raise DataError(
            f"{path}:{row + first_line}: unknown {kind} {rows[row][column]!r}; add it to {table} or remove the line"
        )
    return triples


def load_features(path: Path, num_entities: int) -> Features:
    """Map and check one `features/<modality>.safetensors`."""
    tensors = storage.map_safetensors(path)
    for name in ("values", "entity"):
        if name not in tensors:
            raise DataError(f"{path}: no tensor {name!r}; a feature file holds 'values' and 'entity'")
    features = Features(values=tensors["values"], entity=tensors["entity"])
    check_features(features, num_entities, path)
    return features


def check_features(features: Features, num_entities: int, path: Path) -> None:
    """Refuse features of a wrong shape or dtype, with ids out of order or range, or with values that are not finite."""
    values, entity = features.values, features.entity
    if values.ndim != 2 or values.shape[1] == 0 or values.dtype not in (np.float16, np.float32):
        raise DataError(f"{path}: values are {values.dtype} {list(values.shape)}, need float16 or float32 [rows, dim]")
    if entity.dtype != np.int64 or entity.shape != (len(values),):
        raise DataError(
            f"{path}: {len(values)} feature rows but entity ids {entity.dtype} {list(entity.shape)}; "
            f"need one int64 entity id per row"
        )
    if len(entity) and (entity[0] < 0 or entity[-1] >= num_entities or (np.diff(entity) <= 0).any()):
        raise DataError(
            f"{path}: entity ids must increase from row to row and lie in 0..{num_entities - 1}; "
            f"check that the features belong to this data set"
        )
    for start in range(0, len(values), _CHECK_ROWS):
        finite = np.isfinite(values[start : start + _CHECK_ROWS]).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise DataError(
                f"{path}: row {row} (entity {int(entity[row])}) holds NaN or infinity; encode that entity again "
                f"or leave its row out"
            )


def _load_triples(path: Path, name: str, entity_ids: dict[str, int], relation_ids: dict[str, int]) -> Triples:
    parquet = path / "triples" / f"{name}.parquet"
    if not parquet.is_file():
        tsv = path / "triples" / f"{name}.tsv"
        return map_triples(storage.read_rows(tsv, 3), tsv, entity_ids, relation_ids)
    from pyarrow.parquet import read_table  # here: only data sets that come as parquet need it

    try:
        table = read_table(parquet, columns=["head", "relation", "tail"])
        columns = [table.column(column).to_pylist() for column in ("head", "relation", "tail")]
    except Exception as err:  # a damaged file can raise anything
        raise DataError(f"{parquet}: not a parquet file with columns head, relation, tail ({err})") from err
    rows = list(zip(*columns, strict=True))
    for number, row in enumerate(rows):
        if not all(isinstance(key, str) for key in row):
            raise DataError(f"{parquet}: row {number} is {row}; head, relation and tail must be keys, as text")
    return map_triples(rows, parquet, entity_ids, relation_ids)


def _check_meta(path: Path, meta: dict[str, Any], features: dict[str, Features]) -> None:
    """Hold the loaded files to what meta.json says of them."""
    for section in ("features", "checksums"):
        if not isinstance(meta.get(section, {}), dict):
            raise DataError(f"{path / 'meta.json'}: {section} is {meta[section]!r}, need an object by name; mend it")
    for modality, expected in meta.get("features", {}).items():
        file = path / "features" / f"{modality}.safetensors"
        if not isinstance(expected, dict):
            raise DataError(f"{path / 'meta.json'}: features.{modality} is {expected!r}, need an object; mend it")
        if modality not in features:
            raise DataError(f"{file}: file not found though meta.json lists the modality; write or fetch it again")
        for field, found in (("dim", features[modality].dim), ("num_rows", len(features[modality].entity))):
            if field in expected and expected[field] != found:
                raise DataError(f"{file}: {field} is {found} but meta.json says {expected[field]}; mend one of them")
    for file_name, checksum in meta.get("checksums", {}).items():
        file = path / file_name
        if not file.is_file():
            raise DataError(f"{file}: file not found though meta.json lists it; write or fetch it again")
        if storage.sha256_file(file) != checksum:
            raise DataError(
                f"{file}: altered since it was written (checksum differs from meta.json); restore it, or remove its "
                f"line under checksums in {path / 'meta.json'} if the change is meant"
            )


def _describe(graph: KnowledgeGraph, checksums: dict[str, str]) -> dict[str, Any]:
    """Build meta.json: what the graph brought, with counts, features and checksums as they are now."""
    counts = {"entities": graph.num_entities, "relations": graph.num_relations}
    known = graph.meta.get("features", {})
    features = {
        modality: {"encoder": "", **known.get(modality, {}), "dim": item.dim, "num_rows": len(item.entity)}
        for modality, item in graph.features.items()
    }
    return {
        "description": "",
        "licence": "",
        "source": [],
        **graph.meta,
        "format_version": FORMAT_VERSION,
        "name": graph.name,
        "counts": counts | {name: len(triples) for name, triples in graph.triples.items()},
        "features": features,
        "checksums": checksums,
    }


def _copy_pictures(names: Sequence[str], source: Path, target: Path) -> None:
    target.mkdir()
    for name in sorted({name for name in names if name}):
        if Path(name).name != name or not (source / name).is_file():
            raise DataError(f"{source / name}: picture not found; add the file or empty the picture column")
        shutil.copyfile(source / name, target / name)
