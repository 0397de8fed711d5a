"""Random generators derived from (seed, round, client, purpose), the only source of random draws in fedsim.

A draw never depends on how many draws were made elsewhere, so the same config gives the same numbers whatever
the number of actors, their placement, or the order in which clients finish.
"""

import hashlib

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, *, round_num: int = 0, client: int | None = None) -> int:
    """Hash (seed, round, client, purpose) to a 63-bit seed.

    Args:
        seed: the run's seed.
        purpose: what the draws are for, for example ``"batches"``.
        round_num: federation round, from 1; 0 for draws made before the first round.
        client: client id, or None for the server and for draws about the data as a whole.
    """
    text = f"{seed}/{round_num}/{'-' if client is None else client}/{purpose}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def torch_generator(seed: int, purpose: str, *, round_num: int = 0, client: int | None = None) -> torch.Generator:
    """Make a CPU generator for torch draws; see `derive_seed`."""
    generator = torch.Generator()
    generator.manual_seed(derive_seed(seed, purpose, round_num=round_num, client=client))
    return generator


def numpy_generator(seed: int, purpose: str, *, round_num: int = 0, client: int | None = None) -> np.random.Generator:
    """Make a generator for numpy draws; see `derive_seed`."""
    return np.random.default_rng(derive_seed(seed, purpose, round_num=round_num, client=client))
