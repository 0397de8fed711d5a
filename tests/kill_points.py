"""A program whose runs kill themselves: one run per point of round 2, each in a process of its own.

Usage: ``python kill_points.py DATASET FOLDER``; writes ``FOLDER/<point>`` per run and prints how each process ended.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import fedsim.federated.mmfed3
import fedsim.federated.runtime
import fedsim.federated.server_distillation
from fedsim import simulation
from fedsim.checkpoint import clients_file
from fedsim.federated.server import Server
from runs import SMALL, small_config

NUM_CLIENTS = 3
STEPS = SMALL["distillation.server_steps"]


def _kill(number: int, *, before: bool) -> Callable[[Any], Callable[..., Any]]:
    """Make a wrapper that ends this process before or after the call of that number."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        calls: list[int] = []

        def watched(*args: Any, **options: Any) -> Any:
            calls.append(1)
            if before and len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **options)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return watched

    return wrap


def _half_written(original: Callable[..., Any]) -> Callable[..., Any]:
    """End this process when half of the second client's file of the second checkpoint is written."""
    calls: list[int] = []

    def watched(states: Any, folder: Path) -> None:
        original(states, folder)
        calls.append(1)
        if len(calls) == NUM_CLIENTS + 2:
            path = clients_file(folder, states)
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    return watched


POINTS: dict[str, tuple[Any, str, Callable[[Any], Callable[..., Any]]]] = {
    # Each round opens once, and once more for the first model.
    "before the broadcast": (Server, "begin_round", _kill(3, before=True)),
    "in mid-collection": (Server, "receive", _kill(NUM_CLIENTS + 2, before=False)),
    "after the aggregation": (fedsim.federated.mmfed3, "distil_global_model", _kill(2, before=True)),
    "during the distillation": (fedsim.federated.server_distillation, "adam", _kill(STEPS + 1, before=False)),
    "during the checkpoint": (fedsim.federated.runtime, "save_clients", _half_written),
}


def main(dataset: Path, folder: Path) -> None:
    """Run to each point, one after the other."""
    torch.set_num_threads(1)
    ended = {}
    for point, (owner, name, wrap) in POINTS.items():
        child = os.fork()
        if child == 0:
            with mock.patch.object(owner, name, wrap(getattr(owner, name))):
                simulation.run(small_config(dataset, folder / point))
            os._exit(0)
        ended[point] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(ended))  # noqa: T201 (a program)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
