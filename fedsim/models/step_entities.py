"""The entities that a training step computes on: all of a client's, or those that it uses.

With negatives that a batch shares a step uses its triples' entities, the negatives and the entities that its imputers
drew. On a large graph these are a fraction of the client's, and the tokens, projections, fusion and feature terms of
the others would be computed for nothing: only the feature terms and HidE's mean tokens see them, and are means over
fewer entities then (method.md sections 4 and 5).
"""

from dataclasses import dataclass

from torch import Tensor

from fedsim.models.client_model import EntityInput
from fedsim.models.imputers import Imputation
from fedsim.models.parameters import Params, take_rows


@dataclass(frozen=True)
class StepEntities:
    """Entities of a step; ... is nothing for one client, and [clients] for a stack.

    Attributes:
        known: what is known of them.
        rows: of the entity tables, int64 [..., num_rows]; None for all.
        linked: which of them the batch's triples and negatives name, bool [..., num_rows]; the others are those that an
            imputer drew. None if all entities are there.
    """

    known: EntityInput
    rows: Tensor | None = None
    linked: Tensor | None = None

    @property
    def compared(self) -> Tensor:
        """Return the tokens that views may be compared by, whatever their imputers drew, bool [..., num_tokens, n]."""
        return self.known.available if self.linked is None else self.known.available & self.linked.unsqueeze(-2)

    def of_params(self, params: Params) -> Params:
        """Cut a view's entity table down."""
        if self.rows is None:
            return params
        return params | {"entity": take_rows(params["entity"].unsqueeze(-3), self.rows).squeeze(-3)}

    def of_imputation(self, imputation: Imputation | None) -> Imputation | None:
        """Cut an imputation down."""
        if self.rows is None or imputation is None:
            return imputation
        uncertainty = take_rows(imputation.uncertainty.unsqueeze(-1), self.rows).squeeze(-1)
        return Imputation(take_rows(imputation.values, self.rows), uncertainty)

    def of_hidden(self, hidden: Tensor | None) -> Tensor | None:
        """Cut hidden tokens down, bool [..., num_tokens, num_entities]."""
        if self.rows is None or hidden is None:
            return hidden
        return take_rows(hidden.unsqueeze(-1), self.rows).squeeze(-1)
