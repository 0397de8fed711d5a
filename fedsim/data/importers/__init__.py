"""Imports data in the formats that people have into a data set folder.

`import_dataset` is the whole of it: read, mend, check, write; nothing is left behind when a step fails.
"""

import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.data import storage
from fedsim.data.dataset import KnowledgeGraph, write_dataset
from fedsim.data.importers import repair
from fedsim.data.importers.features import modalities_in, read_arrays, read_features
from fedsim.data.importers.fede import read_fede
from fedsim.data.importers.tables import READERS, Source, detect_format, plain_table
from fedsim.data.split_files import SplitRows
from fedsim.data.splits import build_split, load_split, save_split
from fedsim.errors import ConfigError, DataError

FORMATS = ("auto", *READERS, "fede")


@dataclass(frozen=True)
class ImportReport:
    """What an import did."""

    path: Path
    triples_format: str
    num_entities: int
    num_relations: int
    num_triples: dict[str, int]  # by split name
    features: dict[str, int]  # number of rows by modality
    splits: dict[str, int]  # number of clients by name
    notes: list[str]  # what was mended, left out, or should be looked at


def import_dataset(
    source: Path,
    output: Path,
    *,
    name: str | None = None,
    triples_format: str = "auto",
    features: Mapping[str, Path] | None = None,
    pictures: Path | None = None,
    mend_valid: bool = False,
    seed: int = 0,
    description: str = "",
    licence: str = "",
) -> ImportReport:
    """Import a source into a new data set folder, all or nothing.

    Args:
        source: a folder with train, valid and test (and optionally tables of entities and relations, features.npz,
            federated splits under federated/ and pictures), or a FedE pickle.
        output: the data set folder, which must not exist.
        name: of the data set; by default the output folder's name.
        triples_format: `names`, `ids` (both head, relation, tail), `openke` (ids as head, tail, relation after a
            line with their number), `fede`, or `auto` to tell by the files.
        features: a feature file per modality, besides or instead of the source's features.npz.
        pictures: a folder or zip file with the files that the column `picture` of entities.tsv names; by default
            what the source holds.
        mend_valid: drop valid triples that train or test holds too; where that is most, carve a fresh validation
            set out of train.
        seed: of the carving.
        description: one line about the data.
        licence: of the data.
    """
    source, output = Path(source), Path(output)
    if triples_format not in FORMATS:
        raise ConfigError(f"format: {triples_format!r} is not known; choose one of {', '.join(FORMATS)}")
    with storage.new_folder(output) as folder:
        kind = detect_format(source) if triples_format == "auto" else triples_format
        fede = read_fede(source) if kind == "fede" else None
        read = _source_of_fede(fede) if fede is not None else READERS[kind](source)
        origin = [{"name": source.name, "version": "", "licence": licence, "notice": ""}]
        meta: dict[str, Any] = {"description": description, "licence": licence, "source": origin}
        graph, notes = _mend(_as_graph(read, name or output.name, meta), mend_valid=mend_valid, seed=seed)
        graph = replace(graph, features=_read_all_features(source, read, dict(features or {}), notes))
        graph, pictures_dir = _find_pictures(graph, source, pictures, folder / ".pictures")
        write_dataset(graph, folder, pictures_dir)
        shutil.rmtree(folder / ".pictures", ignore_errors=True)
        splits = _import_splits(source, fede, graph, folder / "splits", notes)
    return ImportReport(
        path=output,
        triples_format=kind,
        num_entities=graph.num_entities,
        num_relations=graph.num_relations,
        num_triples={split: len(triples) for split, triples in graph.triples.items()},
        features={modality: len(item.entity) for modality, item in graph.features.items()},
        splits=splits,
        notes=notes,
    )


def _source_of_fede(rows: SplitRows) -> Source:
    """Rebuild the graph that a FedE pickle divides; its ids are all that it says of entities and relations."""
    num_entities = 1 + max(int(part[:, [1, 3]].max()) for part in rows.parts.values())
    num_relations = 1 + max(int(part[:, 2].max()) for part in rows.parts.values())
    triples = {name: part[:, 1:] for name, part in rows.parts.items()}
    return Source(plain_table(num_entities), plain_table(num_relations), triples, has_entity_order=True)


def _as_graph(read: Source, name: str, meta: dict[str, Any]) -> KnowledgeGraph:
    return KnowledgeGraph(
        name=name,
        entity_keys=read.entities.keys,
        entity_labels=read.entities.labels,
        entity_descriptions=read.entities.descriptions,
        entity_pictures=read.entities.pictures,
        relation_keys=read.relations.keys,
        relation_labels=read.relations.labels,
        train=read.triples["train"],
        valid=read.triples["valid"],
        test=read.triples["test"],
        features={},
        path=None,
        meta=meta,
    )


def _mend(graph: KnowledgeGraph, *, mend_valid: bool, seed: int) -> tuple[KnowledgeGraph, list[str]]:
    """Leave out repeated triples and, where asked, repair the validation set; the notes say what was done."""
    notes = []
    distinct = {}
    for name, triples in graph.triples.items():
        distinct[name] = repair.drop_repeats(graph, triples)
        num_repeats = len(triples) - len(distinct[name])
        if num_repeats:
            notes.append(f"{name}: {num_repeats} repeated triples left out, {len(distinct[name])} kept")
    graph = replace(graph, train=distinct["train"], valid=distinct["valid"], test=distinct["test"])
    if mend_valid:
        train, valid, done = repair.repair_valid(graph, seed)
        graph = replace(graph, train=train, valid=valid)
        if done.num_dropped:
            notes.append(f"valid: {done.num_dropped} triples dropped that train or test holds too")
        if done.num_carved:
            notes.append(f"valid: {done.num_carved} triples carved out of train (seed {seed})")
        if not len(valid):
            raise DataError(f"{graph.name}: no valid triple is left after the repair; give a validation set of its own")
    for first, second in (("valid", "train"), ("valid", "test"), ("test", "train")):
        num_common = int(np.isin(graph.pack(graph.triples[first]), graph.pack(graph.triples[second])).sum())
        if num_common:
            mend = "; import with --mend-valid" if first == "valid" else ""
            notes.append(f"{first}: {num_common} triples are also in {second}, scores on them mean little{mend}")
    return graph, notes


def _read_all_features(source: Path, read: Source, files: dict[str, Path], notes: list[str]) -> dict[str, Any]:
    """Read the given feature files and the source's features.npz."""
    bundled = source / "features.npz"
    if source.is_dir() and bundled.is_file():
        files = dict.fromkeys(modalities_in(read_arrays(bundled)), bundled) | files
    if files and not read.has_entity_order:
        raise DataError(
            f"{source}: features need the order of the entities; add entities.tsv (columns key, label, description) "
            f"with a row per entity in the order of the feature rows"
        )
    features = {}
    for modality, file in files.items():
        features[modality], num_zero = read_features(Path(file), modality, len(read.entities.keys))
        if num_zero:
            notes.append(f"{modality}: {num_zero} rows are all zero and count as missing")
    return features


def _find_pictures(
    graph: KnowledgeGraph, source: Path, pictures: Path | None, unpacked: Path
) -> tuple[KnowledgeGraph, Path | None]:
    """Return a folder with the pictures that the entities name; names without pictures are emptied."""
    names = {name for name in graph.entity_pictures if name}
    if not names:
        return graph, None
    if pictures is None:
        zips = sorted(source.glob("*.zip")) if source.is_dir() else []
        pictures = source / "pictures" if (source / "pictures").is_dir() else next(iter(zips), None)
    if pictures is None:
        return replace(graph, entity_pictures=[""] * graph.num_entities), None
    if pictures.is_dir():
        return graph, pictures
    unpacked.mkdir()
    try:
        with zipfile.ZipFile(pictures) as archive:
            members = {Path(member).name: member for member in archive.namelist() if not member.endswith("/")}
            storage.check_unpacked(pictures, [members[name] for name in names if name in members])
            for name in sorted(names):
                if name not in members:
                    raise DataError(f"{pictures}: no picture {name!r}; add it or empty that picture column")
                (unpacked / name).write_bytes(archive.read(members[name]))
    except DataError:
        raise
    except Exception as err:  # a damaged archive can raise anything
        raise DataError(f"{pictures}: not a readable zip file ({err}); give a folder or a zip of pictures") from err
    return graph, unpacked


def _import_splits(
    source: Path, fede: SplitRows | None, graph: KnowledgeGraph, folder: Path, notes: list[str]
) -> dict[str, int]:
    """Save the federated splits that the source brings; returns their numbers of clients by name."""
    splits = {}
    if fede is not None:
        splits[source.stem] = build_split(fede, graph, str(source), move_unseen=True)
    federated = source / "federated"
    for path in sorted(federated.iterdir()) if federated.is_dir() else []:
        if path.suffix in (".npz", ".tsv", ".safetensors"):
            splits[path.stem] = load_split(path, graph, move_unseen=True)
    for name, split in splits.items():
        save_split(split, folder / f"{name}.safetensors")
        if split.num_moved:
            notes.append(f"split {name}: {split.num_moved} valid or test triples moved to the train of their client")
    return {name: split.num_clients for name, split in splits.items()}
