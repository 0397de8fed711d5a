"""Secure aggregation on Ray: the bits, and the bytes, of one process; the models of a run without masks."""

from pathlib import Path
from typing import Any

import pytest

from actors.runtime import ray_runtime
from builders import write_tiny_dataset
from fedsim import simulation
from runs import outcome, small_config

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.mark.parametrize(
    "changes",
    [
        {
            "data__num_clients": 5,
            "federation__cohort_size": 4,
            "runtime__placement": "pooled",
            "runtime__num_actors": 2,
        },
        {"runtime__placement": "dedicated", "secure_aggregation__hide_ownership": True},
    ],
    ids=["4 of 5 clients in 2 actors", "dedicated, ownership hidden"],
)
def test_masked_runs_end_alike_everywhere(changes: dict[str, Any], tmp_path: Path) -> None:
    dataset = write_tiny_dataset(tmp_path / "tiny")
    common = {"distillation__num_soft_queries": 0, "num_rounds": 2, **changes}
    masked = {"secure_aggregation__enabled": True, **common}
    simulation.run(small_config(dataset, tmp_path / "plain", **common))
    simulation.run(small_config(dataset, tmp_path / "masked", **masked))
    simulation.run(small_config(dataset, tmp_path / "ray", runtime__kind="ray", **masked), ray_runtime)
    assert outcome(tmp_path / "ray") == outcome(tmp_path / "masked")
    assert outcome(tmp_path / "ray")["models"] == outcome(tmp_path / "plain")["models"]
