"""FedLU: a private model and a copy of the global one teach each other by their logits (method.md section 6, eq. 9).

Source: Zhu, Li and Hu, "Heterogeneous Federated Knowledge Graph Embedding Learning and Unlearning", WWW 2023. A client
keeps a private local model L and a trainable copy of the global model G; both use its private relation table, which L
trains. The server averages the global copies as FedE does. A client answers with its private model alone. The
unlearning half of the paper is left out. `distillation.warmup_rounds` is ours; the authors' code begins at a plateau.

Symbols: L `local`, G `global`, tau `temperature`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedsim.federated.strategy import Strategy
from fedsim.models.steps import Step


class FedLU(Strategy):
    """A private model and a trainable copy of the global one, coupled by mutual distillation of logits."""

    views = ("local", "global")
    combinations: tuple[float, ...] = (0.0,)

    @property
    def relation_views(self) -> tuple[str, ...] | None:
        """Let the private model alone train the relations, as the authors' code does."""
        return ("local",)

    def couple(self, round_num: int, step: Step) -> dict[str, Tensor]:
        """Return the logit terms of eq. 9, after the warm-up."""
        config = self.config.distillation.at(round_num)
        if round_num <= config.warmup_rounds or not (config.logit_to_client > 0 or config.logit_to_global > 0):
            return {}
        own, shared = step.forwards["local"], step.forwards["global"]
        to_client, to_global = mutual_divergence(own.logits, shared.logits, own.weight, config.temperature)
        losses = {}
        if config.logit_to_client > 0:
            losses["logit_to_client"] = config.logit_to_client * to_client
        if config.logit_to_global > 0:
            losses["logit_to_global"] = config.logit_to_global * to_global
        return losses


def mutual_divergence(own: Tensor, shared: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return tau^2 KL(sg p_G || p_L) and tau^2 KL(sg p_L || p_G), weighted sums over queries (eq. 9), [...] each.

    Args:
        own: logits of the private model L, [..., num_queries, num_candidates].
        shared: logits of the global copy G over the same candidates.
        weight: of each query, [..., num_queries].
        temperature: tau.
    """
    terms: tuple[Tensor, Tensor] = _MutualDivergence.apply(own, shared, weight, temperature)  # type: ignore[no-untyped-call]
    return terms


class _MutualDivergence(torch.autograd.Function):
    """Both divergences from one softmax per side.

    The gradient is known: tau^2 KL(sg p || q) has tau (q - p) with respect to the logits of q. Autograd would take
    four softmaxes over all candidates and their backward passes, the largest tensors of a step.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, shared: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Compute both sums over queries."""
        log_own, log_shared = log_labels(own, temperature), log_labels(shared, temperature)
        gap = log_shared - log_own
        prob_own, prob_shared = log_own.exp_(), log_shared.exp_()
        to_client = ((prob_shared * gap).sum(-1) * weight).sum(-1) * temperature**2
        to_global = -(gap.mul_(prob_own).sum(-1) * weight).sum(-1) * temperature**2
        # tau (p_L - p_G), weighted
        ctx.save_for_backward(prob_own.sub_(prob_shared).mul_(weight.unsqueeze(-1) * temperature))
        return to_client, to_global

    @staticmethod
    def backward(ctx: Any, grad_client: Tensor, grad_global: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Push each side towards the other."""
        (difference,) = ctx.saved_tensors
        return difference * grad_client[..., None, None], difference * -grad_global[..., None, None], None, None


def log_labels(logits: Tensor, temperature: float) -> Tensor:
    """Return log p = log softmax(scores / tau), [..., num_queries, num_candidates]."""
    return functional.log_softmax(logits / temperature, -1)
