"""What trials reserve, whether the cluster has room, and how a federation lives in its placement group."""

from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.placement import NodeResources, plan_reserved
from actors.reservation import _alike, federation_bundles, take_share
from builders import write_tiny_dataset
from fedsim.config import Config, RuntimeConfig, make_config
from fedsim.errors import RunError
from tune.resources import check_room, most_at_a_time, reserve

GB = 1e9


def _config(**runtime: Any) -> Config:
    return make_config({"runtime": runtime}, {"data.num_clients": 5})


def _amounts(config: Config, share_cpus: float | None = None) -> list[dict[str, float]]:
    return list(reserve(config, share_cpus).bundles)


def test_a_trial_reserves_one_client_actor_and_the_server_unless_it_has_a_share() -> None:
    assert _amounts(_config()) == [{"CPU": 0.5}, {"CPU": 0.5}]
    assert len(_amounts(_config(), share_cpus=2.0)) == 4  # three client actors and the server
    assert len(_amounts(_config(), share_cpus=64.0)) == 6  # one per client, not more
    assert len(_amounts(_config(placement="dedicated"))) == 6
    assert len(_amounts(_config(placement="pooled", num_actors=2))) == 3


def test_gpus_go_to_clients_alone() -> None:
    bundles = _amounts(_config(gpus_per_client=0.25, num_actors=2))
    assert bundles == [{"CPU": 0.5, "GPU": 0.25}, {"CPU": 0.5, "GPU": 0.25}, {"CPU": 0.5}]


def test_the_leader_of_actors_reserves_nothing_and_one_that_computes_does() -> None:
    assert reserve(_config(), None).factory.head_cpus == 0
    alone = reserve(_config(kind="in_process", torch_threads=2), None)
    assert alone.factory.head_cpus == 2
    assert alone.num_processes == 1


def test_a_strategy_without_server_reserves_none() -> None:
    local = make_config({"federation": {"strategy": "local"}})
    central = make_config({"federation": {"strategy": "central"}, "runtime": {"placement": "dedicated"}})
    assert len(_amounts(local)) == 1
    assert len(_amounts(central)) == 1


def test_a_given_split_brings_its_number_of_clients(tmp_path: Path) -> None:
    from fedsim.data.dataset import load_dataset
    from fedsim.data.splits import make_split, save_split

    path = write_tiny_dataset(tmp_path / "tiny")
    save_split(make_split(load_dataset(path), "relation", 4, seed=0), tmp_path / "four.safetensors")
    data = {"path": str(path), "split": "given", "split_file": str(tmp_path / "four.safetensors")}
    config = make_config({"data": data, "runtime": {"placement": "dedicated"}})
    assert len(_amounts(config)) == 5


def test_a_trial_that_asks_for_more_than_there_is_gets_one_message() -> None:
    nodes = [NodeResources(2.0, 0.0, 8 * GB)]
    check_room("trial-00000", reserve(_config(placement="dedicated", cpus_per_actor=0.33), None), nodes)
    with pytest.raises(RunError) as err:
        check_room("trial-00003 (data.num_clients=5)", reserve(_config(placement="dedicated"), None), nodes)
    assert str(err.value).startswith(
        "trial-00003 (data.num_clients=5) needs 3 CPU (5 client actors on 0.5 CPU each and the server on 0.5 CPU), "
        "but the cluster has 2 CPU and 0 GPU; lower --concurrent"
    )


def test_pieces_must_fit_nodes_and_gpus_one_by_one() -> None:
    two_small = [NodeResources(1.0, 0.0, 8 * GB), NodeResources(1.0, 0.0, 8 * GB)]
    wide = reserve(_config(num_actors=1, cpus_per_actor=1.5), None)
    with pytest.raises(RunError, match="but the cluster has 2 CPU and 0 GPU; lower"):
        check_room("trial", wide, two_small)
    thirds = reserve(_config(num_actors=3, gpus_per_client=0.6, cpus_per_actor=0.1), None)
    with pytest.raises(RunError, match=r"1\.8 GPU .* but the cluster has 4 CPU and 2 GPU in pieces too small for it"):
        check_room("trial", thirds, [NodeResources(4.0, 2.0, 8 * GB)])
    check_room("trial", thirds, [NodeResources(4.0, 3.0, 8 * GB)])


def test_memory_bounds_a_trial_and_how_many_there_are_at_a_time() -> None:
    small = reserve(_config(num_actors=1), None)  # leader, client actor and server: 0.75 GB
    with pytest.raises(RunError, match=r"needs about 0\.8 GB of memory \(3 processes\), but the cluster has 0\.5 GB"):
        check_room("trial", small, [NodeResources(8.0, 0.0, 0.5 * GB)])
    assert most_at_a_time([small], [NodeResources(64.0, 0.0, 4 * GB)]) == 5


def test_clients_are_dealt_to_the_reserved_actors() -> None:
    work = {(number,): 1.0 for number in range(5)}
    plan = plan_reserved(RuntimeConfig(), work, 2, with_server=True)
    assert sorted(len(group) for group in plan.groups) == [2, 3]
    assert len(plan_reserved(RuntimeConfig(), work, 9, with_server=True).groups) == 5


def test_only_a_group_made_for_the_federation_counts_as_its_own() -> None:
    bundles = federation_bundles(RuntimeConfig(), 2, with_server=True)
    assert _alike([{"CPU": 0.50004}, {"CPU": 0.5}, {"CPU": 0.5}], bundles)
    assert not _alike([{"CPU": 0.5}, {"CPU": 0.5}], bundles)
    assert not _alike([{"CPU": 0.5}, {"CPU": 0.5}, {"CPU": 0.5, "GPU": 1.0}], bundles)


@pytest.mark.usefixtures("ray_cluster")
def test_a_federation_stays_in_the_group_reserved_for_it() -> None:
    def bundles_of_actors() -> tuple[str, list[int]]:  # of two clients and the server, and why
        share = take_share(RuntimeConfig(), {(0,): 1.0, (1,): 1.0}, with_server=True)
        places = [share.of_client_actor(0), share.of_client_actor(1), share.of_server()]
        return share.plan.lines[1], [getattr(place, "placement_group_bundle_index", -1) for place in places]

    group = ray.util.placement_group(federation_bundles(RuntimeConfig(), 2, with_server=True))
    inside = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    ask = ray.remote(num_cpus=0)(bundles_of_actors)
    assert ray.get(ask.options(scheduling_strategy=inside).remote()) == (
        "placement auto: in the placement group reserved for it",
        [0, 1, 2],
    )
    ray.util.remove_placement_group(group)
    why, places = ray.get(ask.remote())
    assert "the cluster has room for all 2" in why
    assert places == [-1, -1, -1]
