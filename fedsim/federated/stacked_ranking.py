"""Ranking of clients as one stacked computation (method.md section 7); one by one, `Client.evaluate` does it."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedsim.errors import RunError
from fedsim.evaluation.ranking import FilterIndex, RankingMetrics, filtered_ranks, summarise
from fedsim.federated.client import Client
from fedsim.federated.reports import ClientEvaluation
from fedsim.models.client_model import ClientModel
from fedsim.models.client_stack import ClientStack
from fedsim.models.imputers import Imputation
from fedsim.models.stacking import pad_stack

Metrics = dict[float | None, list[RankingMetrics]]


def evaluate_together(
    clients: Sequence[Client], split: str, round_num: int, choose: bool
) -> list[list[ClientEvaluation]]:
    """Rank the triples of a split at each client; results as of `Client.evaluate`, in the order of `clients`.

    Args:
        clients: members of one batch, whose missing tokens are filled.
        split: "valid" or "test".
        round_num: seeds the imputation's draws.
        choose: choose the combination of views on this split.
    """
    if len(clients) > 1 and all(len(client.data.groups) == 1 for client in clients):
        tried = _rank(clients, split, round_num, [client.options(split, choose) for client in clients])
        return [client.settle(metrics, choose) for client, metrics in zip(clients, tried, strict=True)]
    return [client.evaluate(split, round_num, choose=choose) for client in clients]


def _rank(
    clients: Sequence[Client], split: str, round_num: int, options: Sequence[tuple[float | None, ...]]
) -> list[Metrics]:
    """Rank by each client's combinations of views; clients with fewer of them repeat their last."""
    config = clients[0].config.evaluation
    both_sides = config.protocol == "both"
    num_options = max(map(len, options))
    weights = [[own[min(option, len(own) - 1)] for own in options] for option in range(num_options)]
    ranks: list[list[list[Tensor]]] = [[[] for _ in clients] for _ in range(num_options)]
    with torch.no_grad():
        batch = _StackedTables(clients, round_num)
        triples = [torch.from_numpy(client.data.groups[0].triples[split].copy()) for client in clients]
        filters = [client.filter_index(client.data.groups[0]) for client in clients]
        width = max(config.batch_size // len(clients), 1)
        for inverse in (False, True) if both_sides else (False,):
            for start in range(0, max(map(len, triples)), width):
                rows = [own[start : start + width] for own in triples]
                try:
                    _rank_rows(batch, rows, filters, inverse, weights, ranks)
                except _NotFiniteError as err:
                    name = clients[err.place].data.client
                    raise RunError(f"client {name}, round {round_num}, {split}: {err}") from err
    ks = (1, 3, 10) if both_sides else (1, 5, 10)
    none = torch.empty(0, dtype=torch.float64)
    return [
        {
            weight: [summarise(torch.cat([none, *ranks[option][place]]), ks)]
            for option, weight in enumerate(options[place])
        }
        for place in range(len(clients))
    ]


class _NotFiniteError(RunError):
    """A client's scores are not finite; `place` is its place in the stack."""

    def __init__(self, place: int, message: str) -> None:
        super().__init__(message)
        self.place = place


class _StackedTables:
    """What the clients of a stack score with: their embeddings under each view, and their relations."""

    def __init__(self, clients: Sequence[Client], round_num: int) -> None:
        self.stack = ClientStack(clients[0].model, [client.member(round_num).without_training() for client in clients])
        self.tables = {
            view: self.stack.embed(view, self._imputations([client.imputation(view, round_num) for client in clients]))
            for view in clients[0].strategy.views
        }

    @property
    def model(self) -> ClientModel:
        """Return the model's functions."""
        return self.stack.model

    def _imputations(self, imputations: Sequence[Imputation | None]) -> Imputation | None:
        """Stack the clients' imputations, padded as their tables are."""
        found = [item for item in imputations if item is not None]
        if not found:
            return None
        assert self.stack.shape is not None, "several clients are stacked"
        num_tokens, _, dim = found[0].values.shape
        return Imputation(
            pad_stack([item.values for item in found], (num_tokens, self.stack.shape.num_rows, dim)),
            pad_stack([item.uncertainty for item in found], (num_tokens, self.stack.shape.num_rows)),
        )

    def scores(
        self, entity: Tensor, relation: Tensor, inverse: bool, weights: Sequence[Sequence[float | None]]
    ) -> Iterator[Tensor]:
        """Score all entities by each option, int64 [clients, batch] twice -> [clients, batch, num_rows] in turn.

        Padded entities score below all others.
        """
        relations = self.stack.values.params["relation"]
        scored: dict[str, Tensor] = {}
        for view, table in self.tables.items():
            if _is_used(view, weights):
                queries = self.model.queries(table, relations, entity, relation, inverse=inverse)
                scored[view] = self.stack.mask(self.model.scores(queries, table))
        for own in weights:
            yield _mix(scored, own)


def _is_used(view: str, weights: Sequence[Sequence[float | None]]) -> bool:
    """Whether a client gives a view any weight."""
    unused = 0.0 if view == "global" else 1.0
    return any(weight != unused for own in weights for weight in own)


def _mix(scored: Mapping[str, Tensor], weights: Sequence[float | None]) -> Tensor:
    """Add up weight * global copy + (1 - weight) * private model, with each client's own weight."""
    if len(scored) == 1:
        return next(iter(scored.values()))
    share = torch.tensor(weights, dtype=scored["local"].dtype, device=scored["local"].device).view(-1, 1, 1)
    return torch.mul(scored["local"], 1 - share).addcmul_(scored["global"], share)


def _rank_rows(
    batch: _StackedTables,
    triples: Sequence[Tensor],
    filters: Sequence[FilterIndex],
    inverse: bool,
    weights: Sequence[Sequence[float | None]],
    ranks: Sequence[Sequence[list[Tensor]]],
) -> None:
    """Rank some triples of each client, int64 [num, 3], and append the ranks by option and client."""
    device = batch.stack.device
    head, relation, tail = pad_stack(triples).unbind(-1)  # [clients, width]
    entity, target = (tail, head) if inverse else (head, tail)
    width = entity.shape[1]
    rows, answers = [], []
    for place, (index, own) in enumerate(zip(filters, triples, strict=True)):
        row, answer = index.known(own[:, 2 if inverse else 0], own[:, 1], inverse)
        rows.append(row + place * width)
        answers.append(answer)
    known = torch.cat(rows).to(device), torch.cat(answers).to(device)
    asked = entity.to(device), relation.to(device)
    for scores, by_client in zip(batch.scores(*asked, inverse, weights), ranks, strict=True):
        try:
            found = filtered_ranks(scores.flatten(0, 1), target.flatten().to(device), *known).cpu().view(-1, width)
        except RunError as err:
            place = int((~scores.isfinite()).flatten(1).any(1).nonzero()[0])
            raise _NotFiniteError(place, str(err)) from err
        for ranked, own, all_of_them in zip(found, triples, by_client, strict=True):
            all_of_them.append(ranked[: len(own)])
