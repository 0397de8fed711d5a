"""Modality heterogeneity: which features a client may see (method.md, section on data).

A feature that is hidden here is never given to the model or to a loss; it is kept aside for the imputation metrics.
"""

from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from fedsim.errors import ConfigError
from fedsim.randomness import numpy_generator

MissingPattern: TypeAlias = Literal["random", "client", "natural"]
MISSING_PATTERNS: tuple[str, ...] = get_args(MissingPattern)


def visible_mask(
    available: npt.NDArray[np.bool_],
    *,
    modality: str,
    client: int,
    num_clients: int,
    missing_rate: float,
    pattern: MissingPattern,
    seed: int,
) -> npt.NDArray[np.bool_]:
    """Choose the features of one modality that a client sees.

    Args:
        available: which of the client's entities have the modality in the data, [num_entities].
        modality: its name; each modality has draws of its own.
        client: the client's id, from 0.
        num_clients: how many clients there are; only the pattern `client` depends on it.
        missing_rate: the share that is hidden, 0..1.
        pattern: `random` hides round(missing_rate * number available) entities of this client, `client` hides
            the whole modality at round(missing_rate * num_clients) clients, `natural` hides nothing.
        seed: the seed of the data.

    Returns:
        A mask within `available`, [num_entities].
    """
    if not 0.0 <= missing_rate <= 1.0:
        raise ConfigError(f"missing_rate of {modality}: {missing_rate} is not in 0..1; choose a share")
    if pattern == "natural":
        return available.copy()
    if pattern == "client":
        generator = numpy_generator(seed, f"missing/{modality}")
        blind = generator.permutation(num_clients)[: round(missing_rate * num_clients)]
        return np.zeros_like(available) if client in blind else available.copy()
    if pattern == "random":
        generator = numpy_generator(seed, f"missing/{modality}", client=client)
        candidates = np.flatnonzero(available)
        visible = available.copy()
        visible[generator.permutation(candidates)[: round(missing_rate * len(candidates))]] = False
        return visible
    raise ConfigError(f"missing_pattern: {pattern!r} is not known; choose one of {', '.join(MISSING_PATTERNS)}")
