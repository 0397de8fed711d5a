"""A server that mixes each client's rows anew from those of clients like it, in the style of PFedEG.

Source: Zhang et al., "Personalized Federated Knowledge Graph Embedding with Client-Wise Relation Graph",
arXiv 2406.11943, of which we know the abstract: a client's supplementary knowledge joins the embeddings of its
neighbours by their affinity on a graph of clients. The formulas are our inference (method.md section 6): with c_ij the
mean cosine of the rows of clients i and j over the entities that both hold,

    w_ij = softmax_j(c_ij / t),    row e for client i = sum_j w_ij E_j[e] / sum_j w_ij,    j over the owners of e.

A client is its own nearest neighbour, c_ii = 1. The rows of a client are those of its last round; a client that has
never sent any is sent the mean (eq. 3). Modules are averaged as in MMFedE. Clients train as in FedE: the paper's
regulariser towards the supplementary knowledge is left out.

The server keeps every client's rows, so that **its memory and its message grow with the number of clients**: twice
4 dim bytes per client and entity, and a round costs it (number of clients) x (all clients' rows) x dim operations.

Symbols: E_j `rows[j]`, c_ij `affinity`, w_ij `weights`, t `federation.affinity_temperature`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from fedsim.federated.fede import FedE


class PFedEG(FedE):
    """FedE with a table of its own for each client."""

    keeps_rows = True

    def personal_rows(self, ownership: Mapping[int, Tensor], rows: Mapping[int, Tensor]) -> dict[int, Tensor] | None:
        """Mix every client's rows; None before anybody has sent any."""
        return mix_rows(ownership, rows, self.config.federation.affinity_temperature) if rows else None


def mix_rows(ownership: Mapping[int, Tensor], rows: Mapping[int, Tensor], temperature: float) -> dict[int, Tensor]:
    """Mix each client's rows from those of all clients by their affinity, in the order of client ids.

    Args:
        ownership: client -> global ids of its rows, sorted, int64 [num_entities].
        rows: client -> its rows, [num_entities, dim].
        temperature: t; small keeps to the most alike, large is the mean.

    Returns:
        client -> its mixture, [num_entities, dim].
    """
    clients = sorted(rows)
    ids = torch.cat([ownership[client] for client in clients])  # [num_rows], of all clients one after the other
    owners = torch.arange(len(clients)).repeat_interleave(torch.tensor([len(rows[client]) for client in clients]))
    values = torch.cat([rows[client] for client in clients])
    units = functional.normalize(values, dim=1)
    place = torch.full((int(ids.max()) + 1,), -1)
    mixed = {}
    for index, client in enumerate(clients):
        place.fill_(-1)
        place[ownership[client]] = torch.arange(len(ownership[client]))
        shared = (place[ids] >= 0).nonzero().flatten()
        own, other = place[ids[shared]], owners[shared]
        cosine = (units[owners == index][own] * units[shared]).sum(1).double()
        count = torch.zeros(len(clients), dtype=torch.float64).index_add_(0, other, torch.ones_like(cosine))
        affinity = torch.zeros_like(count).index_add_(0, other, cosine) / count.clamp(min=1)
        # Those without a common row are owners of none here, and a common factor of all weights cancels.
        weights = ((affinity - 1) / temperature).exp()[other]
        total = torch.zeros(rows[client].shape, dtype=torch.float64)
        total.index_add_(0, own, values[shared].double() * weights.unsqueeze(1))
        norm = torch.zeros(len(total), dtype=torch.float64).index_add_(0, own, weights)
        mixed[client] = (total / norm.unsqueeze(1)).float()
    return mixed
