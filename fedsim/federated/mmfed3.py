"""MMFeD3: dual distillation on logits and features, both ways (method.md section 5).

Source: the abstract of arXiv 2506.22036; the private local model beside a trainable global copy with a shared private
relation table is FedLU's (Zhu et al., WWW 2023). Equations 9 to 13 are our inference.

Symbols: L `local`, G `global`, tau `temperature`, p `label_distribution`, Z `prototypes`.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedsim.federated.messages import SoftQueries
from fedsim.federated.server_distillation import distil_global_model
from fedsim.federated.strategy import Extras, GlobalModel, Strategy
from fedsim.models.client_model import ClientModel
from fedsim.models.parameters import select_view
from fedsim.models.training import ClientValues, Forward, TrainingInput, label_distribution


class MMFeD3(Strategy):
    """A private model and a trainable copy of the global one teach each other; the server distils both levels."""

    views = ("local", "global")

    @property
    def sends_prototypes(self) -> bool:
        """Whether clients send projected tokens (eq. 11)."""
        return self.config.distillation.send_prototypes

    def couple(self, round_num: int, forwards: Mapping[str, Forward]) -> dict[str, Tensor]:
        """Return the logit terms of eq. 9 and the feature terms of eq. 10, after the warm-up."""
        config = self.config.distillation
        if round_num <= config.warmup_rounds:
            return {}
        own, shared = forwards["local"], forwards["global"]
        losses = {}
        if config.logit_to_client > 0:
            losses["logit_to_client"] = config.logit_to_client * self._logit_term(shared, own)
        if config.logit_to_global > 0:
            losses["logit_to_global"] = config.logit_to_global * self._logit_term(own, shared)
        if config.feature_to_client > 0:
            losses["feature_to_client"] = config.feature_to_client * feature_term(shared, own)
        if config.feature_to_global > 0:
            losses["feature_to_global"] = config.feature_to_global * feature_term(own, shared)
        return losses

    def _logit_term(self, teacher: Forward, student: Forward) -> Tensor:
        """Return tau^2 KL(sg p_teacher || p_student), mean over queries (eq. 9)."""
        tau = self.config.distillation.temperature
        target = label_distribution(teacher.logits.detach(), tau)
        return tau**2 * divergence(target, label_distribution(student.logits, tau))

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
            table = model.tokens(own, inputs.features, inputs.prototypes)
            if self.sends_prototypes and model.imputes:
                present = table.available[1:].clone()
                tokens = table.values[1:][present]
            if self.config.distillation.num_soft_queries > 0 and self.config.distillation.server_steps > 0:
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
            label_distribution(top, config.temperature).cpu(),
        )

    def distil(
        self, model: ClientModel, state: GlobalModel, soft_queries: list[SoftQueries], generator: torch.Generator
    ) -> tuple[GlobalModel, dict[str, float]]:
        """Run the server's steps (eq. 12 and 13)."""
        return distil_global_model(self.config, model, state, soft_queries, generator)


def divergence(target: Tensor, prediction: Tensor) -> Tensor:
    """Return KL(target || prediction) of log probabilities [num_queries, num_candidates], mean over queries."""
    return (target.exp() * (target - prediction)).sum(1).mean()


def feature_term(teacher: Forward, student: Forward) -> Tensor:
    """Return 1 - cos(x_m^student, sg x_m^teacher), mean over available tokens (eq. 10)."""
    cosine = torch.cosine_similarity(student.tokens.values, teacher.tokens.values.detach(), dim=-1)
    weight = student.tokens.available.to(cosine.dtype)  # [num_tokens, num_entities]
    return ((1 - cosine) * weight).sum() / weight.sum()
