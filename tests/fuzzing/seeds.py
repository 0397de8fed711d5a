"""Valid inputs, as small as they can be: mutations then hit what matters."""

import io
import json
import pickle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
import yaml
from safetensors.numpy import save

from builders import tiny_graph
from fedsim.data.dataset import KnowledgeGraph, save_dataset
from fedsim.data.splits import make_split, save_split
from fuzzing.mutation import Input

NUM_ENTITIES, NUM_RELATIONS = 6, 2


def graph() -> KnowledgeGraph:
    """A graph of six entities."""
    return tiny_graph(NUM_ENTITIES, NUM_RELATIONS, 20, seed=1, modalities={"image": 3})


def folder_of(path: Path) -> Input:
    """Read a folder as an input."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def tsv(rows: Any) -> bytes:
    """Write rows as tab-separated lines."""
    return "".join("\t".join(map(str, row)) + "\n" for row in rows).encode()


def dataset_folder() -> Input:
    """A data set folder without checksums: with them, every change would end at the checksum."""
    with TemporaryDirectory() as place:
        save_dataset(graph(), Path(place) / "tiny")
        files = folder_of(Path(place) / "tiny")
    meta = json.loads(files["meta.json"])
    return files | {"meta.json": json.dumps(meta | {"checksums": {}}).encode()}


def parquet_folder() -> Input:
    """The same with triples as parquet."""
    files = dataset_folder()
    for name in ("train", "valid", "test"):
        rows = [line.split("\t") for line in files.pop(f"triples/{name}.tsv").decode().splitlines()]
        columns = dict(zip(("head", "relation", "tail"), map(list, zip(*rows, strict=True)), strict=True))
        files[f"triples/{name}.parquet"] = parquet(columns)
    return files


def parquet(columns: dict[str, Any]) -> bytes:
    """Write columns as a parquet file."""
    sink = io.BytesIO()
    pa.parquet.write_table(pa.table(columns), sink)
    return sink.getvalue()


def names_source(*, tables: bool) -> Input:
    """Triples with names, and tables and features or not."""
    found = graph()
    keys, relations = found.entity_keys, found.relation_keys
    files = {
        f"{name}.tsv": tsv((keys[head], relations[relation], keys[tail]) for head, relation, tail in triples.tolist())
        for name, triples in found.triples.items()
    }
    if tables:
        rows = zip(keys, found.entity_labels, found.entity_descriptions, strict=True)
        files["entities.tsv"] = tsv([("key", "label", "description"), *rows])
        files["relations.tsv"] = tsv([("key",), *((key,) for key in relations)])
        files["features.npz"] = npz(image=np.ones((NUM_ENTITIES, 2), np.float32))
        files["federated/two.tsv"] = split_tsv()
    return files


def ids_source() -> Input:
    """Triples of ids with tables."""
    found = graph()
    files = {f"{name}.tsv": tsv(triples.tolist()) for name, triples in found.triples.items()}
    files["entities.tsv"] = tsv([("id", "key"), *enumerate(found.entity_keys)])
    files["relation2id.txt"] = f"{NUM_RELATIONS}\n".encode() + tsv(
        (key, i) for i, key in enumerate(found.relation_keys)
    )
    return files


def openke_source() -> Input:
    """OpenKE's files."""
    found = graph()
    files = {
        f"{name}2id.txt": f"{len(triples)}\n".encode() + tsv(triples[:, [0, 2, 1]].tolist())
        for name, triples in found.triples.items()
    }
    tables = (("entity", found.entity_keys), ("relation", found.relation_keys))
    for kind, keys in tables:
        files[f"{kind}2id.txt"] = f"{len(keys)}\n".encode() + tsv((key, i) for i, key in enumerate(keys))
    return files


def fede_clients() -> list[dict[str, Any]]:
    """What FedE's pickles hold."""
    rows = make_split(graph(), "relation", 2, seed=0).rows
    clients: list[dict[str, Any]] = []
    for client in range(2):
        mine = {name: part[part[:, 0] == client] for name, part in rows.items()}
        clients.append(
            {
                name: {"edge_index_ori": part[:, [1, 3]].T.copy(), "edge_type_ori": part[:, 2].copy()}
                for name, part in mine.items()
            }
        )
    return clients


def fede_pickles() -> list[Input]:
    """Pickles of old and new protocols."""
    return [{"fede.pkl": pickle.dumps(fede_clients(), protocol)} for protocol in (0, 2, 4, 5)]


def npz(**arrays: Any) -> bytes:
    """Write arrays as npz."""
    sink = io.BytesIO()
    np.savez(sink, **arrays)
    return sink.getvalue()


def feature_files() -> dict[str, Input]:
    """Feature files by suffix."""
    values, entity = np.arange(12, dtype=np.float32).reshape(6, 2) + 1, np.arange(6)
    single, torch_file, compressed = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(single, values)
    np.savez_compressed(compressed, values=values, entity=entity)
    torch.save({"image": torch.from_numpy(values), "image_entity": torch.from_numpy(entity)}, torch_file)
    return {
        "npy": {"image.npy": single.getvalue()},
        "npz": {"image.npz": npz(image=values, image_entity=entity)},
        "compressed": {"image.npz": compressed.getvalue()},
        "safetensors": {"image.safetensors": save({"values": values, "entity": entity})},
        "pth": {"image.pth": torch_file.getvalue()},
    }


def split_tsv() -> bytes:
    """A split as a table."""
    rows = make_split(graph(), "relation", 2, seed=0).rows
    lines = [(name, *row) for name, part in rows.items() for row in part.tolist()]
    return tsv([("split", "client", "head", "relation", "tail"), *lines])


def split_files() -> list[Input]:
    """A split in each kind of file."""
    split = make_split(graph(), "relation", 2, seed=0)
    with TemporaryDirectory() as place:
        save_split(split, Path(place) / "split.safetensors")
        tensors = (Path(place) / "split.safetensors").read_bytes()
    return [{"split.safetensors": tensors}, {"split.tsv": split_tsv()}, {"split.npz": npz(**split.rows)}]


def as_yaml(tree: Any) -> bytes:
    """Write a tree as YAML."""
    return str(yaml.safe_dump(tree, sort_keys=False)).encode()


def jsonl(rows: list[Any]) -> bytes:
    """Write rows as lines of JSON."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
