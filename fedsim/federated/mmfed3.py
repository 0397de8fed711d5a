"""MMFeD3: dual distillation on logits and features, both ways (method.md section 5).

Source: the abstract of arXiv 2506.22036; the private local model beside a trainable global copy with a shared private
relation table is FedLU's (Zhu et al., WWW 2023). Equations 9 to 13 are our inference.

Symbols: L `local`, G `global`, tau `temperature`, log p `log_labels`, Z `prototypes`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedsim.federated.messages import SoftQueries
from fedsim.federated.server_distillation import distil_global_model
from fedsim.federated.strategy import Extras, GlobalModel, Strategy
from fedsim.models.client_model import ClientModel
from fedsim.models.client_stack import ClientValues, TrainingInput
from fedsim.models.parameters import select_view
from fedsim.models.training import Forward


class MMFeD3(Strategy):
    """A private model and a trainable copy of the global one teach each other; the server distils both levels."""

    views = ("local", "global")

    @property
    def sends_prototypes(self) -> bool:
        """Whether clients send projected tokens (eq. 11)."""
        return self.config.distillation.send_prototypes

    @property
    def sends_soft_queries(self) -> bool:
        """Whether clients send soft queries (eq. 13)."""
        return self.config.distillation.num_soft_queries > 0 and self.config.distillation.server_steps > 0

    def couple(self, round_num: int, forwards: Mapping[str, Forward]) -> dict[str, Tensor]:
        """Return the logit terms of eq. 9 and the feature terms of eq. 10, after the warm-up."""
        config = self.config.distillation
        if round_num <= config.warmup_rounds:
            return {}
        own, shared = forwards["local"], forwards["global"]
        losses = {}
        if config.logit_to_client > 0 or config.logit_to_global > 0:
            to_client, to_global = mutual_divergence(own.logits, shared.logits, own.weight, config.temperature)
            if config.logit_to_client > 0:
                losses["logit_to_client"] = config.logit_to_client * to_client
            if config.logit_to_global > 0:
                losses["logit_to_global"] = config.logit_to_global * to_global
        if config.feature_to_client > 0:
            losses["feature_to_client"] = config.feature_to_client * feature_term(shared, own)
        if config.feature_to_global > 0:
            losses["feature_to_global"] = config.feature_to_global * feature_term(own, shared)
        return losses

    def extras(
        self,
        model: ClientModel,
        values: ClientValues,
        inputs: TrainingInput,
        entity_ids: Tensor,
        tables: Callable[[], Mapping[str, Tensor]],
        generator: torch.Generator,
    ) -> Extras:
        """Return projected tokens of the global copy and soft queries of the private model."""
        present = tokens = soft = None
        own = select_view(values.params, "global") | select_view(values.ema, "global")
        with torch.no_grad():
            table = model.tokens(own, inputs.entities)
            if self.sends_prototypes and model.imputes:
                present = table.available[1:].clone()
                tokens = table.values[1:][present]
            if self.sends_soft_queries:
                soft = self._soft_queries(model, values, inputs, entity_ids, tables(), generator)
        return Extras(present, tokens, soft)

    def _soft_queries(
        self,
        model: ClientModel,
        values: ClientValues,
        inputs: TrainingInput,
        entity_ids: Tensor,
        tables: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> SoftQueries:
        """Ask random training queries in the global copy's space; the private model labels the candidates (eq. 13)."""
        config = self.config.distillation
        picked = torch.randint(len(inputs.triples), (config.num_soft_queries,), generator=generator)
        head, relation, tail = inputs.triples[picked.to(inputs.triples.device)].T
        inverse = torch.rand(config.num_soft_queries, generator=generator) < 0.5
        asked = {}
        for view in self.views:
            sides = [
                model.queries(tables[view], values.params["relation"], entity, relation, inverse=flip)
                for entity, flip in ((head, False), (tail, True))
            ]
            asked[view] = torch.where(inverse.to(head.device)[None, :, None], sides[1], sides[0])
        scores = model.scores(asked["local"], tables["local"])
        num_candidates = min(config.num_candidates, scores.shape[1])
        top, candidates = scores.topk(num_candidates, 1)
        return SoftQueries(
            asked["global"].cpu(),
            entity_ids[candidates.cpu()],
            log_labels(top, config.temperature).cpu(),
        )

    def distil(
        self, model: ClientModel, state: GlobalModel, soft_queries: list[SoftQueries], generator: torch.Generator
    ) -> tuple[GlobalModel, dict[str, float]]:
        """Run the server's steps (eq. 12 and 13)."""
        return distil_global_model(self.config, model, state, soft_queries, generator)


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


def feature_term(teacher: Forward, student: Forward) -> Tensor:
    """Return 1 - cos(x_m^student, sg x_m^teacher), mean over available tokens (eq. 10), [...]."""
    goal = functional.normalize(teacher.tokens.values.detach(), dim=-1)
    cosine = (functional.normalize(student.tokens.values, dim=-1) * goal).sum(-1)  # [..., num_tokens, num_entities]
    weight = student.tokens.available.to(cosine.dtype)
    return ((1 - cosine) * weight).sum((-2, -1)) / weight.sum((-2, -1))


def log_labels(logits: Tensor, temperature: float) -> Tensor:
    """Return log p = log softmax(scores / tau), [..., num_queries, num_candidates]."""
    return functional.log_softmax(logits / temperature, -1)
