"""Small graphs and data set folders for tests."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.data.dataset import Features, KnowledgeGraph, save_dataset

IMAGE_SHARE = 0.5  # of the entities have each modality but text, as in real data


def tiny_graph(
    num_entities: int = 40,
    num_relations: int = 6,
    num_triples: int = 200,
    seed: int = 0,
    modalities: Mapping[str, int] | None = None,
) -> KnowledgeGraph:
    """Make a random graph without duplicates whose entities and relations all occur in train.

    Args:
        num_entities: number of entities.
        num_relations: number of relations.
        num_triples: number of triples in total; about a tenth each becomes valid and test.
        seed: of the draws.
        modalities: dim per modality, by default text 12 and image 8; all entities have a text, half of them the rest.
    """
    generator = np.random.default_rng(seed)
    modalities = {"text": 12, "image": 8} if modalities is None else modalities
    # A ring through all entities, relations in turn, is the core of train that makes everything seen.
    num_core = max(num_entities, num_relations)
    ring = np.arange(num_core)
    core = np.column_stack([ring % num_entities, ring % num_relations, (ring + 1) % num_entities])
    pool = np.arange(num_entities * num_relations * num_entities)
    packed = (core[:, 0] * num_relations + core[:, 1]) * num_entities + core[:, 2]
    rest = generator.choice(np.setdiff1d(pool, packed), size=num_triples - num_core, replace=False)
    others = np.column_stack(
        [rest // (num_relations * num_entities), rest // num_entities % num_relations, rest % num_entities]
    )
    num_held = max(1, num_triples // 10)
    valid, test, train = np.split(others, [num_held, 2 * num_held])
    features = {}
    for modality, dim in modalities.items():
        share = 1.0 if modality == "text" else IMAGE_SHARE
        entity = np.sort(generator.choice(num_entities, size=round(share * num_entities), replace=False))
        values = generator.standard_normal((len(entity), dim)).astype(np.float32)
        features[modality] = Features(values=values, entity=entity)
    return KnowledgeGraph(
        name="tiny",
        entity_keys=[f"e{i}" for i in range(num_entities)],
        entity_labels=[f"entity {i}" for i in range(num_entities)],
        entity_descriptions=[f"the entity number {i}" for i in range(num_entities)],
        entity_pictures=[""] * num_entities,
        relation_keys=[f"r{i}" for i in range(num_relations)],
        relation_labels=[f"relation {i}" for i in range(num_relations)],
        train=np.concatenate([core, train]),
        valid=valid,
        test=test,
        features=features,
        path=None,
        meta={"licence": "CC0-1.0"},
    )


def write_tiny_dataset(
    path: Path,
    num_entities: int = 40,
    num_relations: int = 6,
    num_triples: int = 200,
    seed: int = 0,
    modalities: Mapping[str, int] | None = None,
) -> Path:
    """Save a `tiny_graph` as a data set folder and return the folder."""
    save_dataset(tiny_graph(num_entities, num_relations, num_triples, seed, modalities), path)
    return path


def write_lines(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write rows as tsv, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))


def write_ids(graph: KnowledgeGraph, folder: Path) -> None:
    """Write a graph as people have it: tables with ids and triples of ids; features are left out."""
    columns = zip(graph.entity_keys, graph.entity_labels, graph.entity_descriptions, strict=True)
    rows = [(i, *row) for i, row in enumerate(columns)]
    write_lines(folder / "entities.tsv", [("id", "key", "label", "description"), *rows])
    write_lines(folder / "relations.tsv", [("id", "key"), *enumerate(graph.relation_keys)])
    for name, triples in graph.triples.items():
        write_lines(folder / f"{name}.tsv", triples.tolist())
