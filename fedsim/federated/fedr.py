"""FedR: relations are federated, entities are private (method.md section 6).

Source: Zhang et al., "Efficient Federated Learning on Knowledge Graphs via Privacy-preserving Relation Embedding
Aggregation", Findings of EMNLP 2022. Clients send relation embeddings, the server averages each over the clients that
hold the relation; entity embeddings never leave. With modalities, the shared modules are averaged as in MMFedE (our
inference). Clients that have no relation in common share modules alone.

A relation is one row: all that a client keeps of it, over the parts of the model (a relation table per modality with
`split` fusion) and over both directions with reciprocal relations, [num_parts * (1 or 2) * relation_dim].
"""

import torch
from torch import Tensor

from fedsim.data.clients import ClientData, Ids
from fedsim.federated.strategy import Strategy
from fedsim.models.client_model import ClientModel
from fedsim.models.parameters import Params


class FedR(Strategy):
    """Federated averaging on relation rows and shared modules."""

    shares = "relation"

    def is_shared(self, name: str) -> bool:
        """Tell whether a parameter is the server's at the start of each round: relations and modules."""
        return name == "relation" or (super().is_shared(name) and name != "global/entity")

    def shared_ids(self, data: ClientData) -> Ids:
        """Return the global ids of a client's relations."""
        return data.relation_ids

    def init_rows(self, model: ClientModel, num_rows: int, generator: torch.Generator) -> Tensor:
        """Draw the server's first relation rows."""
        return relation_rows(model.init_relations(num_rows, generator), self.config.training.reciprocal)

    def shared_rows(self, params: Params) -> Tensor:
        """Write a client's relation table as rows."""
        return relation_rows(params["relation"], self.config.training.reciprocal)

    def place_rows(self, arrived: Params, params: Params) -> Params:
        """Make the client's relation table of the rows; the entity table stays as it is."""
        rows = arrived.pop("entity").to(params["relation"].device)
        params["relation"] = relation_table(rows, len(params["relation"]), self.config.training.reciprocal)
        return arrived


def relation_rows(table: Tensor, reciprocal: bool) -> Tensor:
    """Write a relation table as one row per relation.

    Args:
        table: [num_parts, num_relations, relation_dim], or twice as many rows with reciprocal relations, whose second
            half answers head queries.
        reciprocal: whether there is a second half.

    Returns:
        [num_relations, num_parts * (1 or 2) * relation_dim].
    """
    num_parts, num_rows, width = table.shape
    halves = 2 if reciprocal else 1
    return table.view(num_parts, halves, num_rows // halves, width).permute(2, 0, 1, 3).flatten(1)


def relation_table(rows: Tensor, num_parts: int, reciprocal: bool) -> Tensor:
    """Turn rows back into the table that `relation_rows` wrote."""
    halves = 2 if reciprocal else 1
    parts = rows.reshape(len(rows), num_parts, halves, -1)
    return parts.permute(1, 2, 0, 3).flatten(1, 2).contiguous()
