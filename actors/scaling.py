"""A cluster that scales: ask for the nodes that a run needs, and wait until they are there."""

import logging
import math
import time
from collections.abc import Sequence

from ray.autoscaler.sdk import request_resources

from actors.cluster import cluster_resources
from actors.placement import EPSILON, NodeResources
from actors.reservation import federation_bundles
from fedsim.config import RuntimeConfig
from fedsim.errors import RunError

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0


def await_nodes(config: RuntimeConfig) -> None:
    """Wait for a cluster to have room for `num_actors` client actors, if the config says how long.

    What is asked for is taken back when the nodes are there: from then on the actors hold them, and a driver that is
    killed later leaves no standing request for machines that cost money.

    Raises:
        RunError: if they do not come in time.
    """
    if config.nodes_wait_seconds == 0:
        return
    assert config.num_actors is not None, "the config asks for it"
    deadline = time.monotonic() + config.nodes_wait_seconds
    asked = False
    try:
        while (room := _room(config, cluster_resources()[0])) < config.num_actors:
            if not asked:
                logger.info("asking the cluster for room for %d client actors; it has %d", config.num_actors, room)
                request_resources(bundles=federation_bundles(config, config.num_actors, with_server=True))
                asked = True
            if time.monotonic() > deadline:
                raise RunError(
                    f"after {config.nodes_wait_seconds:g} seconds (runtime.nodes_wait_seconds) the cluster has room "
                    f"for {room} of {config.num_actors} client actors (runtime.num_actors); see `ray status` for what "
                    f"it waits for, wait longer, or ask for fewer"
                )
            time.sleep(LOOK_SECONDS)
    finally:
        if asked:
            request_resources(bundles=[])


def _room(config: RuntimeConfig, nodes: Sequence[NodeResources]) -> int:
    """Count the client actors that fit on the nodes beside a server, whoever else uses them."""
    room, spare = 0, False
    for node in nodes:
        slots = math.floor(node.cpus / config.cpus_per_actor + EPSILON)
        actors = slots
        if config.gpus_per_client > 0:  # an actor's share lies on one GPU
            actors = min(slots, int(node.gpus + EPSILON) * math.floor(1 / config.gpus_per_client + EPSILON))
        room, spare = room + actors, spare or slots > actors
    return max(room - int(not spare), 0)
