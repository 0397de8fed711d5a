"""The common ids of a run, found by private set union instead of taken from the data set (`data.alignment`).

In a simulation one process divides a data set among the clients, so it knows all names and gave them their ids before.
What runs here is the protocol of `fedsim.privacy.set_alignment` between the clients' names as they would run it, and a
check that it finds the ids that the data set has, but for their order. These then stand for the ones it found: the
order of ids decides which initial values an entity draws, and the numbers of a run should not change with the way its
ids were agreed on.
"""

import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np

from fedsim.data.clients import Ids
from fedsim.errors import DataError
from fedsim.privacy.set_alignment import AlignmentParty, Union, private_union

logger = logging.getLogger(__name__)


def align_names(names: Sequence[str], owned: Mapping[int, Ids]) -> Union:
    """Let clients find the ids of the names that they own.

    Args:
        names: of all ids of the data set.
        owned: client -> ids of what it has, sorted, [num_owned].

    Raises:
        DataError: if two ids have the same name, or the ids found are not those of the data set.
    """
    started = time.perf_counter()
    parties = [AlignmentParty(client, [names[index] for index in ids]) for client, ids in owned.items()]
    union = private_union(parties)
    given = np.concatenate(list(owned.values()))
    found = np.concatenate([np.asarray(union.ids[client], dtype=np.int64) for client in owned])
    pairs = np.unique(np.stack([given, found]), axis=1)
    if not len(np.unique(given)) == pairs.shape[1] == union.num_names:
        raise DataError(
            f"the clients have {len(np.unique(given))} ids and private set union found {union.num_names} names: two "
            f"ids have the same name; mend entities.tsv or relations.tsv, or set data.alignment to given"
        )
    logger.info(
        "%d names of %d clients aligned by private set union in %.3g s, %.3g MB sent",
        union.num_names,
        len(owned),
        time.perf_counter() - started,
        union.num_bytes / 1e6,
    )
    return union
