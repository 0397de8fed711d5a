"""The actor that holds clients: it forwards, and adds nothing to what `fedsim` computes."""

import os
import warnings
from pathlib import Path

import ray
import torch
from torch import Tensor

from actors.tensors import share_tensors
from fedsim.checkpoint import client_file, load_tensors, save_tensors
from fedsim.config import Config
from fedsim.data.clients import ClientData
from fedsim.evaluation.consistency import TokenSample, sample_tokens
from fedsim.evaluation.imputation import measure_imputation
from fedsim.federated.client import Client, ClientEvaluation, ClientReport
from fedsim.federated.messages import Broadcast, ClientHello, ClientUpdate
from fedsim.federated.runtime import client_device, make_client
from fedsim.process import settle_process


class _ClientActor:
    """Holds one or more clients and their private data.

    Args:
        name: of the actor.
        config: the experiment.
    """

    def __init__(self, name: str, config: Config) -> None:
        self.name, self.config = name, config
        self.clients: dict[int, Client] = {}
        share_tensors()
        settle_process(config.runtime.torch_threads)
        # Private data is read from Ray's shared memory, and never written.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")

    def __repr__(self) -> str:
        return self.name

    @ray.method
    def start(self) -> tuple[str, int]:
        """Take hold of the device; return the address of the node, and the process id there."""
        if client_device(self.config).type == "cuda":
            # Ray counts shares of a GPU and does not enforce them: without this, one actor can starve the others.
            torch.cuda.set_per_process_memory_fraction(self.config.runtime.gpus_per_client)
        return str(ray.util.get_node_ip_address()), os.getpid()

    @ray.method
    def add_client(self, data: ClientData) -> None:
        """Make a client of its data."""
        self.clients[data.client] = make_client(data, self.config, client_device(self.config))

    @ray.method
    def hello(self, client: int) -> ClientHello:
        """Forward to `Client.hello`."""
        return self.clients[client].hello()

    @ray.method
    def join(self, client: int, broadcast: Broadcast) -> None:
        """Cut out the client's part of the broadcast and forward to `Client.join`."""
        self.clients[client].join(broadcast.for_entities(self.clients[client].entity_ids))

    @ray.method(num_returns=2)
    def train(
        self, client: int, round_num: int, broadcast: Broadcast | None
    ) -> tuple[ClientUpdate | None, ClientReport]:
        """Cut out the client's part of the broadcast and forward to `Client.train`."""
        held = self.clients[client]
        return held.train(round_num, broadcast.for_entities(held.entity_ids) if broadcast is not None else None)

    @ray.method
    def evaluate(self, client: int, split: str, round_num: int, choose: bool) -> list[ClientEvaluation]:
        """Forward to `Client.evaluate`."""
        return self.clients[client].evaluate(split, round_num, choose=choose)

    @ray.method
    def measure(self, client: int, shared: Tensor, round_num: int) -> tuple[dict[str, float], TokenSample]:
        """Measure a client's imputation, and sample its tokens of the shared entities, int64 [num_shared]."""
        held = self.clients[client]
        return measure_imputation(held, round_num), sample_tokens(held, shared, round_num)

    @ray.method
    def save(self, client: int, folder: Path) -> None:
        """Write a client's file of a checkpoint."""
        save_tensors(self.clients[client].state(), client_file(folder, client))

    @ray.method
    def load(self, client: int, folder: Path) -> None:
        """Read a client's file of a checkpoint."""
        self.clients[client].load_state(load_tensors(client_file(folder, client)))


ClientActor = ray.remote(_ClientActor)
