"""The job that the simulators are compared by: TransE on small clients, one local epoch, federated averaging.

The arithmetic that the peers share (Flower, hand-written Ray, the plain loop), written as one writes it with torch:
embeddings of all entities, uniform negatives, the self-adversarial loss of FedE, Adam. It imports nothing of fedsim,
since Flower runs it in a virtual environment of its own. Run as a program, with the job as JSON, it is the plain loop:

    python benchmarks/transe_job.py '{"triples": "job.npy", ...}'
"""

import json
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

State = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """What is run; `triples` is an .npy file, int64 [num_clients, num_triples, 3], entities numbered for all clients.

    With `own_rows` a client trains and sends the rows of its own entities alone, as FedE does; else the whole table.
    `num_epochs` 0 trains nothing: what is left is orchestration.
    """

    triples: str
    num_entities: int = 2000
    num_relations: int = 10
    dim: int = 128
    num_rounds: int = 3
    num_epochs: int = 1
    batch_size: int = 128
    num_negatives: int = 32
    learning_rate: float = 0.001
    margin: float = 10.0
    num_workers: int = 2
    num_threads: int = 1
    own_rows: bool = False

    @property
    def num_clients(self) -> int:
        """Count the clients."""
        return len(load_triples(self.triples))


def read_job() -> Job:
    """Read the job from the command line, and pin torch's threads."""
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.num_threads)
    return job


@cache
def load_triples(path: str) -> npt.NDArray[np.int64]:
    """Map the triples of all clients, [num_clients, num_triples, 3]."""
    triples: npt.NDArray[np.int64] = np.load(path, mmap_mode="r")
    return triples


class TransE(nn.Module):
    """Bordes et al., NeurIPS 2013, with the L1 distance."""

    def __init__(self, num_entities: int, num_relations: int, dim: int) -> None:
        super().__init__()
        self.entity = nn.Embedding(num_entities, dim)
        self.relation = nn.Embedding(num_relations, dim)

    def forward(self, triples: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """Score triples [batch, 3] and their corrupted tails [batch, num_negatives]."""
        head, relation, tail = triples.T
        query = self.entity(head) + self.relation(relation)
        positive = -(query - self.entity(tail)).abs().sum(-1)
        return positive, -(query.unsqueeze(1) - self.entity(negatives)).abs().sum(-1)


def initial_state(job: Job) -> State:
    """Draw the global model."""
    torch.manual_seed(0)
    model = TransE(job.num_entities, job.num_relations, job.dim)
    nn.init.normal_(model.entity.weight, std=0.1)
    nn.init.normal_(model.relation.weight, std=0.1)
    return {name: value.detach() for name, value in model.state_dict().items()}


def train_client(job: Job, client: int, state: State) -> State:
    """Train a client's copy of the model for its local epochs; returns the new values."""
    if job.num_epochs == 0:
        return state
    triples = torch.from_numpy(load_triples(job.triples)[client].copy())
    model = TransE(len(state["entity.weight"]), job.num_relations, job.dim)
    model.load_state_dict(state)
    return _train(job, model, triples)


def train_own_rows(job: Job, client: int, state: State) -> tuple[Tensor, State]:
    """As `train_client`, on the rows of the client's own entities; returns their ids, too."""
    triples = torch.from_numpy(load_triples(job.triples)[client].copy())
    ids, local = triples[:, [0, 2]].unique(return_inverse=True)
    own = {"entity.weight": state["entity.weight"][ids], "relation.weight": state["relation.weight"]}
    if job.num_epochs == 0:
        return ids, own
    model = TransE(len(ids), job.num_relations, job.dim)
    model.load_state_dict(own)
    return ids, _train(job, model, torch.stack([local[:, 0], triples[:, 1], local[:, 1]], 1))


def _train(job: Job, model: TransE, triples: Tensor) -> State:
    optimizer = torch.optim.Adam(model.parameters(), lr=job.learning_rate)
    for _ in range(job.num_epochs):
        for batch in triples[torch.randperm(len(triples))].split(job.batch_size):
            negatives = torch.randint(model.entity.num_embeddings, (len(batch), job.num_negatives))
            positive, negative = model(batch, negatives)
            belief = torch.softmax(negative.detach(), -1)
            negative_loss = (belief * functional.logsigmoid(-job.margin - negative)).sum(-1)
            loss = -(functional.logsigmoid(job.margin + positive) + negative_loss).mean() / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


class Mean:
    """A streaming mean of models; own rows are averaged over the clients that own them."""

    def __init__(self, job: Job, state: State) -> None:
        self.state, self.num_clients = state, job.num_clients
        self.sums = {name: torch.zeros_like(value) for name, value in state.items()}
        self.owners: Tensor | None = None

    def add(self, update: State) -> None:
        """Add a whole model."""
        for name, value in update.items():
            self.sums[name] += value

    def add_rows(self, ids: Tensor, update: State) -> None:
        """Add a model's rows `ids`."""
        if self.owners is None:
            self.owners = torch.zeros(len(self.sums["entity.weight"]))
        self.owners[ids] += 1
        self.sums["entity.weight"][ids] += update["entity.weight"]
        self.sums["relation.weight"] += update["relation.weight"]

    def result(self) -> State:
        """Return the mean."""
        mean = {name: value / self.num_clients for name, value in self.sums.items()}
        if self.owners is not None:
            rows = self.sums["entity.weight"] / self.owners.clamp(min=1).unsqueeze(1)
            mean["entity.weight"] = torch.where(self.owners.unsqueeze(1) > 0, rows, self.state["entity.weight"])
        return mean


def end_round(round_num: int, job: Job, **found: Any) -> None:
    """Say that a round has ended; the benchmark reads the time off this line."""
    print(f"round {round_num}/{job.num_rounds}", *[f"{name} {value}" for name, value in found.items()], flush=True)


def main() -> None:
    """Run the plain loop: one process, one client after the other."""
    job = read_job()
    state = initial_state(job)
    for round_num in range(1, job.num_rounds + 1):
        mean = Mean(job, state)
        for client in range(job.num_clients):
            if job.own_rows:
                mean.add_rows(*train_own_rows(job, client, state))
            else:
                mean.add(train_client(job, client, state))
        state = mean.result()
        end_round(round_num, job)


if __name__ == "__main__":
    main()
