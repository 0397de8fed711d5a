"""FedEC (Chen et al., "Federated knowledge graph completion via embedding-contrastive learning", KBS 2022) on MMFedE.

FedE with a contrastive term per entity (method.md section 6): a row is drawn to the one that the server sent and away
from the client's own one after its previous training,

    -log(exp(cos(e, e^g) / t) / (exp(cos(e, e^g) / t) + exp(cos(e, e^p) / t))).

The mean is over all entities of the client, not those of the batch: our one-vs-all loss moves all of them at each
step. Before a client's first training e^p = e^g, and the term is ln 2 without a gradient. Of the paper we know the
abstract; its ensemble of embeddings at prediction is left out.

Symbols: e `own`, e^g `received`, e^p `previous`, mu `federation.contrastive_weight`, t
`federation.contrastive_temperature`.
"""

from functools import partial

from torch import Tensor
from torch.nn import functional

from fedsim.federated.fede import FedE
from fedsim.models.steps import Step


class FedEC(FedE):
    """FedE whose rows are drawn to the server's and away from the client's own of last time."""

    anchors = ("received", "previous")

    def couple(self, round_num: int, step: Step) -> dict[str, Tensor]:
        """Return the contrastive term."""
        weight, temperature = self.config.federation.contrastive_weight, self.config.federation.contrastive_temperature
        if weight == 0:
            return {}
        terms: Tensor = step.apply(
            partial(contrast, temperature=temperature),
            step.params["global/entity"],
            step.anchors["received/entity"],
            step.anchors["previous/entity"],
            step.real,
        )
        return {"contrastive": weight * terms}


def contrast(own: Tensor, received: Tensor, previous: Tensor, real: Tensor | None, temperature: float) -> Tensor:
    """Return the mean contrastive term of one client's rows, all [num_rows, dim].

    Args:
        own: rows in training.
        received: rows that the server sent.
        previous: the client's own rows after its previous training.
        real: which rows are entities, bool [num_rows]; None if all are.
        temperature: t.
    """
    unit = functional.normalize(own, dim=-1)
    to_previous = (unit * functional.normalize(previous, dim=-1)).sum(-1)
    to_received = (unit * functional.normalize(received, dim=-1)).sum(-1)
    terms = functional.softplus((to_previous - to_received) / temperature)  # [num_rows]
    if real is None:
        return terms.mean()
    return (terms * real).sum() / real.sum()
