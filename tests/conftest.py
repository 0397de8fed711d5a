"""Settings and fixtures shared by all tests."""

import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("quick", max_examples=25, deadline=None)
hypothesis.settings.load_profile("quick")

# Ray announces a later default for processes without a GPU by a warning; this is that default.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Pin torch to one thread: sums with more threads differ in the last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """Start the one Ray cluster of the test session, with token authentication as Ray has it by default."""
    import ray

    yield ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    ray.shutdown()
