"""A cluster of three nodes: clients are spread, each node sends one partial sum, the bits are those of one process.

Two of the nodes have a GPU that is not there: shares of it are reserved as asked, and `auto` packs by them.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import cluster_of_three
from builders import write_tiny_dataset
from cluster_of_three import CHANGES, COHORT, GPU_SHARE, NUM_CLIENTS
from fedsim import simulation
from processes import descendants, end
from runs import outcome, small_config


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def folder(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run on three nodes, in a process of its own."""
    folder = tmp_path_factory.mktemp("three_nodes")
    program = Path(cluster_of_three.__file__)
    # The nodes' workers import this program's classes.
    paths = os.pathsep.join([str(program.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(program), str(dataset), str(folder)]
    environment = os.environ | {"PYTHONPATH": paths}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=280)
        finally:
            left = descendants(process.pid)
            if process.poll() is None:
                process.kill()
            end(left)
    assert process.returncode == 0, output
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    return found


def test_clients_are_spread(seen: dict[str, Any]) -> None:
    assert len(seen["nodes"]) == 3
    assert sorted(client for clients in seen["nodes"].values() for client in clients) == list(range(NUM_CLIENTS))


def test_each_node_sends_one_partial_sum_per_round(seen: dict[str, Any]) -> None:
    by_round: dict[int, list[list[int]]] = {}
    for round_num, clients in seen["merged"]:
        by_round.setdefault(round_num, []).append(clients)
    assert sorted(by_round) == [1, 2, 3]
    for partials in by_round.values():
        assert sum(map(len, partials)) == COHORT
        cohort = {client for clients in partials for client in clients}
        of_nodes = [sorted(cohort.intersection(held)) for held in seen["nodes"].values()]
        assert sorted(partials) == sorted(clients for clients in of_nodes if clients)


def test_the_bits_are_those_of_one_process(dataset: Path, folder: Path, tmp_path: Path) -> None:
    simulation.run(small_config(dataset, tmp_path / "here", **CHANGES))
    assert outcome(folder / "run") == outcome(tmp_path / "here")


def test_shares_of_a_gpu_are_reserved_and_auto_packs_by_them(seen: dict[str, Any]) -> None:
    """Two GPUs of two halves each: four actors for six clients, two beside each GPU, none on the third node."""
    shares = [share for share, _, _ in seen["reserved"]]
    assert shares == [GPU_SHARE] * 4
    places = Counter((node, *gpus) for _, node, gpus in seen["reserved"])
    assert sorted(places.values()) == [2, 2]
    assert seen["lines"][0].startswith(
        f"pooled: 4 client actors, holding {NUM_CLIENTS} clients, each on 0.5 CPU and 0.5 GPU"
    )
    assert "room for 4 client actors, not for 6" in seen["lines"][1]
    assert seen["trained"] == list(range(NUM_CLIENTS))
