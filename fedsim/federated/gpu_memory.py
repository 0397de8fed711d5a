"""A batch of clients that does not fit into the memory of a GPU is done in parts.

Parts are other stacked computations than the whole: their results differ from it in the last digits, which is why
whoever runs a batch says so.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fedsim.errors import RunError
from fedsim.federated.client import Client
from fedsim.models.parameters import Params

T = TypeVar("T")


class PartSize:
    """How many clients of a batch a GPU takes at once; learnt from running out of memory, and then kept.

    Attributes:
        most: clients at once; None as long as all of a batch fit.
    """

    def __init__(self) -> None:
        self.most: int | None = None

    def run(self, clients: Sequence[Client], what: str, work: Callable[[Sequence[Client]], list[T]]) -> list[T]:
        """Do the work of a batch, in halves (of halves) if the memory of the GPU asks for it.

        Args:
            clients: of the batch.
            what: the work in words, for the error.
            work: a result per client; it may leave the clients changed when it runs out of memory.

        Raises:
            RunError: if a single client does not fit.
        """
        results: list[T] = []
        while len(results) < len(clients):
            part = clients[len(results) :][: self.most]
            can_retry = len(part) > 1 and part[0].device.type == "cuda"
            before = [_copy(client.state()) for client in part] if can_retry else []
            try:
                results += work(part)
                continue
            except torch.OutOfMemoryError as err:
                if len(part) == 1:
                    who = f"client {part[0].data.client}"
                    raise RunError(
                        f"{who}: {what} does not fit into its share of the GPU ({' '.join(str(err).split())}); raise "
                        f"runtime.gpus_per_client, or lower training.batch_size"
                    ) from err
            # Outside the handler, whose traceback keeps the tensors of the failed attempt alive.
            torch.cuda.empty_cache()
            for client, state in zip(part, before, strict=True):
                client.load_state(state)
            self.most = (len(part) + 1) // 2
        return results


def _copy(state: Params) -> Params:
    return {name: value.clone() for name, value in state.items()}
