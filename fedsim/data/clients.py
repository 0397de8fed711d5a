"""What each client holds: its triples under local ids, and the features it may see.

Built once from (graph, config); everything here is private to a client and never enters a message.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsim.config import Config
from fedsim.data.dataset import Features, KnowledgeGraph, Triples
from fedsim.data.modalities import visible_mask
from fedsim.data.splits import FederatedSplit, load_split, make_split, resolve_split
from fedsim.errors import ConfigError, DataError
from fedsim.randomness import numpy_generator

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClientFeatures:
    """One modality at one client.

    Attributes:
        rows: local entity ids that have the modality in the data, [num_rows].
        matrix: where the features stand, [num_available, feature_dim] float16 or float32: the data set's matrix, of
            which all clients of a node share one copy, or the client's own if its features were disturbed.
        places: the row of the matrix of each of `rows`, [num_rows].
        visible: bool [num_rows]; hidden ones are kept aside for the imputation metrics.
    """

    rows: Ids
    matrix: npt.NDArray[np.floating[Any]]
    places: Ids
    visible: npt.NDArray[np.bool_]

    @property
    def dim(self) -> int:
        """Return the width of a feature vector."""
        return int(self.matrix.shape[1])

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """Take the client's rows out of the matrix, [num_rows, feature_dim] float32."""
        return self.matrix[self.places].astype(np.float32, copy=False)


@dataclass(frozen=True)
class EvaluationGroup:
    """Triples that are ranked among the same candidates; a client has one, central training one per client.

    Attributes:
        name: the client they belong to.
        candidates: local entity ids, sorted, [num_candidates].
        triples: split name -> [num_triples, 3], local ids.
    """

    name: int
    candidates: Ids
    triples: dict[str, Triples]


@dataclass(frozen=True)
class ClientData:
    """A client's private knowledge graph.

    Attributes:
        client: its id, from 0.
        entity_ids: global ids of its entities, sorted, [num_entities].
        relation_ids: global ids of its relations, sorted, [num_relations].
        train: [num_triples, 3], local ids.
        features: modality -> features.
        groups: what it is evaluated on.
    """

    client: int
    entity_ids: Ids
    relation_ids: Ids
    train: Triples
    features: dict[str, ClientFeatures]
    groups: tuple[EvaluationGroup, ...]


def shared_matrices(clients: Sequence[ClientData]) -> dict[str, npt.NDArray[np.floating[Any]]]:
    """Return the feature matrices that all clients share, by modality."""
    found = {}
    for name, item in clients[0].features.items():
        if all(data.features[name].matrix is item.matrix for data in clients):
            found[name] = np.asarray(item.matrix)
    return found


def without_matrices(data: ClientData, shared: Collection[str]) -> ClientData:
    """Leave out the matrices of shared modalities, to send the rest."""
    return with_matrices(data, {name: data.features[name].matrix[:0].copy() for name in shared})


def with_matrices(data: ClientData, shared: Mapping[str, npt.NDArray[np.floating[Any]]]) -> ClientData:
    """Put the matrices of shared modalities in place."""
    features = {name: replace(data.features[name], matrix=matrix) for name, matrix in shared.items()}
    return replace(data, features=data.features | features)


def load_federated_split(graph: KnowledgeGraph, config: Config) -> FederatedSplit:
    """Divide the graph as the config says."""
    data = config.data
    if data.split == "given":
        assert data.split_file is not None, "the config refuses a given split without a file"
        return load_split(resolve_split(graph, data.split_file), graph)
    return make_split(graph, data.split, data.num_clients, seed=config.data_seed, alpha=data.dirichlet_alpha)


def chosen_modalities(graph: KnowledgeGraph, config: Config) -> list[str]:
    """Return the modalities used, in the data set's order; ConfigError if the config names one that is not there."""
    rates = config.data.missing_rate
    named = {"modalities": config.data.modalities or (), "missing_rate": rates if isinstance(rates, dict) else ()}
    for field, names in named.items():
        for name in names:
            if name not in graph.features:
                have = ", ".join(graph.features) or "no modality"
                raise ConfigError(f"config field 'data.{field}' names '{name}', but {graph.name} has {have}")
    used = config.data.modalities
    return [name for name in graph.features if used is None or name in used]


def build_clients(
    graph: KnowledgeGraph, split: FederatedSplit, config: Config, *, together: bool = False
) -> list[ClientData]:
    """Make every client's data.

    Args:
        graph: the whole graph.
        split: who holds which triple.
        config: modalities, missing rates and seeds.
        together: put all data at one client (central training), still evaluated client by client.
    """
    if not together:
        return [build_client(graph, split, config, [client]) for client in range(split.num_clients)]
    return [build_client(graph, split, config, range(split.num_clients))]


def build_client(graph: KnowledgeGraph, split: FederatedSplit, config: Config, members: Sequence[int]) -> ClientData:
    """Make the data of one client that holds what the split gives to `members`."""
    train = np.concatenate([split.client_triples("train", member) for member in members])
    if len(train) == 0:
        raise DataError(f"client {members[0]} has no training triple; use fewer clients or another data.split")
    entity_ids = np.unique(train[:, [0, 2]])
    relation_ids = np.unique(train[:, 1])
    local = _Localiser(entity_ids, relation_ids, members[0])
    groups = []
    for member in members:
        triples = {name: local(split.client_triples(name, member)) for name in ("train", "valid", "test")}
        groups.append(EvaluationGroup(member, np.unique(triples["train"][:, [0, 2]]), triples))
    train = groups[0].triples["train"] if len(members) == 1 else local(train)  # kept once
    features = {
        name: _client_features(graph.features[name], name, entity_ids, members[0], split.num_clients, config)
        for name in chosen_modalities(graph, config)
    }
    return ClientData(members[0], entity_ids, relation_ids, train, features, tuple(groups))


def _client_features(
    features: Features, name: str, entity_ids: Ids, client: int, num_clients: int, config: Config
) -> ClientFeatures:
    """Take a client's rows of one modality, hide some, and disturb them if asked."""
    data = config.data
    places = np.flatnonzero(np.isin(features.entity, entity_ids))
    rows = np.searchsorted(entity_ids, features.entity[places])
    available = np.zeros(len(entity_ids), dtype=np.bool_)
    available[rows] = True
    rate = data.missing_rate if isinstance(data.missing_rate, float | int) else data.missing_rate.get(name, 0.0)
    visible = visible_mask(
        available,
        modality=name,
        client=client,
        num_clients=num_clients,
        missing_rate=float(rate),
        pattern=data.missing_pattern,
        seed=config.data_seed,
    )
    if data.feature_noise == 0:
        return ClientFeatures(rows, features.values, places, visible[rows])
    values = np.asarray(features.values[places], dtype=np.float32)
    if visible[rows].any():
        generator = numpy_generator(config.data_seed, f"feature_noise/{name}", client=client)
        size = float(np.sqrt(np.mean(np.square(values[visible[rows]]))))  # hidden features decide nothing
        values = values + data.feature_noise * size * generator.standard_normal(values.shape).astype(np.float32)
    return ClientFeatures(rows, values, np.arange(len(rows)), visible[rows])


class _Localiser:
    """Maps global to local ids, and refuses an entity or relation that the client's train does not have."""

    def __init__(self, entity_ids: Ids, relation_ids: Ids, client: int) -> None:
        self.entity_ids, self.relation_ids, self.client = entity_ids, relation_ids, client

    def __call__(self, triples: Triples) -> Triples:
        local = np.empty_like(triples)
        for column, ids in ((0, self.entity_ids), (1, self.relation_ids), (2, self.entity_ids)):
            place = np.searchsorted(ids, triples[:, column]).clip(max=len(ids) - 1)
            if not np.array_equal(ids[place], triples[:, column]):
                raise DataError(
                    f"client {self.client} has a valid or test triple whose entity or relation is not in its train; "
                    f"rebuild the split with `fedsim data split`"
                )
            local[:, column] = place
        return local
