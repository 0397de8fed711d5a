"""Exact, order-independent sums (method.md eq. 3 and 11).

Float addition is not associative, so a sum would depend on who arrives first. Values are encoded as int64 fixed
point with 40 fractional bits; integer addition is exact, so any order of arrival and any partial sums give the same
bits. Secure aggregation needs this encoding too.
"""

import torch
from torch import Tensor

from fedsim.errors import RunError

FRACTION_BITS = 40
_SCALE = float(1 << FRACTION_BITS)
_LIMIT = float(1 << 12)  # |value| below 4096 leaves room for 2,048 summands in 63 bits


def encode(values: Tensor, name: str) -> Tensor:
    """Encode floats as int64 fixed point; see `check_range`."""
    check_range(values, name)
    return (values.double() * _SCALE).round().to(torch.int64)


def check_range(values: Tensor, name: str) -> None:
    """Raise RunError if a value is not finite or too large to be summed exactly."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not largest < _LIMIT:
        raise RunError(
            f"'{name}' holds {largest}, beyond what can be summed ({_LIMIT:.0f}); lower training.learning_rate"
        )


def decode(total: Tensor, weight: Tensor) -> Tensor:
    """Turn a fixed-point sum and its weight (a count, or a fixed-point sum of weights) into a float32 mean."""
    return (total.double() / weight.double()).float()


class RowMean:
    """Running mean of rows over the clients that sent them: G[e] of eq. 3, Z_m[e] of eq. 11.

    Args:
        num_rows: rows of the table.
        dim: width of a row.
    """

    def __init__(self, num_rows: int, dim: int) -> None:
        self.total = torch.zeros(num_rows, dim, dtype=torch.int64)
        self.counts = torch.zeros(num_rows, dtype=torch.int64)

    def add(self, rows: Tensor, values: Tensor, name: str) -> None:
        """Add values [n, dim] at distinct rows, int64 [n]."""
        self.total[rows] += encode(values, name)
        self.counts[rows] += 1

    def result(self, previous: Tensor) -> Tensor:
        """Return the mean where anything was added and `previous` elsewhere, [num_rows, dim]."""
        present = self.counts > 0
        mean = previous.clone()
        mean[present] = decode(self.total[present], self.counts[present].unsqueeze(1) * _SCALE)
        return mean


class ModuleMean:
    """Running mean of the shared modules, weighted by training triples (eq. 3)."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.weight = torch.zeros((), dtype=torch.int64)

    def add(self, modules: dict[str, Tensor], share: float) -> None:
        """Add one client's modules, weighted by its share (0..1) of all clients' training triples."""
        weight = torch.tensor(share, dtype=torch.float64)
        for name, value in modules.items():
            encoded = encode(value.double() * weight, name)
            self.totals[name] = self.totals[name] + encoded if name in self.totals else encoded
        self.weight += (weight * _SCALE).round().to(torch.int64)

    def result(self, previous: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weighted means, or `previous` if nothing was added."""
        return {name: decode(total, self.weight) for name, total in self.totals.items()} or previous
