"""Federated splits: which client holds which triple.

A split is a pure function of (graph, number of clients, seed). Every triple belongs to exactly one client and keeps
its global membership in train, valid or test, with one exception: a valid or test triple whose entity or relation
its client does not have in train moves to that client's train, since nobody could learn to answer it.

Sources: `relation` is FedE's R-k (Chen et al. 2021, relations shuffled into equal groups), `cluster` is FedLU's C-k
(Zhu et al. 2023, spectral clustering of relation co-occurrence), `dirichlet` is the label-skew split that is common
in federated learning (Hsu et al. 2019), with relations as labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from fedsim.data import split_files
from fedsim.data.dataset import SPLIT_NAMES, KnowledgeGraph
from fedsim.data.split_files import Rows
from fedsim.errors import ConfigError, DataError
from fedsim.randomness import derive_seed, numpy_generator


@dataclass(frozen=True)
class FederatedSplit:
    """Triples by client; rows are sorted by client."""

    num_clients: int
    train: Rows
    valid: Rows
    test: Rows
    num_moved: int  # valid and test triples that moved to train, see the module's docstring

    @property
    def rows(self) -> dict[str, Rows]:
        """Return the rows by split name."""
        return {"train": self.train, "valid": self.valid, "test": self.test}

    def client_triples(self, name: str, client: int) -> npt.NDArray[np.int64]:
        """Return one client's triples of a split, [num_triples, 3]."""
        rows = self.rows[name]
        start, stop = np.searchsorted(rows[:, 0], [client, client + 1])
        return rows[start:stop, 1:]


def split_by_relation(graph: KnowledgeGraph, num_clients: int, seed: int) -> FederatedSplit:
    """Shuffle the relations into groups of equal size (R-k)."""
    _check_num_clients(graph, num_clients, "relation")
    order = numpy_generator(seed, "split/relation").permutation(graph.num_relations)
    client_of_relation = np.empty(graph.num_relations, dtype=np.int64)
    for client, relations in enumerate(np.array_split(order, num_clients)):
        client_of_relation[relations] = client
    return _assemble(graph, num_clients, _by_relation(graph, client_of_relation))


def split_by_cluster(graph: KnowledgeGraph, num_clients: int, seed: int) -> FederatedSplit:
    """Cluster relations that share entities (C-k), by spectral clustering of their co-occurrence."""
    _check_num_clients(graph, num_clients, "cluster")
    client_of_relation = _cluster_relations(graph, num_clients, seed)
    return _assemble(graph, num_clients, _by_relation(graph, client_of_relation))


def split_dirichlet(graph: KnowledgeGraph, num_clients: int, alpha: float, seed: int) -> FederatedSplit:
    """Deal out each relation's triples by shares drawn from Dirichlet(alpha): the smaller alpha, the more skewed.

    Triples are dealt in an order in which neighbours share entities, the same for all relations. Dealt at random,
    a thousand clients would hold loose triples and hardly any valid or test triple that their train covers.
    """
    if not alpha > 0.0 or not np.isfinite(alpha):
        raise ConfigError(f"alpha: {alpha} is not a positive number; 0.1 is very uneven, 100 nearly even")
    num_train = len(np.unique(graph.pack(graph.train)))
    if not 1 <= num_clients <= num_train:
        raise DataError(
            f"num_clients: {num_clients} clients cannot each hold one of the {num_train} train triples of "
            f"{graph.name}; choose 1..{num_train}"
        )
    generator = numpy_generator(seed, "split/dirichlet")
    # Distinct triples are dealt out, so that copies of a triple in two splits of a faulty data set stay together.
    triples = np.concatenate(list(graph.triples.values()))
    packed, first, inverse = np.unique(graph.pack(triples), return_index=True, return_inverse=True)
    in_train = np.flatnonzero(np.isin(packed, graph.pack(graph.train)))
    shares = generator.dirichlet(np.full(num_clients, alpha), size=graph.num_relations)
    client = _deal(graph, triples[first], np.nan_to_num(shares, nan=1.0 / num_clients))
    _fill_empty_clients(client, in_train, num_clients, generator)
    ends = np.cumsum([len(part) for part in graph.triples.values()])[:-1]
    parts = np.split(client[inverse.reshape(-1)], ends)
    return _assemble(graph, num_clients, dict(zip(SPLIT_NAMES, parts, strict=True)))


Splitter = Callable[[KnowledgeGraph, int, float, int], FederatedSplit]  # (graph, num_clients, alpha, seed)

SPLITTERS: dict[str, Splitter] = {
    "relation": lambda graph, num_clients, alpha, seed: split_by_relation(graph, num_clients, seed),
    "cluster": lambda graph, num_clients, alpha, seed: split_by_cluster(graph, num_clients, seed),
    "dirichlet": split_dirichlet,
}


def make_split(graph: KnowledgeGraph, kind: str, num_clients: int, *, seed: int, alpha: float = 1.0) -> FederatedSplit:
    """Split a graph by the name of a splitter; only `dirichlet` looks at `alpha`."""
    if kind not in SPLITTERS:
        raise ConfigError(f"split: {kind!r} is not known; choose one of {', '.join(SPLITTERS)}")
    return SPLITTERS[kind](graph, num_clients, alpha, seed)


def save_split(split: FederatedSplit, path: Path) -> None:
    """Write a split as safetensors, complete or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"num_clients": str(split.num_clients), "num_moved": str(split.num_moved)}
        save_file({name: np.ascontiguousarray(rows) for name, rows in split.rows.items()}, str(temporary), metadata)
        temporary.replace(path)
    except OSError as err:
        raise DataError(f"{path}: cannot be written ({err.strerror or err}); nothing was kept") from err
    finally:
        temporary.unlink(missing_ok=True)


def resolve_split(graph: KnowledgeGraph, name_or_path: str) -> Path:
    """Find a split file by its path or by the name under which the data set keeps it."""
    folder = graph.path / "splits" if graph.path is not None else None
    if folder is not None and (folder / f"{name_or_path}.safetensors").is_file():
        return folder / f"{name_or_path}.safetensors"
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    known = sorted(file.stem for file in folder.glob("*.safetensors")) if folder is not None else []
    raise DataError(
        f"split {name_or_path!r} not found; give a file, or a split that {graph.name} brings: "
        f"{', '.join(known) or 'none, make one with `fedsim data split`'}"
    )


def load_split(path: Path, graph: KnowledgeGraph, *, move_unseen: bool = False) -> FederatedSplit:
    """Load a split of a graph from safetensors, npz or tsv and check it.

    Args:
        path: `.safetensors` or `.npz` with train, valid and test [n, 4], columns client, head, relation, tail (ids);
            or `.tsv` with the header `split client head relation tail`.
        graph: the graph that is split. A split may draw train, valid and test anew (as published ones do), but it
            must hold each triple of the graph at exactly one client.
        move_unseen: move valid and test triples that their client could not learn to its train, instead of
            refusing them.
    """
    path = Path(path)
    rows, num_moved = split_files.read_split_rows(path)
    split = build_split(rows, graph, str(path), move_unseen=move_unseen)
    return FederatedSplit(split.num_clients, split.train, split.valid, split.test, split.num_moved + num_moved)


def build_split(
    given: split_files.SplitRows, graph: KnowledgeGraph, source: str, *, move_unseen: bool = False
) -> FederatedSplit:
    """Check rows that came from a file against the graph and make a split of them; see `load_split`."""
    split_files.check_split_rows(given, graph, source)
    rows = given.parts
    num_clients = 1 + max(int(part[:, 0].max()) for part in rows.values())
    if num_clients > len(rows["train"]):
        raise DataError(
            f"{source}: client {num_clients - 1} among {len(rows['train'])} train triples; number the clients 0..n-1 "
            f"without gaps, each with a train triple"
        )
    unseen = {name: _unseen(rows["train"], rows[name], graph) for name in ("valid", "test")}
    for name, mask in unseen.items():
        if mask.any() and not move_unseen:
            row = int(np.argmax(mask))
            client, head, relation, tail = rows[name][row].tolist()
            raise DataError(
                f"{source}: {given.place(name, row)}: client {client} does not have head {head}, relation "
                f"{relation} and tail {tail} all in its train ({int(mask.sum())} such {name} triples); move them to "
                f"the client's train (fedsim data split --move-unseen)"
            )
    split = _collect(num_clients, rows, unseen)
    missing = np.setdiff1d(np.arange(num_clients), split.train[:, 0])
    if len(missing):
        raise DataError(f"{source}: client {missing[0]} has no train triple; number the clients 0..n-1 without gaps")
    return split


def _check_num_clients(graph: KnowledgeGraph, num_clients: int, kind: str) -> None:
    if not 1 <= num_clients <= graph.num_relations:
        raise DataError(
            f"num_clients: the split {kind!r} gives each client at least one relation, {graph.name} has "
            f"{graph.num_relations} and {num_clients} clients are asked for; choose 1..{graph.num_relations} or the "
            f"split 'dirichlet'"
        )


def _by_relation(graph: KnowledgeGraph, client_of_relation: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.int64]]:
    return {name: client_of_relation[triples[:, 1]] for name, triples in graph.triples.items()}


def _cluster_relations(graph: KnowledgeGraph, num_clients: int, seed: int) -> npt.NDArray[np.int64]:
    """Give each relation a cluster, [num_relations]; clusters are numbered by their first relation."""
    if num_clients == 1:
        return np.zeros(graph.num_relations, dtype=np.int64)
    if num_clients == graph.num_relations:
        return np.arange(graph.num_relations)
    from scipy.sparse import coo_matrix  # here, because importing scikit-learn takes a second
    from sklearn.cluster import SpectralClustering

    triples = np.concatenate(list(graph.triples.values()))
    relation = np.concatenate([triples[:, 1], triples[:, 1]])
    entity = np.concatenate([triples[:, 0], triples[:, 2]])
    shape = (graph.num_relations, graph.num_entities)
    incidence = coo_matrix((np.ones(len(entity)), (relation, entity)), shape=shape).tocsr()
    incidence.data[:] = 1.0
    shared = (incidence @ incidence.T).toarray()  # [num_relations, num_relations] entities in common
    size = np.maximum(np.diag(shared), 1.0)
    # Cosine, so that frequent relations do not draw everything into one cluster; the small constant keeps the
    # graph of relations connected, which spectral clustering needs.
    affinity = shared / np.sqrt(np.outer(size, size)) + 1e-4
    model = SpectralClustering(
        n_clusters=num_clients,
        affinity="precomputed",
        assign_labels="kmeans",
        random_state=derive_seed(seed, "split/cluster") % 2**32,
    )
    labels = np.asarray(model.fit(affinity).labels_, dtype=np.int64)
    sizes = np.bincount(labels, minlength=num_clients)
    for cluster in np.flatnonzero(sizes == 0):  # k-means may leave one empty; the largest gives it a relation
        labels[np.flatnonzero(labels == np.argmax(np.bincount(labels)))[-1]] = cluster
    first = np.array([np.argmax(labels == cluster) for cluster in range(num_clients)])
    number = np.empty(num_clients, dtype=np.int64)
    number[np.argsort(first)] = np.arange(num_clients)
    renumbered: npt.NDArray[np.int64] = number[labels]
    return renumbered


def _deal(
    graph: KnowledgeGraph, triples: npt.NDArray[np.int64], shares: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Give each triple [num_triples, 3] a client by its relation's shares [num_relations, num_clients]."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    head, relation, tail = triples.T
    shape = (graph.num_entities, graph.num_entities)
    links = coo_matrix((np.ones(2 * len(head)), (np.append(head, tail), np.append(tail, head))), shape=shape)
    position = np.empty(graph.num_entities, dtype=np.int64)  # on a line along which linked entities are near
    position[reverse_cuthill_mckee(links.tocsr(), symmetric_mode=True)] = np.arange(graph.num_entities)
    order = np.lexsort((position[head] + position[tail], relation))
    bounds = np.cumsum(shares, axis=1)
    client = np.empty(len(triples), dtype=np.int64)
    for members in np.split(order, np.cumsum(np.bincount(relation, minlength=graph.num_relations))[:-1]):
        if len(members):
            quantile = (np.arange(len(members)) + 0.5) / len(members)
            client[members] = np.searchsorted(bounds[relation[members[0]]], quantile, side="right")
    np.minimum(client, shares.shape[1] - 1, out=client)  # rounding may leave the last bound just under 1
    return client


def _fill_empty_clients(
    client: npt.NDArray[np.int64],
    in_train: npt.NDArray[np.int64],
    num_clients: int,
    generator: np.random.Generator,
) -> None:
    """Give each client without a train triple one from a client that has several, in place."""
    sizes = np.bincount(client[in_train], minlength=num_clients)
    empty = np.flatnonzero(sizes == 0)
    if not len(empty):
        return
    # Of each client, all train triples but a first one may be given away.
    order = generator.permutation(in_train)
    _, first = np.unique(client[order], return_index=True)
    spare = np.delete(order, first)
    by_size = np.argsort(-sizes[client[spare]], kind="stable")
    client[spare[by_size[: len(empty)]]] = empty


def _assemble(graph: KnowledgeGraph, num_clients: int, client_of: dict[str, npt.NDArray[np.int64]]) -> FederatedSplit:
    rows = {name: np.column_stack([client_of[name], triples]) for name, triples in graph.triples.items()}
    unseen = {name: _unseen(rows["train"], rows[name], graph) for name in ("valid", "test")}
    split = _collect(num_clients, rows, unseen)
    missing = np.setdiff1d(np.arange(num_clients), split.train[:, 0])
    if len(missing):
        raise DataError(f"num_clients: client {missing[0]} of {num_clients} gets no triple; choose fewer clients")
    return split


def _collect(num_clients: int, rows: dict[str, Rows], unseen: dict[str, npt.NDArray[np.bool_]]) -> FederatedSplit:
    """Move the unseen valid and test rows to train and sort all rows by client."""
    moved = [rows[name][mask] for name, mask in unseen.items()]
    parts = {
        "train": np.concatenate([rows["train"], *moved]),
        "valid": rows["valid"][~unseen["valid"]],
        "test": rows["test"][~unseen["test"]],
    }
    parts = {name: part[np.argsort(part[:, 0], kind="stable")] for name, part in parts.items()}
    return FederatedSplit(num_clients, **parts, num_moved=sum(map(len, moved)))


def _unseen(train: Rows, rows: Rows, graph: KnowledgeGraph) -> npt.NDArray[np.bool_]:
    """Mark the rows whose head, tail or relation is not in the train of their client, [num_rows]."""
    seen_entities = np.unique(train[:, [0, 0]] * graph.num_entities + train[:, [1, 3]])
    seen_relations = np.unique(train[:, 0] * graph.num_relations + train[:, 2])
    entities = rows[:, [0, 0]] * graph.num_entities + rows[:, [1, 3]]
    relations = rows[:, 0] * graph.num_relations + rows[:, 2]
    known = np.isin(entities, seen_entities).all(axis=1) & np.isin(relations, seen_relations)
    return np.asarray(~known)
