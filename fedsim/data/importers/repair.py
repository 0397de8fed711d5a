"""Mends faults of published data sets: repeated triples, and validation triples that train or test hold too."""

from dataclasses import dataclass

import numpy as np

from fedsim.data.dataset import KnowledgeGraph, Triples
from fedsim.randomness import numpy_generator

CARVE_SHARE = 0.05  # of train becomes the fresh validation set
_CARVE_ABOVE = 0.5  # share of leaked validation triples from which what is left is too little


@dataclass(frozen=True)
class ValidRepair:
    """What was done to the validation set."""

    num_dropped: int  # valid triples that train or test holds too
    num_carved: int  # train triples that became valid triples


def drop_repeats(graph: KnowledgeGraph, triples: Triples) -> Triples:
    """Keep the first of equal triples."""
    _, first = np.unique(graph.pack(triples), return_index=True)
    return triples[np.sort(first)]


def repair_valid(graph: KnowledgeGraph, seed: int) -> tuple[Triples, Triples, ValidRepair]:
    """Drop valid triples that train or test holds; where most are such, carve a fresh validation set out of train.

    Returns:
        The new train and valid triples and what was done. Carving takes 5 % of train, chosen by the seed, and
        leaves each entity and relation of train at least one triple there. No triple leaves the graph.
    """
    packed = graph.pack(graph.valid)
    leaked = np.isin(packed, np.concatenate([graph.pack(graph.train), graph.pack(graph.test)]))
    valid = graph.valid[~leaked]
    if leaked.mean() <= _CARVE_ABOVE:
        return graph.train, valid, ValidRepair(int(leaked.sum()), 0)
    order = numpy_generator(seed, "import/valid").permutation(len(graph.train))
    shuffled = graph.train[order]
    protected = np.zeros(len(order), dtype=bool)
    # The first triple of each entity and relation in the shuffled order stays.
    _, first = np.unique(shuffled[:, [0, 2]], return_index=True)
    protected[first // 2] = True
    _, first = np.unique(shuffled[:, 1], return_index=True)
    protected[first] = True
    carved = order[np.flatnonzero(~protected)[: round(CARVE_SHARE * len(order))]]
    stays = np.ones(len(graph.train), dtype=bool)
    stays[carved] = False
    valid = np.concatenate([valid, graph.train[~stays]])
    return graph.train[stays], valid, ValidRepair(int(leaked.sum()), len(carved))
