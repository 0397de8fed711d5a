"""Three Ray nodes on this machine, and what a run does on them; a program, since a process has one cluster.

Usage: ``python cluster_of_three.py DATASET FOLDER``; writes ``FOLDER/run`` and what was seen to ``FOLDER/seen.json``.
"""

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster

import actors.crew
from actors.client import _ClientActor
from actors.runtime import RayRuntime, ray_runtime
from actors.server import _ServerActor
from fedsim import simulation
from fedsim.federated.aggregation import PartialSums
from fedsim.federated.runtime import prepare
from runs import small_config

NUM_CLIENTS, COHORT, NUM_ACTORS = 6, 5, 5
CHANGES: dict[str, Any] = {
    "data__num_clients": NUM_CLIENTS,
    "federation__cohort_size": COHORT,
    "runtime__clients_per_batch": 1,
    "runtime__placement": "pooled",
}
GPU_SHARE = 0.5


class _WatchedServer(_ServerActor):
    """Keeps whose updates were in each partial sum."""

    merged: list[tuple[int, tuple[int, ...]]]

    def merge(self, partial: PartialSums) -> None:
        self.merged = [*getattr(self, "merged", []), (partial.round_num, partial.clients)]
        super().merge(partial)

    def all_merged(self) -> list[tuple[int, tuple[int, ...]]]:
        return self.merged


class _ClientsBesideAGPU(_ClientActor):
    """Reserves a share of a GPU that is not there, and computes on the CPU."""

    def _device(self) -> torch.device:
        return torch.device("cpu")

    def reserved(self) -> tuple[float, str, list[int]]:
        context = ray.get_runtime_context()
        gpus = [int(number) for number in ray.get_gpu_ids()]
        return context.get_assigned_resources().get("GPU", 0.0), context.get_node_id(), gpus


def run_on_three_nodes(dataset: Path, folder: Path) -> dict[str, Any]:
    """Run an experiment with a pool; return where its actors were and what the server merged."""
    actors.crew.ServerActor = ray.remote(_WatchedServer)  # type: ignore[misc]
    seen: dict[str, Any] = {}

    def factory(experiment: Any) -> RayRuntime:
        runtime = ray_runtime(experiment)
        assert isinstance(runtime, RayRuntime)
        seen["nodes"] = {held.node_id: [] for held in runtime.pool}
        for held in runtime.pool:
            seen["nodes"][held.node_id] += held.clients
        close = runtime.close

        def look_and_close() -> None:
            server: Any = runtime.server
            seen["merged"] = ray.get(server.all_merged.remote())
            close()

        runtime.close = look_and_close  # type: ignore[method-assign]
        return runtime

    simulation.run(small_config(dataset, folder / "run", runtime__num_actors=NUM_ACTORS, **CHANGES), factory)
    return seen


def place_beside_gpus(dataset: Path) -> dict[str, Any]:
    """Start and train clients that take half a GPU each; return what they reserved and what was said."""
    actors.crew.ClientActor = ray.remote(_ClientsBesideAGPU)  # type: ignore[misc]
    config = small_config(
        dataset,
        Path("unused"),
        data__num_clients=NUM_CLIENTS,
        runtime__gpus_per_client=GPU_SHARE,
        runtime__clients_per_batch=1,
    )
    with closing(ray_runtime(prepare(config))) as runtime:
        assert isinstance(runtime, RayRuntime)
        handles: list[Any] = [held.actor for held in runtime.pool]
        reserved = ray.get([handle.reserved.remote() for handle in handles])
        reports = runtime.train(1, list(range(NUM_CLIENTS))).reports
        return {"reserved": reserved, "lines": runtime.placement, "trained": [report.client for report in reports]}


def main(dataset: Path, folder: Path) -> None:
    """Start the nodes, two of which have a GPU that is not there, and look."""
    head: dict[str, Any] = {"num_cpus": 2, "num_gpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2, num_gpus=1)
    cluster.add_node(num_cpus=2, num_gpus=0)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        seen = run_on_three_nodes(dataset, folder) | place_beside_gpus(dataset)
        (folder / "seen.json").write_text(json.dumps(seen))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
