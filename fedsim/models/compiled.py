"""Distances by a small C program, `distances.c`, instead of torch's operators (`training.compile`).

Torch has no operator for sums of absolute or complex differences with both gradients, and composed of operators each
pass writes and reads the differences several times. In C they stay in registers.

Each process compiles for its own machine and loads the result from a private folder, which it removes at once: nothing
that another user or program could have left is ever loaded. The functions run on one thread.
"""

import ctypes
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedsim.errors import ConfigError
from fedsim.models.kernels import L1, MODULI, Distances, Norm, flatten_tables

SOURCE = Path(__file__).with_name("distances.c")
# No -ffast-math: sums keep the order that the source gives them, on every machine.
OPTIONS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_LIMIT_SECONDS = 120
_NORMS = {L1: 0, MODULI: 1}  # the enum of distances.c
_POINTER, _COUNT, _NORM = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {
    "fedsim_measure_all": [_POINTER] * 3 + [_COUNT] * 4 + [_NORM],
    "fedsim_slope_all": [_POINTER] * 5 + [_COUNT] * 4 + [_NORM],
    "fedsim_measure_rows": [_POINTER] * 4 + [_COUNT] * 3 + [_NORM],
    "fedsim_slope_rows": [_POINTER] * 6 + [_COUNT] * 3 + [_NORM],
}


@cache
def load_library() -> ctypes.CDLL:
    """Compile the functions, half a second, and load them; once per process.

    Raises:
        ConfigError: if there is no C compiler, or what it makes cannot be loaded.
    """
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    with tempfile.TemporaryDirectory(prefix="fedsim-") as folder:
        target = Path(folder) / "distances.so"
        try:
            done = subprocess.run(
                [*command, *OPTIONS, str(SOURCE), "-o", str(target), "-lm"],
                capture_output=True,
                text=True,
                timeout=_LIMIT_SECONDS,
                check=False,
            )
        except OSError as err:
            raise _refusal(f"needs a C compiler, and '{command[0]}' cannot be run ({err.strerror})") from err
        except subprocess.TimeoutExpired as err:
            raise _refusal(f"needs a C compiler, and '{command[0]}' took over {_LIMIT_SECONDS} seconds") from err
        if done.returncode:
            raise _refusal(f"needs a C compiler, and '{command[0]}' failed: {_first_error(done.stderr)}")
        try:
            library = ctypes.CDLL(str(target))
        except OSError as err:
            raise _refusal(
                f"cannot load what '{command[0]}' compiled in {folder} (TMPDIR chooses where): {err}"
            ) from err
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def distance(query: Tensor, candidates: Tensor, norm: Norm) -> Tensor:
    """Measure the distances of all pairs: [..., batch, dim], [..., num, dim] -> [..., batch, num]."""
    stacked = [value.reshape(-1, *value.shape[-2:]) for value in (query, candidates)]
    distances: Tensor = _Distance.apply(*stacked, _NORMS[norm])  # type: ignore[no-untyped-call]
    return distances.view(*query.shape[:-1], candidates.shape[-2])


def distance_rows(query: Tensor, table: Tensor, ids: Tensor, norm: Norm) -> Tensor:
    """Measure each query's distance to its own rows of the table; shapes as in `fedsim.models.kernels.dot_rows`."""
    distances: Tensor = _DistanceRows.apply(*flatten_tables(query, table, ids), _NORMS[norm])  # type: ignore[no-untyped-call]
    return distances.view(ids.shape)


COMPILED = Distances(distance, distance_rows)
"""Takes float32 on CPUs alone."""


class _Distance(torch.autograd.Function):
    """Distances of all pairs."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, candidates: Tensor, norm: int) -> Tensor:
        """Compute the distances: [num_tables, batch, dim], [num_tables, num, dim] -> [num_tables, batch, num]."""
        query, candidates = query.contiguous(), candidates.contiguous()
        assert query.shape[::2] == candidates.shape[::2]
        ctx.save_for_backward(query, candidates)
        ctx.norm = norm
        distances = query.new_empty(*query.shape[:2], candidates.shape[1])
        sizes = (*distances.shape, query.shape[2])
        load_library().fedsim_measure_all(*_addresses(query, candidates, distances), *sizes, norm)
        return distances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Compute the gradients of the query and of the candidates, shapes as theirs."""
        query, candidates = ctx.saved_tensors
        grad, grads = grad.contiguous(), (torch.zeros_like(query), torch.zeros_like(candidates))
        sizes = (*grad.shape, query.shape[2])
        load_library().fedsim_slope_all(*_addresses(query, candidates, grad, *grads), *sizes, ctx.norm)
        return *grads, None


class _DistanceRows(torch.autograd.Function):
    """Distances of each query to its own rows, in the order of the queries."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, table: Tensor, ids: Tensor, norm: int) -> Tensor:
        """Compute the distances, [num_queries, num]."""
        query, table = query.contiguous(), table.contiguous()
        assert query.shape[1] == table.shape[1]
        assert len(query) == len(ids)
        assert ids.dtype == torch.int64
        if ids.numel():
            least, most = (int(end) for end in ids.aminmax())
            if least < 0 or most >= len(table):  # C would read and write whatever lies there
                raise IndexError(f"rows {least} to {most} of a table that has {len(table)}")
        ctx.save_for_backward(query, table, ids)
        ctx.norm = norm
        distances = query.new_empty(ids.shape)
        pointers = *_addresses(query, table), ids.data_ptr(), *_addresses(distances)
        load_library().fedsim_measure_rows(*pointers, *ids.shape, query.shape[1], norm)
        return distances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Compute the gradients of the query, [num_queries, dim], and of the table, [num_rows, dim]."""
        query, table, ids = ctx.saved_tensors
        grad, grads = grad.contiguous(), (torch.zeros_like(query), torch.zeros_like(table))
        pointers = *_addresses(query, table), ids.data_ptr(), *_addresses(grad, *grads)
        load_library().fedsim_slope_rows(*pointers, *ids.shape, query.shape[1], ctx.norm)
        return *grads, None, None


def _addresses(*values: Tensor) -> list[int]:
    """Return where the numbers of contiguous tensors lie."""
    assert all(value.dtype == torch.float32 and value.device.type == "cpu" for value in values)
    return [value.data_ptr() for value in values]


def _refusal(cause: str) -> ConfigError:
    return ConfigError(
        f"config field 'training.compile' = true {cause}; install a compiler (Debian and Ubuntu: apt-get install gcc "
        "libc6-dev), name one in the environment variable CC, or set the field to false"
    )


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "it says nothing")
