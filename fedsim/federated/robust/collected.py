"""Rows and modules of single updates, kept until the round ends and then combined (method.md section 5).

They stand where `RowMean` and `ModuleMean` stand with the plain mean. What was sent is kept, so that **memory grows
with the cohort**. Whoever adds does so in the order of client ids; then the result has the same bits whatever the order
of arrival was.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.federated.robust.base import Aggregator, combine
from fedsim.models.parameters import Params

_CHUNK_VALUES = 1 << 20  # combined at once; distances between senders take a little more


class CollectedRows:
    """The rows of a table over the clients that sent them.

    Args:
        aggregator: combines the rows of one entity.
        num_rows: rows of the table.
    """

    def __init__(self, aggregator: Aggregator, num_rows: int) -> None:
        self.aggregator = aggregator
        self.counts = torch.zeros(num_rows, dtype=torch.int64)
        self._ids: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Add one client's values [n, dim] at distinct rows, int64 [n]."""
        self._ids.append(rows)
        self._values.append(values)
        self.counts[rows] += 1

    def result(self, previous: Tensor) -> Tensor:
        """Return the combined rows where anything was added and `previous` elsewhere, [num_rows, dim]."""
        combined = previous.clone()
        if not self._ids:
            return combined
        values = torch.cat(self._values)
        order = torch.cat(self._ids).argsort(stable=True)  # entity by entity, its senders in the order of adding
        starts = self.counts.cumsum(0) - self.counts
        for num_senders in self.counts.unique().tolist():
            if num_senders == 0:
                continue
            rows = (self.counts == num_senders).nonzero().flatten()
            weights = torch.ones(num_senders, dtype=torch.float64)
            for part in rows.split(max(_CHUNK_VALUES // (num_senders * max(previous.shape[1], num_senders)), 1)):
                places = starts[part].unsqueeze(1) + torch.arange(num_senders)
                sent = values[order[places]].double()  # [num_rows, num_senders, dim]
                combined[part] = combine(self.aggregator, sent, previous[part].double(), weights).float()
        return combined


class CollectedModules:
    """The shared modules of all clients, each client's as one vector.

    Args:
        aggregator: combines the vectors.
    """

    def __init__(self, aggregator: Aggregator) -> None:
        self.aggregator = aggregator
        self._vectors: list[Tensor] = []
        self._weights: list[float] = []

    def add(self, modules: Mapping[str, Tensor], share: float) -> None:
        """Add one client's modules, with its share (0..1) of all training triples."""
        self._vectors.append(_flatten(modules))
        self._weights.append(share)

    def result(self, previous: Params) -> Params:
        """Return the combined modules, or `previous` if nothing was added."""
        if not self._vectors or not previous:
            return previous
        sent = torch.stack(self._vectors).unsqueeze(0)  # [1, num_senders, num_parameters]
        weights = torch.tensor(self._weights, dtype=torch.float64)
        flat = combine(self.aggregator, sent, _flatten(previous).unsqueeze(0), weights)[0].float()
        combined, start = {}, 0
        for name in sorted(previous):
            size = previous[name].numel()
            combined[name] = flat[start : start + size].view_as(previous[name]).clone()
            start += size
        return {name: combined[name] for name in previous}


def _flatten(modules: Mapping[str, Tensor]) -> Tensor:
    """Write modules as one vector, float64, in the order of their names."""
    return torch.cat([modules[name].flatten() for name in sorted(modules)]).double() if modules else torch.zeros(0)
