"""MMFeD3: dual distillation on logits and features, both ways (method.md section 5).

Source: the abstract of arXiv 2506.22036; the private local model beside a trainable global copy with a shared private
relation table is FedLU's (Zhu et al., WWW 2023). Equations 9 to 13 are our inference.

Symbols: L `local`, G `global`, tau `temperature`, log p `log_labels`, Z `prototypes`.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from fedsim.federated.fedlu import FedLU, log_labels
from fedsim.federated.messages import SoftQueries
from fedsim.federated.server_distillation import distil_global_model
from fedsim.federated.strategy import Extras, GlobalModel
from fedsim.models.client_model import ClientModel
from fedsim.models.client_stack import ClientValues, TrainingInput
from fedsim.models.parameters import select_view
from fedsim.models.steps import Forward, Step


class MMFeD3(FedLU):
    """FedLU, with features beside the logits, and with a server that distils both levels."""

    combinations = (0.0, 0.25, 0.5, 0.75, 1.0)

    @property
    def sends_prototypes(self) -> bool:
        """Whether clients send projected tokens (eq. 11)."""
        return self.config.distillation.send_prototypes

    @property
    def sends_soft_queries(self) -> bool:
        """Whether clients send soft queries (eq. 13)."""
        return self.config.distillation.num_soft_queries > 0 and self.config.distillation.server_steps > 0

    @property
    def relation_views(self) -> tuple[str, ...] | None:
        """Let both views train the relations that they share; without any coupling the private model alone.

        Then nothing of the federation reaches the private model, which is that of local training.
        """
        terms = ("logit_to_client", "logit_to_global", "feature_to_client", "feature_to_global")
        return None if self.config.distillation.ever_positive(*terms) else ("local",)

    def couple(self, round_num: int, step: Step) -> dict[str, Tensor]:
        """Return the logit terms of eq. 9 and the feature terms of eq. 10, after the warm-up."""
        config = self.config.distillation.at(round_num)
        losses = super().couple(round_num, step)
        if round_num <= config.warmup_rounds:
            return losses
        own, shared = step.forwards["local"], step.forwards["global"]
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
        if self.config.privacy.enabled:  # the best ones would tell of the private model, which noise cannot hide
            drawn = torch.rand(scores.shape, generator=generator).topk(num_candidates, 1).indices
            candidates = drawn.to(scores.device)
            top = scores.gather(1, candidates)
        else:
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


def feature_term(teacher: Forward, student: Forward) -> Tensor:
    """Return 1 - cos(x_m^student, sg x_m^teacher), mean over the step's available tokens (eq. 10), [...]."""
    goal = functional.normalize(teacher.tokens.values.detach(), dim=-1)
    cosine = (functional.normalize(student.tokens.values, dim=-1) * goal).sum(-1)  # [..., num_tokens, num_entities]
    weight = student.tokens.available.to(cosine.dtype)
    return ((1 - cosine) * weight).sum((-2, -1)) / weight.sum((-2, -1))
