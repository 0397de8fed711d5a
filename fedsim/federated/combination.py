"""The scores of a client's views, combined (method.md section 5, prediction)."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedsim.models.client_model import ClientModel


def combined_scores(
    model: ClientModel,
    relations: Tensor,
    tables: Mapping[str, Tensor],
    weights: Sequence[float | None],
    entity: Tensor,
    relation: Tensor,
    *,
    inverse: bool,
) -> Iterator[Tensor]:
    """Score all entities by one view, or by weight * global copy + (1 - weight) * private model.

    However many weights there are, each view scores once.

    Args:
        model: the model's functions.
        relations: the relation tables that the views share, see `ClientModel.init_relations`.
        tables: view -> embeddings of all entities, [num_kinds, num_entities, dim].
        weights: of the global copy; None with a single view.
        entity: int64 [batch], local ids.
        relation: int64 [batch], local ids.
        inverse: whether heads are asked for.

    Yields:
        For each weight [batch, num_entities]; it holds until the next one is asked for.
    """
    shares = [{view: share for view in tables if (share := _share(view, weight)) > 0} for weight in weights]
    scored: dict[str, Tensor] = {}
    for view in tables:
        if any(view in own for own in shares):
            queries = model.queries(tables[view], relations, entity, relation, inverse=inverse)
            scored[view] = model.scores(queries, tables[view])
    total: Tensor | None = None
    for own in shares:
        (first, share), *others = own.items()
        if not others and share == 1:
            yield scored[first]
            continue
        total = torch.mul(scored[first], share, out=total)
        for view, share in others:
            total.add_(scored[view], alpha=share)
        yield total


def _share(view: str, weight: float | None) -> float:
    if weight is None:
        return 1.0
    return weight if view == "global" else 1 - weight
