"""The job of `transe_job.py` on Ray, written by hand: actors, one `ray.put` per round, `ray.wait`, a streaming sum.

python benchmarks/ray_job.py '{"triples": "job.npy", ...}'
"""

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from transe_job import Job, Mean, State, end_round, initial_state, read_job, train_client, train_own_rows

Arrays = dict[str, npt.NDArray[np.generic]]


class _Worker:
    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.num_threads)
        self.job = job

    def train(self, client: int, arrays: Arrays) -> Arrays:
        state = {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}
        if self.job.own_rows:
            ids, update = train_own_rows(self.job, client, state)
            return {"ids": ids.numpy(), **_arrays(update)}
        return _arrays(train_client(self.job, client, state))


def run_round(job: Job, workers: list[Any], state: State) -> State:
    """Train all clients, two calls in flight per worker, and average what comes as it comes."""
    model = ray.put(_arrays(state))
    mean = Mean(job, state)
    clients = iter(range(job.num_clients))
    running: dict[Any, Any] = {}

    def submit(worker: Any) -> None:
        client = next(clients, None)
        if client is not None:
            running[worker.train.remote(client, model)] = worker

    for worker in workers * 2:
        submit(worker)
    while running:
        (ready,), _ = ray.wait(list(running), num_returns=1)
        submit(running.pop(ready))
        update = {name: torch.from_numpy(value.copy()) for name, value in ray.get(ready).items()}
        if job.own_rows:
            mean.add_rows(update.pop("ids"), update)
        else:
            mean.add(update)
    return mean.result()


Worker = ray.remote(num_cpus=1)(_Worker)


def _arrays(state: State) -> Arrays:
    return {name: value.numpy() for name, value in state.items()}


def main() -> None:
    """Run the rounds."""
    job = read_job()
    ray.init(
        address="local",
        num_cpus=job.num_workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    workers = [Worker.remote(job) for _ in range(job.num_workers)]
    state = initial_state(job)
    for round_num in range(1, job.num_rounds + 1):
        state = run_round(job, workers, state)
        end_round(round_num, job)
    ray.shutdown()


if __name__ == "__main__":
    main()
