"""Questions to a client's trained model: which tails, or which heads, complete a triple?

Only the client that is asked is built; its state is that of the round with the best validation MRR.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fedsim.checkpoint import load_client, newest_checkpoint, read_manifest
from fedsim.config import Config
from fedsim.data.clients import ClientData, Ids, build_client, load_federated_split
from fedsim.data.dataset import KnowledgeGraph, load_dataset, resolve_dataset
from fedsim.data.splits import FederatedSplit
from fedsim.errors import DataError, RunError
from fedsim.federated.runtime import make_client, make_strategy
from fedsim.process import settle_process
from fedsim.run_folder import RunFolder

Direction = Literal["tail", "head"]
NUM_NEAREST = 5


@dataclass(frozen=True)
class Candidate:
    """One answer.

    Attributes:
        label: the entity's label.
        key: its key in the data set.
        score: of the completed triple; higher is more plausible.
        known: whether the completed triple is in the client's train, valid or test.
    """

    label: str
    key: str
    score: float
    known: bool


@dataclass(frozen=True)
class _Names:
    """Keys and labels of what one kind of id may stand for, and of those that a client holds."""

    kind: str
    keys: Sequence[str]
    labels: Sequence[str]


def predict(folder: Path, client: int, entity: str, relation: str, direction: Direction, top: int) -> list[Candidate]:
    """Ask one client of a run for the tails of (entity, relation, ?) or the heads of (?, relation, entity).

    Args:
        folder: of the run.
        client: who answers.
        entity: the known entity, by key or label.
        relation: by key or label.
        direction: what is asked for, "tail" or "head".
        top: number of candidates.

    Returns:
        The best candidates among the client's entities, best first.

    Raises:
        RunError: if the run has no such client or no models.
        DataError: if the client does not know the entity or the relation.
    """
    run, config = RunFolder.open(folder)
    models, round_num = best_models(run)
    graph = load_dataset(resolve_dataset(config.data.path))
    split = load_federated_split(graph, config)
    data = client_data(graph, split, config, client)
    entities = _Names("entity", graph.entity_keys, graph.entity_labels)
    relations = _Names("relation", graph.relation_keys, graph.relation_labels)
    asked_entity = _local_id(entity, entities, data.entity_ids, client)
    asked_relation = _local_id(relation, relations, data.relation_ids, client)

    settle_process(config.runtime.torch_threads)
    asked = make_client(data, config, torch.device("cpu"))
    asked.load_state(load_client(client, models))
    query = torch.tensor([asked_entity]), torch.tensor([asked_relation])
    scores = asked.scores(*query, direction == "head", round_num)[0].numpy()  # [num_entities]
    if not np.isfinite(scores).all():
        raise RunError(f"client {client} of {folder} gives scores that are not finite: its training diverged")
    known = _known_answers(data, asked_entity, asked_relation, direction)
    best = np.argsort(-scores, kind="stable")[:top]
    return [
        Candidate(graph.entity_labels[i], graph.entity_keys[i], float(scores[row]), bool(known[row]))
        for row, i in zip(best, data.entity_ids[best], strict=True)
    ]


def best_models(run: RunFolder) -> tuple[Path, int]:
    """Find the models of the best round: published ones, or those of an unfinished run's checkpoint."""
    if run.models.is_dir():
        return run.models, int(read_manifest(run.models)["round"])
    if not run.checkpoints.is_dir():
        raise RunError(f"{run.path} has no models yet; finish it with `fedsim resume {run.path}`")
    newest, manifest = newest_checkpoint(run.checkpoints)
    best_round = manifest["progress"]["best_round"]
    if best_round is None or best_round == manifest["round"]:
        return newest, int(manifest["round"])
    best = run.checkpoint(best_round)
    read_manifest(best)
    return best, int(best_round)


def client_data(graph: KnowledgeGraph, split: FederatedSplit, config: Config, client: int) -> ClientData:
    """Build the data of the client that is asked; with central training there is one, with all data."""
    together = make_strategy(config).together
    num_clients = 1 if together else split.num_clients
    if client >= num_clients:
        have = "one client, 0" if num_clients == 1 else f"clients 0 to {num_clients - 1}"
        raise RunError(f"the run has no client {client}; it has {have}; choose with --client")
    return build_client(graph, split, config, range(split.num_clients) if together else [client])


def _local_id(name: str, names: _Names, held: Ids, client: int) -> int:
    """Find the local id of what is called `name`; an exact key wins, then the label, whatever its case."""
    folded = name.casefold()
    found = [i for i in range(len(names.keys)) if folded in (names.keys[i].casefold(), names.labels[i].casefold())]
    mine = [i for i in found if held[np.searchsorted(held, i).clip(max=len(held) - 1)] == i]
    exact = [i for i in mine if names.keys[i] == name]
    if len(exact or mine) == 1:
        return int(np.searchsorted(held, (exact or mine)[0]))
    if mine:
        raise DataError(f"{names.kind} '{name}' can be {_listed(mine, names)} at client {client}; give one of the keys")
    if found:
        raise DataError(
            f"client {client} does not hold the {names.kind} '{name}' ({_listed(found, names)} in the data set); "
            f"ask another --client, or one of its own: {_nearest(folded, names, held)}"
        )
    raise DataError(f"unknown {names.kind} '{name}'; the nearest at client {client}: {_nearest(folded, names, held)}")


def _listed(ids: Sequence[int], names: _Names) -> str:
    return ", ".join(names.keys[i] for i in ids)


def _nearest(folded: str, names: _Names, held: Ids) -> str:
    """Name what the client holds that is spelled most like `folded`."""
    spelled = {names.labels[i].casefold(): names.labels[i] for i in held}
    near = difflib.get_close_matches(folded, spelled, n=NUM_NEAREST, cutoff=0.0)
    return ", ".join(spelled[name] for name in near)


def _known_answers(data: ClientData, entity: int, relation: int, direction: Direction) -> np.ndarray:
    """Mark the answers that the client's triples of any split hold, bool [num_entities]."""
    triples = np.concatenate([part for group in data.groups for part in group.triples.values()])
    given, answer = (0, 2) if direction == "tail" else (2, 0)
    known = np.zeros(len(data.entity_ids), dtype=np.bool_)
    known[triples[(triples[:, given] == entity) & (triples[:, 1] == relation), answer]] = True
    return known
