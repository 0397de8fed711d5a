"""FedProx (Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020) on MMFedE (method.md section 6).

FedE with a proximal term: (mu / 2) ||w - w^t||^2 keeps a client near the server's model while it trains. On embeddings
of a knowledge graph that is our choice: over the federated parameters, which are the entity rows and the shared
modules; relations are private and have no w^t.

Symbols: w `params`, w^t `received`, mu `federation.proximal_mu`.
"""

import torch
from torch import Tensor

from fedsim.federated.fede import FedE
from fedsim.models.parameters import Params, select_view
from fedsim.models.steps import Step


class FedProx(FedE):
    """FedE whose clients are held near the model that they were sent."""

    anchors = ("received",)

    def couple(self, round_num: int, step: Step) -> dict[str, Tensor]:
        """Return the proximal term; nothing at mu 0, which is FedE."""
        mu = self.config.federation.proximal_mu
        if mu == 0:
            return {}
        own, received = select_view(step.params, "global"), select_view(step.anchors, "received")
        return {"proximal": 0.5 * mu * step.apply(squared_distance, own, received)}


def squared_distance(own: Params, received: Params) -> Tensor:
    """Return ||w - w^t||^2 of one client, over all parameters; rows of a stack's padding are zero in both."""
    # In the order of names, not of the dict: a client read from a checkpoint has another, and the last digits with it.
    return torch.stack([(own[name] - received[name]).square().sum() for name in sorted(received)]).sum()
