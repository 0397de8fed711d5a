"""What a report computes from a run's saved models: availability, imputation by sampling steps, a map of embeddings.

Nothing of this is sent by a client or actor: the run's clients are built again from the data set and the run folder, in
the process that writes the report. That is what somebody who simulates a federation may do, and no participant could.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from fedsim.checkpoint import load_client
from fedsim.config import Config
from fedsim.data.clients import ClientData, load_federated_split
from fedsim.data.dataset import KnowledgeGraph, load_dataset, resolve_dataset
from fedsim.data.splits import FederatedSplit
from fedsim.evaluation.consistency import TokenSample, semantic_consistency, shared_entities, sum_samples
from fedsim.evaluation.imputation import token_quality
from fedsim.federated.client import Client
from fedsim.federated.runtime import make_client, make_strategy
from fedsim.models.client_model import ClientModel
from fedsim.prediction import best_models, client_data
from fedsim.process import settle_process
from fedsim.run_folder import RunFolder

MAX_CLIENTS = 6  # whose models are looked at; of more clients, some at even distances
MAX_MAPPED = 24  # entities on the map: more would hide each other
SAMPLING_STEPS = (1, 2, 4, 8, 16)
MAX_IMPUTED = 8000  # entities whose tokens are imputed with each of these: it takes a few seconds

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SavedData:
    """The data of a run, divided among its clients as it was.

    Attributes:
        config: of the run.
        graph: the data set.
        split: who holds which triple.
        together: whether one client holds all data (central training).
    """

    config: Config
    graph: KnowledgeGraph
    split: FederatedSplit
    together: bool

    @classmethod
    def of(cls, config: Config) -> "SavedData":
        """Read the data set that a run's config names.

        Raises:
            FedSimError: if it is not there any more, or damaged.
        """
        settle_process(config.runtime.torch_threads)
        graph = load_dataset(resolve_dataset(config.data.path))
        return cls(config, graph, load_federated_split(graph, config), make_strategy(config).together)

    @property
    def clients(self) -> list[int]:
        """Return the ids of the clients that hold data."""
        return [0] if self.together else list(range(self.split.num_clients))

    def client(self, number: int) -> ClientData:
        """Build the data of one client."""
        return client_data(self.graph, self.split, self.config, number)


@dataclass(frozen=True)
class SavedModels:
    """The best models of a run so far: their folder, the round they are of, and the data they were trained on."""

    data: SavedData
    folder: Path
    round_num: int

    @classmethod
    def of(cls, data: SavedData, run: RunFolder) -> "SavedModels":
        """Find the models of a run; RunError if there are none yet, or they are damaged."""
        return cls(data, *best_models(run))

    def client(self, number: int) -> Client:
        """Build a client as the run left it."""
        client = make_client(self.data.client(number), self.data.config, torch.device("cpu"))
        client.load_state(load_client(number, self.folder))
        return client


@dataclass(frozen=True)
class SamplingQuality:
    """Imputation quality of the features kept aside, mean over clients; sampling steps -> modality -> value."""

    cosine: dict[int, dict[str, float]]
    hits_at_10: dict[int, dict[str, float]]
    clients: list[int]


@dataclass(frozen=True)
class MapPoint:
    """One entity at one client: where it is on the map, and the names of its tokens that are real."""

    entity: int
    client: int
    x: float
    y: float
    real: tuple[str, ...]


@dataclass(frozen=True)
class EmbeddingMap:
    """Shared entities at several clients, before imputation (missing tokens are zero) and after.

    Each stage has its own plane: the two directions in which its entities, as means over clients, differ most.

    Attributes:
        before: the entities shown.
        after: the same ones.
        consistency: mean cosine between clients of all shared entities, of ``before`` and ``after``.
        num_shared: entities that the cosine is of.
        view: of the models.
        clients: that are compared.
    """

    before: list[MapPoint]
    after: list[MapPoint]
    consistency: dict[str, float]
    num_shared: int
    view: str
    clients: list[int]


def evenly(items: Sequence[int], most: int) -> list[int]:
    """Take at most so many items, at even distances, the first among them."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


def availability(data: SavedData) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, float]]]:
    """Return the share of each client's entities that have a modality in the data, and that the client may see."""
    before, after = {}, {}
    for number in data.clients:
        client = data.client(number)
        size = len(client.entity_ids)
        before[number] = {name: len(item.rows) / size for name, item in client.features.items()}
        after[number] = {name: float(item.visible.sum()) / size for name, item in client.features.items()}
    return before, after


def sampling_quality(models: SavedModels) -> SamplingQuality | None:
    """Impute what was hidden with several numbers of sampling steps; None without diffusion or if nothing is hidden."""
    config = models.data.config
    if config.model.imputer != "diffusion":
        return None
    used, most = config.diffusion.sampling_steps, config.diffusion.steps
    tried = sorted({used, *(steps for steps in SAMPLING_STEPS if steps <= most)})
    found: dict[str, dict[int, dict[str, list[float]]]] = {"cosine": {}, "hits": {}}
    clients: list[int] = []
    num_entities = 0
    for number in evenly(models.data.clients, MAX_CLIENTS):
        client = models.client(number)
        num_entities += len(client.entity_ids)
        if not client.model.imputes:
            return None
        if clients and num_entities > MAX_IMPUTED:
            break
        clients.append(number)
        for steps in tried:
            changed = config.diffusion.model_copy(update={"sampling_steps": steps})
            client.model = ClientModel(config.model_copy(update={"diffusion": changed}), client.model.feature_dims)
            client.forget_imputations()
            for modality, (cosine, hits) in _hidden_quality(client, models.round_num).items():
                found["cosine"].setdefault(steps, {}).setdefault(modality, []).append(cosine)
                found["hits"].setdefault(steps, {}).setdefault(modality, []).append(hits)
    if not found["cosine"]:
        return None
    means = {
        metric: {steps: {name: float(np.mean(v)) for name, v in values.items()} for steps, values in by_steps.items()}
        for metric, by_steps in found.items()
    }
    return SamplingQuality(means["cosine"], means["hits"], clients)


def embedding_map(models: SavedModels) -> EmbeddingMap | None:
    """Place shared entities on a plane, before and after imputation; None if clients share none or impute nothing."""
    numbers = evenly(models.data.clients, MAX_CLIENTS)
    held = [models.client(number) for number in numbers]
    if len(held) < 2 or not held[0].model.imputes:
        return None
    shared = shared_entities({client.data.client: client.entity_ids for client in held})
    if not len(shared):
        return None
    view = held[0].strategy.views[-1]
    names = ("structure", *held[0].model.feature_dims)
    samples, real = [], []
    for client in held:
        tokens, available = client.complete_tokens(view, models.round_num)
        mine = torch.isin(client.entity_ids, shared)
        complete = tokens[:, mine]
        tokens_of = {"before": complete * available[:, mine].unsqueeze(-1), "after": complete}
        samples.append(TokenSample(client.entity_ids[mine], tokens_of, names))
        real.append(available[:, mine].numpy())
    cosines = semantic_consistency(sum_samples(samples, shared))
    shown = _entities_to_show(samples, real)
    stages = {}
    for stage in ("before", "after"):
        points = [
            (entity, number, row, tuple(name for name, there in zip(names, own[:, place], strict=True) if there))
            for number, sample, own in zip(numbers, samples, real, strict=True)
            for place, (entity, row) in enumerate(
                zip(sample.entity_ids.tolist(), _unit(sample.tokens[stage]), strict=True)
            )
            if entity in shown
        ]
        places = _on_plane(np.stack([row for _, _, row, _ in points]), [entity for entity, *_ in points])
        stages[stage] = [
            MapPoint(entity, number, float(x), float(y), there)
            for (entity, number, _, there), (x, y) in zip(points, places, strict=True)
        ]
    consistency = {stage: cosines[f"{stage}/total"] for stage in stages}
    return EmbeddingMap(stages["before"], stages["after"], consistency, len(shared), view, numbers)


def _on_plane(rows: Floats, groups: Sequence[int]) -> Floats:
    """Project rows [num_rows, width] on the plane in which the means of their groups differ most, [num_rows, 2]."""
    order, place = np.unique(np.array(groups), return_inverse=True)
    means = np.stack([rows[place == number].mean(0) for number in range(len(order))])
    centre = means.mean(0)
    _, _, directions = np.linalg.svd(means - centre, full_matrices=False)
    main = np.zeros((2, rows.shape[1]))
    main[: len(directions[:2])] = directions[:2]
    # A direction has no sign of its own: the largest entry is made positive, so that a report repeats.
    largest = main[[0, 1], np.abs(main).argmax(1)]
    main *= np.where(largest < 0, -1.0, 1.0)[:, None]
    return np.asarray((rows - centre) @ main.T)


def _unit(tokens: torch.Tensor) -> Floats:
    """Put an entity's tokens side by side as one unit vector, [num_tokens, num_rows, dim] -> [num_rows, width]."""
    return np.asarray(functional.normalize(tokens.transpose(0, 1).flatten(1).double(), dim=-1).numpy())


def _entities_to_show(samples: Iterable[TokenSample], real: Iterable[npt.NDArray[np.bool_]]) -> set[int]:
    """Choose entities that several clients hold with different tokens missing; those of most clients first."""
    seen: dict[int, list[tuple[bool, ...]]] = {}
    for sample, own in zip(samples, real, strict=True):
        for row, entity in enumerate(sample.entity_ids.tolist()):
            seen.setdefault(entity, []).append(tuple(own[:, row].tolist()))
    order = sorted(seen, key=lambda entity: (-len(seen[entity]), -len(set(seen[entity])), entity))
    return set(order[:MAX_MAPPED])


def _hidden_quality(client: Client, round_num: int) -> dict[str, tuple[float, float]]:
    """Compare the imputed tokens of hidden features with the true ones; modality -> cosine and Hits@10."""
    view = client.strategy.views[-1]
    tokens, _ = client.complete_tokens(view, round_num)
    found = {}
    for index, name in enumerate(client.model.feature_dims, start=1):
        item = client.data.features[name]
        if item.visible.all() or not item.visible.any():
            continue
        true = client.project(view, name, torch.from_numpy(item.values))
        hidden = torch.from_numpy(~item.visible)
        found[name] = token_quality(tokens[index, torch.from_numpy(item.rows)[hidden]], true, hidden)
    return found
