"""The scores of a client's views, combined (method.md section 5, prediction)."""

from collections.abc import Mapping

from torch import Tensor

from fedsim.models.client_model import ClientModel


def combined_scores(
    model: ClientModel,
    relations: Tensor,
    tables: Mapping[str, Tensor],
    weight: float | None,
    entity: Tensor,
    relation: Tensor,
    *,
    inverse: bool,
) -> Tensor:
    """Score all entities by one view, or by weight * global copy + (1 - weight) * private model.

    Args:
        model: the model's functions.
        relations: the relation tables that the views share, see `ClientModel.init_relations`.
        tables: view -> embeddings of all entities, [num_parts, num_entities, dim].
        weight: of the global copy; None with a single view.
        entity: int64 [batch], local ids.
        relation: int64 [batch], local ids.
        inverse: whether heads are asked for.

    Returns:
        [batch, num_entities].
    """
    total: Tensor | None = None
    for view, table in tables.items():
        share = 1.0 if weight is None else weight if view == "global" else 1 - weight
        if share == 0:
            continue
        queries = model.queries(table, relations, entity, relation, inverse=inverse)
        scores = share * model.scores(queries, table)
        total = scores if total is None else total + scores
    assert total is not None, "the shares of the views add up to one"
    return total
