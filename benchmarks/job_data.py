"""Makes the data of the simulators' job: for fedsim a data set folder with a split, for its peers an array."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.data.dataset import KnowledgeGraph, save_dataset
from fedsim.data.splits import FederatedSplit, save_split

NUM_ENTITIES, NUM_RELATIONS = 2000, 10

Triples = npt.NDArray[np.int64]  # [num_clients, num_triples, 3] columns head, relation, tail

# The settings of `transe_job.py` in fedsim's words; nothing is evaluated or checkpointed before the last round.
SETTINGS: dict[str, Any] = {
    "data.split": "given",
    "model.scorer": "transe",
    "model.fusion": "none",
    "model.dropout": 0.0,
    "model.dim": 128,
    "training.loss": "self_adversarial",
    "training.num_negatives": 32,
    "training.margin": 10.0,
    "training.batch_size": 128,
    "training.local_epochs": 1,
    "training.learning_rate": 0.001,
    "training.reset_optimizer": "always",
    "training.reciprocal": False,
    "training.corruption": "tail",
    "federation.strategy": "fede",
    "evaluation.protocol": "fede",
    "evaluation.every": 100_000,
    "checkpoint.every": 100_000,
    "checkpoint.keep": 1,
    "runtime.kind": "ray",
    "runtime.placement": "pooled",
    "runtime.num_actors": 2,
    "runtime.torch_threads": 1,
}


@dataclass(frozen=True)
class JobData:
    """Where the same triples lie for fedsim and for its peers."""

    folder: Path
    split: Path
    array: Path
    num_clients: int
    num_triples: int

    def settings(self) -> Mapping[str, Any]:
        """Return fedsim's settings for this data."""
        return SETTINGS | {"data.path": str(self.folder), "data.split_file": str(self.split)}


def make_data(folder: Path, num_clients: int, num_triples: int) -> JobData:
    """Draw the clients' triples, each at one client alone, and write them.

    Args:
        folder: must not exist.
        num_clients: of the job.
        num_triples: training triples per client, drawn uniformly; with 1000 of them every client has all entities.
    """
    data = JobData(folder / "data", folder / "split.safetensors", folder / "triples.npy", num_clients, num_triples)
    triples = _cover(num_clients) if num_triples == NUM_ENTITIES // 2 else _draw(num_clients, num_triples)
    folder.mkdir(parents=True)
    np.save(data.array, triples)
    train = np.concatenate(list(triples))
    held_out = _unknown(triples)
    graph = KnowledgeGraph(
        name="job",
        entity_keys=[f"e{number}" for number in range(NUM_ENTITIES)],
        entity_labels=[""] * NUM_ENTITIES,
        entity_descriptions=[""] * NUM_ENTITIES,
        entity_pictures=[""] * NUM_ENTITIES,
        relation_keys=[f"r{number}" for number in range(NUM_RELATIONS)],
        relation_labels=[""] * NUM_RELATIONS,
        train=train,
        valid=held_out[:1],
        test=held_out[1:],
        features={},
        path=None,
        meta={},
    )
    save_dataset(graph, data.folder)
    clients = np.repeat(np.arange(num_clients), num_triples)
    first = np.zeros((1, 1), dtype=np.int64)
    split = FederatedSplit(
        num_clients,
        train=np.column_stack([clients, train]),
        valid=np.hstack([first, held_out[:1]]),
        test=np.hstack([first, held_out[1:]]),
        num_moved=0,
    )
    save_split(split, data.split)
    return data


def _draw(num_clients: int, num_triples: int) -> Triples:
    """Draw different triples uniformly."""
    size = NUM_ENTITIES * NUM_RELATIONS * NUM_ENTITIES
    packed = np.random.default_rng(0).choice(size, num_clients * num_triples, replace=False)
    head, rest = np.divmod(packed, NUM_RELATIONS * NUM_ENTITIES)
    relation, tail = np.divmod(rest, NUM_ENTITIES)
    return np.stack([head, relation, tail], -1).reshape(num_clients, num_triples, 3)


def _cover(num_clients: int) -> Triples:
    """Give every client half of the entities as heads and the other half as tails, no two clients the same triple."""
    half = NUM_ENTITIES // 2
    heads = np.arange(half)
    found = []
    for client in range(num_clients):
        shift, relation = client // NUM_RELATIONS, client % NUM_RELATIONS
        found.append(np.stack([heads, np.full(half, relation), half + (heads + shift) % half], -1))
    return np.stack(found)


def _unknown(triples: Triples) -> npt.NDArray[np.int64]:
    """Make two triples of the first client's heads, relations and tails that are nobody's, [2, 3]."""
    known = set(map(tuple, np.concatenate(list(triples)).tolist()))
    found: list[tuple[int, int, int]] = []
    for head, relation, _ in triples[0].tolist():
        for tail in triples[0][:, 2].tolist():
            if (head, relation, tail) not in known and len(found) < 2:
                found.append((head, relation, tail))
    return np.array(found)
