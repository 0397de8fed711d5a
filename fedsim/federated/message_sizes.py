"""The sizes of messages before there are any, for the virtual clock of `fedsim.federated.participation`."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.data.clients import ClientData
from fedsim.federated.compression import num_rows_sent
from fedsim.federated.messages import Broadcast, ClientUpdate, PrototypeTable, SoftQueries, message_bytes
from fedsim.federated.strategy import Strategy
from fedsim.models.client_model import ClientModel


class MessageSizes:
    """Predicts what clients send and are sent.

    Args:
        config: the experiment.
        strategy: says what is sent.
        feature_dims: modality -> width of its features.
    """

    def __init__(self, config: Config, strategy: Strategy, feature_dims: Mapping[str, int]) -> None:
        self.config, self.strategy = config, strategy
        self.model = ClientModel(config, feature_dims)
        self.dtype = torch.float16 if config.communication.dtype == "float16" else torch.float32
        drawn = self.model.init_modules(torch.Generator())
        self.width = strategy.init_rows(self.model, 1, torch.Generator()).shape[1]
        self.modules = {name: self._floats(*value.shape) for name, value in drawn.items()}

    def per_round(self, data: ClientData) -> npt.NDArray[np.int64]:
        """Return the bytes of a client's messages in each round, up and down together, int64 [num_rounds].

        Exact where all rows are sent; with `communication.top_k` the tokens of the rows sent are taken to be as
        frequent as those of all rows. The server has prototypes from round 2 on.
        """
        num_rounds = self.config.federation.num_rounds
        found = np.zeros(num_rounds, dtype=np.int64)
        if not self.strategy.federated:
            return found
        known: dict[tuple[int | None, bool], int] = {}
        for round_num in range(1, num_rounds + 1):
            num_shared = len(self.strategy.shared_ids(data))
            key = (num_rows_sent(self.config.communication, round_num, num_shared), round_num > 1)
            if key not in known:
                known[key] = self._both_ways(data, *key)
            found[round_num - 1] = known[key]
        return found

    def _both_ways(self, data: ClientData, num_rows: int | None, has_prototypes: bool) -> int:
        """Measure messages of the right shapes; their tensors hold no memory."""
        model, num_entities, num_modalities = self.model, len(data.entity_ids), self.model.num_tokens - 1
        rows = None if num_rows is None else _integers(num_rows)
        num_rows = len(self.strategy.shared_ids(data)) if num_rows is None else num_rows
        entity = self._floats(num_rows, self.width)
        prototypes = present = tokens = soft = None
        if self.strategy.sends_prototypes and model.imputes:
            if has_prototypes:
                counts = _integers(num_modalities, num_rows)
                prototypes = PrototypeTable(self._floats(num_modalities, num_rows, model.dim), counts, counts)
            present = torch.empty(num_modalities, num_rows, dtype=torch.bool, device="meta")
            num_tokens = sum(int(data.features[name].visible.sum()) for name in model.feature_dims)
            tokens = self._floats(round(num_tokens * num_rows / num_entities), model.dim)
        if self.strategy.sends_soft_queries:
            num_queries = self.config.distillation.num_soft_queries
            width = min(self.config.distillation.num_candidates, num_entities)
            queries = self._floats(model.num_parts, num_queries, model.dim)
            soft = SoftQueries(queries, _integers(num_queries, width), self._floats(num_queries, width))
        down = Broadcast(0, entity, self.modules, prototypes, rows)
        up = ClientUpdate(data.client, 0, 0, _integers(num_rows), entity, self.modules, present, tokens, soft)
        return message_bytes(down) + message_bytes(up)

    def _floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")


def _integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")
