"""The client model: imputer -> fusion -> scorer, as functions of parameter values (method.md section 3).

A view's parameters are ``entity`` [num_entities, dim] and the shared modules ``projection.*``, ``fusion.*`` and
``imputer.*``. The relation table is private to the client and shared by its views.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.errors import ConfigError
from fedsim.models.fusion import FUSIONS, QueryPlan, one_scorer_each
from fedsim.models.imputers import IMPUTERS, Imputation, TokenTable
from fedsim.models.losses import LOSSES
from fedsim.models.parameters import Params, layer_norm, linear, linear_init, take_rows
from fedsim.models.scorers import SCORERS, compiled_scorer

T = TypeVar("T")
# Linear in the known entity and in the query vector, so that queries with the same candidates can be added up.
LINEAR_SCORERS = ("distmult", "complex")


@dataclass(frozen=True)
class ModalityInput:
    """One modality's features at a client, those that the model may see.

    Attributes:
        rows: int64 [num_available], local entity ids.
        values: [num_available, feature_dim].
    """

    rows: Tensor
    values: Tensor


@dataclass(frozen=True)
class Prototypes:
    """The server's prototypes for a client's entities, its own contribution taken out (eq. 11).

    Attributes:
        values: [num_modalities, num_entities, dim], or [num_tokens, ...]; zero where there is none.
        present: bool [num_modalities, num_entities], or [num_tokens, ...].
    """

    values: Tensor
    present: Tensor

    def with_structure(self) -> "Prototypes":
        """Put the structure token, which has no prototype, before those of the modalities."""
        return Prototypes(
            torch.cat([torch.zeros_like(self.values[:1]), self.values]),
            torch.cat([torch.zeros_like(self.present[:1]), self.present]),
        )

    def take(self, rows: Tensor) -> "Prototypes":
        """Take those of some entities, int64 [num_rows]."""
        return Prototypes(self.values[:, rows], self.present[:, rows])


@dataclass(frozen=True)
class EntityInput:
    """What a client knows of its entities besides the table.

    Attributes:
        available: bool [num_tokens, num_entities], o_m(e); structure is always available.
        features: modality -> those of its features that the model may see.
        prototypes: those of the server, of all tokens; None before it sent any.
    """

    available: Tensor
    features: Mapping[str, ModalityInput]
    prototypes: Prototypes | None = None

    def take(self, rows: Tensor, modalities: Sequence[str]) -> "EntityInput":
        """Take what is known of some entities; features name them by their places there.

        Args:
            rows: the entities, int64 [num_rows].
            modalities: whose features are taken.
        """
        features = {}
        for name in modalities:
            item = self.features[name]
            # of an entity among those with features
            place = torch.full(self.available.shape[1:], -1, device=rows.device)
            place[item.rows] = torch.arange(len(item.rows), device=rows.device)
            found = place[rows]
            there = (found >= 0).nonzero().squeeze(1)
            features[name] = ModalityInput(there, item.values[found[there]])
        return EntityInput(
            self.available[:, rows], features, None if self.prototypes is None else self.prototypes.take(rows)
        )


def pick(registry: Mapping[str, T], field: str, name: str) -> T:
    """Look a part up by name; ConfigError lists the names."""
    if name not in registry:
        raise ConfigError(f"config field '{field}' = '{name}': unknown name; choose from {', '.join(registry)}")
    return registry[name]


class ClientModel:
    """Functions of a view's parameters, for one set of modalities; holds no values itself.

    Args:
        config: the experiment.
        feature_dims: modality name -> width of its features, in the data set's order.
    """

    def __init__(self, config: Config, feature_dims: Mapping[str, int]) -> None:
        self.config = config
        self.scorer = pick(SCORERS, "model.scorer", config.model.scorer)
        if config.training.compile:
            self.scorer = compiled_scorer(self.scorer.name)
        self.fusion = pick(FUSIONS, "model.fusion", config.model.fusion)
        self.feature_dims = dict(feature_dims) if self.fusion.uses_modalities else {}
        self.num_tokens = 1 + len(self.feature_dims)
        pairs = self.fusion.pairs(self.num_tokens) if self.imputes else one_scorer_each(1)
        self.plan = QueryPlan.build(pairs, linear=self.scorer.name in LINEAR_SCORERS)
        self.num_parts = self.plan.num_parts
        self.loss = pick(LOSSES, "training.loss", config.training.loss)
        self.imputer = pick(IMPUTERS, "model.imputer", config.model.imputer)(config, self.num_tokens)
        self.relation_scale = config.model.phase_scale if self.scorer.name == "rotate" else 1.0
        self.dim = config.model.dim

    @property
    def imputes(self) -> bool:
        """Whether there is any modality that could be missing."""
        return bool(self.feature_dims)

    def init_entities(self, num_entities: int, generator: torch.Generator) -> Tensor:
        """Draw an entity table, [num_entities, dim]."""
        return torch.randn(num_entities, self.dim, generator=generator) * self.config.model.init_scale

    def init_modules(self, generator: torch.Generator) -> Params:
        """Draw the shared modules."""
        params: Params = {}
        for name, width in self.feature_dims.items():
            params |= linear_init(f"projection.{name}", width, self.dim, generator)
        if self.imputes:
            params |= self.fusion.init(self.config.model, self.num_tokens, generator)
            params |= self.imputer.init(generator)
        return params

    def init_relations(self, num_relations: int, generator: torch.Generator) -> Tensor:
        """Draw relation tables, [num_tables, num_relations or twice that with reciprocal relations, relation_dim]."""
        rows = num_relations * (2 if self.config.training.reciprocal else 1)
        shape = (self.plan.num_tables, rows, self.scorer.relation_dim(self.dim))
        if self.scorer.name == "rotate":  # phases
            return (torch.rand(shape, generator=generator) * 2 - 1) * math.pi / self.relation_scale
        return torch.randn(shape, generator=generator) * self.config.model.init_scale

    def project(self, params: Mapping[str, Tensor], modality: str, values: Tensor) -> Tensor:
        """Map features [num_rows, feature_dim] to tokens [num_rows, dim] of unit variance (eq. 1)."""
        return layer_norm(linear(params, f"projection.{modality}", values))

    def availability(self, num_entities: int, features: Mapping[str, ModalityInput]) -> Tensor:
        """Return o_m(e), bool [num_tokens, num_entities]."""
        available = torch.zeros(self.num_tokens, num_entities, dtype=torch.bool)
        available[0] = True
        for index, name in enumerate(self.feature_dims, start=1):
            available[index, features[name].rows.cpu()] = True
        return available

    def tokens(self, params: Mapping[str, Tensor], entities: EntityInput) -> TokenTable:
        """Assemble the hyper-modal embeddings (eq. 4): the structure token and the projected features."""
        entity = params["entity"]
        if not self.fusion.uses_modalities:
            return TokenTable(entity.unsqueeze(0), entities.available)
        tokens = [layer_norm(entity)]
        empty = torch.zeros_like(entity)
        for name in self.feature_dims:
            item = entities.features[name]
            tokens.append(empty.index_copy(0, item.rows, self.project(params, name, item.values)))
        values = torch.stack(tokens)
        known = entities.prototypes
        if known is None:
            return TokenTable(values, entities.available)
        return TokenTable(values, entities.available, known.values, known.present)

    def embed(
        self,
        params: Mapping[str, Tensor],
        tokens: TokenTable,
        imputation: Imputation | None,
        rows: Tensor | None = None,
        row_values: Tensor | None = None,
    ) -> Tensor:
        """Complete the tokens and fuse them to entity embeddings, [num_kinds, num_entities, dim] (eq. 7 and 2).

        Args:
            params: the view's parameters.
            tokens: from `tokens`.
            imputation: cached values for missing tokens; None if there are no modalities.
            rows: int64 [num_rows], entities whose imputed tokens are replaced by `row_values` (with gradient).
            row_values: [num_tokens, num_rows, dim].
        """
        if imputation is None:
            return tokens.values  # structure alone: nothing to fuse
        # Missing tokens are zero, and so is the imputation of available ones: adding needs no pass back.
        complete = tokens.values + imputation.values
        if rows is not None and row_values is not None:
            change = (row_values - imputation.values[:, rows]) * ~tokens.available[:, rows].unsqueeze(-1)
            complete = complete.index_add(1, rows, change)
        return self.fusion.fuse(params, complete, tokens.available.to(complete.dtype), imputation.uncertainty)

    def queries(
        self, embeddings: Tensor, relations: Tensor, entity: Tensor, relation: Tensor, *, inverse: bool
    ) -> Tensor:
        """Build query vectors for (entity, relation, ?), or with `inverse` for (?, relation, entity).

        Args:
            embeddings: [..., num_kinds, num_entities, dim].
            relations: the relation tables, see `init_relations`. [..., num_tables, num_rows, relation_dim]
            entity: int64 [..., batch], local ids.
            relation: int64 [..., batch], local ids.
            inverse: whether heads are asked for.

        Returns:
            [..., num_parts, batch, dim].
        """
        use_second = inverse and self.config.training.reciprocal
        index = relation + relations.shape[-2] // 2 if use_second else relation
        flip = inverse and not use_second
        known = self.plan.known_entities(take_rows(embeddings, entity))
        asked = self.plan.known_relations(take_rows(relations, index))
        return self.scorer.query(
            known, asked if self.relation_scale == 1 else asked * self.relation_scale, inverse=flip
        )

    def scores(self, queries: Tensor, embeddings: Tensor) -> Tensor:
        """Score queries against all entities, joined over the parts.

        Args:
            queries: [..., num_parts, batch, dim].
            embeddings: [..., num_kinds, num_entities, dim].

        Returns:
            [..., batch, num_entities].
        """
        return self.plan.join(self.part_scores(queries, embeddings))

    def part_scores(self, queries: Tensor, embeddings: Tensor) -> Tensor:
        """Score each query vector apart, [..., num_parts, batch, num_entities]; arguments as of `scores`."""
        return self.scorer.score(queries, self.plan.candidates(embeddings))

    def scores_of(self, queries: Tensor, embeddings: Tensor, candidates: Tensor) -> Tensor:
        """Score each query against its own candidates, joined over the parts.

        Args:
            queries: [..., num_parts, batch, dim].
            embeddings: [..., num_kinds, num_entities, dim].
            candidates: int64 [..., batch, num_candidates], rows of the embeddings.

        Returns:
            [..., batch, num_candidates].
        """
        return self.plan.join(self.part_scores_of(queries, embeddings, candidates))

    def part_scores_of(self, queries: Tensor, embeddings: Tensor, candidates: Tensor) -> Tensor:
        """Score each query vector apart, [..., num_parts, batch, num_candidates]; arguments as of `scores_of`."""
        ids = candidates.unsqueeze(-3).expand(*queries.shape[:-1], -1)
        return self.scorer.score_negatives(queries, self.plan.candidates(embeddings), ids)
