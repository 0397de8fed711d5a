"""Looks a data set over: counts, coverage, overlap between clients, and the faults that spoil an evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedsim.data.dataset import KnowledgeGraph, Triples
from fedsim.data.splits import FederatedSplit

_MAX_CLIENT_ROWS = 12  # more clients are summed up instead of listed
_BAD_SHARE = 0.1  # of a split; a fault beyond this is shown in red


@dataclass(frozen=True)
class Fault:
    """Triples of a split that do not belong there or are easier than they look."""

    split: str
    kind: str  # "repeated", "in train", "inverse in train", ...
    num_triples: int
    share: float  # of the split's distinct triples; of all its lines for "repeated"


@dataclass(frozen=True)
class ClientReport:
    """What one client holds."""

    client: int
    num_entities: int
    num_relations: int
    num_triples: dict[str, int]
    coverage: dict[str, float]  # by modality, the share of the client's entities that have it


@dataclass(frozen=True)
class SplitReport:
    """How a federated split divides the graph."""

    clients: list[ClientReport]
    shared_entities: npt.NDArray[np.int64]  # [num_clients, num_clients] entities in common, own ones on the diagonal
    share_overlapping: float  # of the held entities, those at two clients or more
    num_moved: int


@dataclass(frozen=True)
class DatasetReport:
    """All that `inspect_dataset` found."""

    name: str
    licence: str
    num_entities: int
    num_relations: int
    num_triples: dict[str, int]
    num_described: int  # entities with a description
    num_pictured: int  # entities with a picture file
    features: dict[str, tuple[int, int]]  # by modality: entities that have it, dim
    faults: list[Fault]  # only those that occur
    split: SplitReport | None


def inspect_dataset(graph: KnowledgeGraph, split: FederatedSplit | None = None) -> DatasetReport:
    """Count what a graph holds and find repeated, leaked and unanswerable triples."""
    return DatasetReport(
        name=graph.name,
        licence=str(graph.meta.get("licence", "")),
        num_entities=graph.num_entities,
        num_relations=graph.num_relations,
        num_triples={name: len(triples) for name, triples in graph.triples.items()},
        num_described=sum(map(bool, graph.entity_descriptions)),
        num_pictured=sum(map(bool, graph.entity_pictures)),
        features={modality: (len(item.entity), item.dim) for modality, item in graph.features.items()},
        faults=find_faults(graph),
        split=None if split is None else inspect_split(graph, split),
    )


def find_faults(graph: KnowledgeGraph) -> list[Fault]:
    """Find the faults of each split, against train and test.

    `in train` and `in test` are the very triple; `inverse in train` means that a train triple of any relation links
    its tail to its head, `pair in train` that one of another relation links its head to its tail; `unseen in train`
    means that train lacks its head, tail or relation.
    """
    faults = []
    distinct = {}
    for name, triples in graph.triples.items():
        _, first = np.unique(graph.pack(triples), return_index=True)
        distinct[name] = triples[np.sort(first)]
        faults.append(_fault(name, "repeated", len(triples) - len(first), len(triples)))
    for name in ("valid", "test"):
        masks = {"in train": np.isin(graph.pack(distinct[name]), graph.pack(graph.train))}
        if name == "valid":
            masks["in test"] = np.isin(graph.pack(distinct[name]), graph.pack(graph.test))
        masks |= _train_links(graph, distinct[name])
        faults += [_fault(name, kind, int(mask.sum()), len(mask)) for kind, mask in masks.items()]
    return [fault for fault in faults if fault.num_triples]


def inspect_split(graph: KnowledgeGraph, split: FederatedSplit) -> SplitReport:
    """Count what each client holds and how much of it others hold too."""
    available = {modality: item.available(graph.num_entities) for modality, item in graph.features.items()}
    held = np.zeros((split.num_clients, graph.num_entities), dtype=bool)
    for rows in split.rows.values():
        held[rows[:, 0], rows[:, 1]] = True
        held[rows[:, 0], rows[:, 3]] = True
    clients = [
        ClientReport(
            client=client,
            num_entities=int(held[client].sum()),
            num_relations=len(np.unique(split.client_triples("train", client)[:, 1])),
            num_triples={name: len(split.client_triples(name, client)) for name in split.rows},
            coverage={modality: float(mask[held[client]].mean()) for modality, mask in available.items()},
        )
        for client in range(split.num_clients)
    ]
    num_holders = held.sum(axis=0)
    counts = held.astype(np.float32)  # a float product runs in BLAS, and counts below 2**24 are exact in it
    return SplitReport(
        clients=clients,
        shared_entities=(counts @ counts.T).astype(np.int64),
        share_overlapping=float((num_holders > 1).sum() / (num_holders > 0).sum()),
        num_moved=split.num_moved,
    )


def render_report(report: DatasetReport) -> Group:
    """Lay a report out as tables for the terminal."""
    parts: list[RenderableType] = [_counts_table(report), _coverage_table(report)]
    parts.append(_faults_table(report.faults) if report.faults else Text("no repeated, leaked or unseen triples"))
    if report.split is not None:
        parts += _render_split(report.split)
    return Group(*parts)


def _fault(split: str, kind: str, num_triples: int, total: int) -> Fault:
    return Fault(split, kind, num_triples, num_triples / max(total, 1))


def _train_links(graph: KnowledgeGraph, triples: Triples) -> Mapping[str, npt.NDArray[np.bool_]]:
    """Mark the triples that train makes easy or impossible, each mask [num_triples]."""
    train = np.unique(graph.train, axis=0)
    forward = train[:, 0] * graph.num_entities + train[:, 2]
    pair = triples[:, 0] * graph.num_entities + triples[:, 2]
    inverse = triples[:, 2] * graph.num_entities + triples[:, 0]
    pairs, num_links = np.unique(forward, return_counts=True)
    position = np.minimum(np.searchsorted(pairs, pair), len(pairs) - 1)
    num_pair_links = np.where(pairs[position] == pair, num_links[position], 0)
    own = np.isin(graph.pack(triples), graph.pack(train))
    seen = np.isin(triples[:, [0, 2]], train[:, [0, 2]]).all(axis=1) & np.isin(triples[:, 1], train[:, 1])
    loop = triples[:, 0] == triples[:, 2]  # its own inverse, not a leak
    return {
        "inverse in train": np.isin(inverse, forward) & ~loop,
        "pair in train": num_pair_links > own,
        "unseen in train": ~seen,
    }


def _percent(part: float, whole: float = 1.0) -> str:
    return f"{100 * part / max(whole, 1e-12):.1f} %"


def _counts_table(report: DatasetReport) -> Table:
    title = report.name + (f" ({report.licence})" if report.licence else "")
    table = Table(title=title, title_justify="left")
    for column in ("entities", "relations", *report.num_triples):
        table.add_column(column, justify="right")
    counts = (report.num_entities, report.num_relations, *report.num_triples.values())
    table.add_row(*(f"{count:,}" for count in counts))
    return table


def _coverage_table(report: DatasetReport) -> Table:
    table = Table(title="coverage of entities", title_justify="left")
    table.add_column("what")
    for column in ("entities", "share", "dim"):
        table.add_column(column, justify="right")
    rows = [("description", report.num_described, ""), ("picture file", report.num_pictured, "")]
    rows += [(f"{modality} features", num_rows, str(dim)) for modality, (num_rows, dim) in report.features.items()]
    for what, num_rows, dim_text in rows:
        table.add_row(what, f"{num_rows:,}", _percent(num_rows, report.num_entities), dim_text)
    return table


def _faults_table(faults: list[Fault]) -> Table:
    table = Table(title="faults found", title_justify="left")
    table.add_column("split")
    table.add_column("triples that are")
    table.add_column("number", justify="right")
    table.add_column("share", justify="right")
    for fault in faults:
        style = "red" if fault.share > _BAD_SHARE else None
        table.add_row(fault.split, fault.kind, f"{fault.num_triples:,}", _percent(fault.share), style=style)
    return table


def _render_split(split: SplitReport) -> list[RenderableType]:
    modalities = list(split.clients[0].coverage)
    table = Table(title=f"{len(split.clients)} clients", title_justify="left")
    for column in ("client", "entities", "relations", *split.clients[0].num_triples, *modalities):
        table.add_column(column, justify="right")
    for report in split.clients[:_MAX_CLIENT_ROWS]:
        counts = (report.client, report.num_entities, report.num_relations, *report.num_triples.values())
        table.add_row(*(f"{count:,}" for count in counts), *(_percent(report.coverage[name]) for name in modalities))
    notes = [f"{_percent(split.share_overlapping)} of the entities are at two clients or more"]
    if split.num_moved:
        notes.append(f"{split.num_moved:,} valid or test triples moved to the train of their client")
    if len(split.clients) <= _MAX_CLIENT_ROWS:
        return [table, _overlap_table(split.shared_entities), Text("\n".join(notes))]
    sizes = [report.num_triples["train"] for report in split.clients]
    notes.append(f"{len(sizes) - _MAX_CLIENT_ROWS} more clients not shown; train triples per client: ")
    notes[-1] += f"smallest {min(sizes):,}, median {int(np.median(sizes)):,}, largest {max(sizes):,}"
    return [table, Text("\n".join(notes))]


def _overlap_table(shared: npt.NDArray[np.int64]) -> Table:
    table = Table(title="entities in common", title_justify="left")
    table.add_column("client", justify="right")
    for client in range(len(shared)):
        table.add_column(str(client), justify="right")
    for client, row in enumerate(shared.tolist()):
        table.add_row(str(client), *(f"{count:,}" for count in row))
    return table
