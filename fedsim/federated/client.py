"""The client side: private data and state, local training, and evaluation (method.md sections 3 to 5, 7)."""

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedsim.config import Config
from fedsim.data.clients import ClientData, EvaluationGroup
from fedsim.errors import FedSimError, RunError
from fedsim.evaluation.ranking import FilterIndex, RankingMetrics, rank_triples, summarise, weighted_mean
from fedsim.federated.anchors import Anchors
from fedsim.federated.combination import combined_scores
from fedsim.federated.compression import Exchange, decode_message
from fedsim.federated.messages import Broadcast, ClientHello, ClientUpdate, message_bytes
from fedsim.federated.reports import ClientEvaluation, ClientReport
from fedsim.federated.strategy import Strategy
from fedsim.models.client_model import ClientModel, EntityInput, ModalityInput, Prototypes
from fedsim.models.client_stack import ClientStack, ClientValues, Member, TrainingInput
from fedsim.models.imputers import Imputation
from fedsim.models.optimizers import reset_state
from fedsim.models.parameters import Params, overwrite, select_view, with_prefix
from fedsim.models.training import train_epochs
from fedsim.privacy.differential_privacy import privatise
from fedsim.randomness import torch_generator


class Client:
    """One institution. Everything it holds is private; what leaves is a `ClientHello` or a `ClientUpdate`.

    Args:
        data: its graph and features.
        config: the experiment.
        strategy: says which views are trained and what is sent.
        device: where its tensors live.
    """

    def __init__(self, data: ClientData, config: Config, strategy: Strategy, device: torch.device) -> None:
        self.data, self.config, self.strategy, self.device = data, config, strategy, device
        self.model = ClientModel(config, {name: item.values.shape[1] for name, item in data.features.items()})
        self.entity_ids = torch.from_numpy(data.entity_ids)
        self.shared_ids = torch.from_numpy(strategy.shared_ids(data))
        self.features = {
            name: ModalityInput(
                torch.from_numpy(item.rows[item.visible]).to(device),
                torch.from_numpy(item.values[item.visible]).to(device),
            )
            for name, item in data.features.items()
        }
        self.triples = torch.from_numpy(data.train).to(device)
        self.values = ClientValues()
        self.available = self.model.availability(len(data.entity_ids), self.features).to(device)
        self.values.params["relation"] = self.model.init_relations(
            len(data.relation_ids), self._generator("init/relation", 0)
        ).to(device)
        self.prototypes: Prototypes | None = None
        self.exchange = Exchange(config.communication, data.client, self.shared_ids)
        self.anchors = Anchors(strategy.anchors)
        combinations = strategy.combinations
        self.combination: float | None = combinations[len(combinations) // 2] if combinations else None
        self._imputations: dict[tuple[str, int], Imputation | None] = {}
        if not strategy.federated or strategy.shares != "entity":
            self._init_view(strategy.views[0])

    @property
    def num_triples(self) -> int:
        """What the server is told of the training triples, the weight of the modules; 1 with differential privacy."""
        return 1 if self.config.privacy.enabled else len(self.data.train)

    def hello(self) -> ClientHello:
        """Say which entities (or relations, if those are shared) this client owns."""
        secure = self.config.secure_aggregation
        known = self.shared_ids[:0] if secure.enabled and secure.hide_ownership else self.shared_ids
        return ClientHello(self.data.client, known, self.num_triples)

    def own_part(self, broadcast: Broadcast) -> Broadcast:
        """Cut out of what the server published what this client is sent."""
        return broadcast.for_client(self.data.client, self.shared_ids)

    def join(self, broadcast: Broadcast) -> None:
        """Take the server's model outside a round: the first one, or the newest one to be ranked with."""
        self._receive(self.exchange.download(broadcast))
        self._imputations.clear()

    def train(self, round_num: int, broadcast: Broadcast | None) -> tuple[ClientUpdate | None, ClientReport]:
        """Take part in a round alone; see `train_together`."""
        return train_together([self], round_num, [broadcast])[0]

    def begin_round(self, broadcast: Broadcast | None) -> Broadcast | None:
        """Take the server's model for this client's entities.

        Returns:
            The message that this client was sent.
        """
        if broadcast is not None:
            broadcast = self.exchange.download(broadcast)
            self._receive(broadcast)
        self._imputations.clear()
        self.values.anchors = self.anchors.begin_round(self.values.params)
        return broadcast

    def forget_imputations(self) -> None:
        """Free the imputed tokens; they are drawn again, alike, when something asks for them."""
        self._imputations.clear()

    def member(self, round_num: int) -> Member:
        """Return this client as a member of a stack."""
        return Member(
            f"client {self.data.client}, round {round_num}",
            self.values,
            self._inputs(),
            lambda purpose: self._generator(purpose, round_num),
        )

    def evaluate(self, split: str, round_num: int, *, choose: bool) -> list[ClientEvaluation]:
        """Rank the triples of a split.

        Args:
            split: "valid" or "test".
            round_num: seeds the imputation's draws.
            choose: choose the combination of views on this split (validation only); else use the chosen one.
        """
        try:
            tried = self._rank(split, self._embeddings(round_num), self.options(split, choose))
        except FedSimError as err:
            raise RunError(f"client {self.data.client}, round {round_num}, {split}: {err}") from err
        return self.settle(tried, choose)

    def options(self, split: str, choose: bool) -> tuple[float | None, ...]:
        """Return the combinations of views that are tried on a split; None with a single view."""
        can_choose = self.combination is not None and any(len(group.triples[split]) for group in self.data.groups)
        return self.strategy.combinations if choose and can_choose else (self.combination,)

    def settle(self, tried: Mapping[float | None, Sequence[RankingMetrics]], choose: bool) -> list[ClientEvaluation]:
        """Take the best of the combinations that were tried, combination -> metrics of each group."""
        best = max(tried, key=lambda weight: weighted_mean(tried[weight]).mrr)
        if choose:
            self.combination = best
        return [
            ClientEvaluation(group.name, metrics, best)
            for group, metrics in zip(self.data.groups, tried[best], strict=True)
        ]

    def _rank(
        self, split: str, tables: Mapping[str, Tensor], weights: Sequence[float | None]
    ) -> dict[float | None, list[RankingMetrics]]:
        """Rank a split's triples, group by group, by each combination of the views."""
        both_sides = self.config.evaluation.protocol == "both"
        ranked: dict[float | None, list[RankingMetrics]] = {weight: [] for weight in weights}
        for group in self.data.groups:
            ranks = rank_triples(
                lambda *query: self._scores(tables, weights, *query),
                group.triples[split],
                self.filter_index(group),
                batch_size=self.config.evaluation.batch_size,
                both_sides=both_sides,
                candidates=torch.from_numpy(group.candidates) if len(self.data.groups) > 1 else None,
                num_models=len(weights),
            )
            for weight, own in zip(weights, ranks, strict=True):
                ranked[weight].append(summarise(own, ks=(1, 3, 10) if both_sides else (1, 5, 10)))
        return ranked

    def filter_index(self, group: EvaluationGroup) -> FilterIndex:
        """Index the known answers of a group; anew each time, as it takes more memory than time."""
        known = np.concatenate(list(group.triples.values()))
        return FilterIndex.build(known, len(self.data.entity_ids), len(self.data.relation_ids))

    def scores(self, entity: Tensor, relation: Tensor, inverse: bool, round_num: int) -> Tensor:
        """Score all entities of the client for queries of local ids, [batch] -> [batch, num_entities]."""
        return next(self._scores(self._embeddings(round_num), (self.combination,), entity, relation, inverse))

    def complete_tokens(self, view: str, round_num: int) -> tuple[Tensor, Tensor]:
        """Return a view's hyper-modal embeddings, imputed where missing (eq. 7), for the evaluation instruments.

        Returns:
            Tokens [num_tokens, num_entities, dim], and availability bool [num_tokens, num_entities].
        """
        inputs = self._inputs()
        with torch.no_grad():
            tokens = self.model.tokens(self._view(view), inputs.entities)
            imputation = self.imputation(view, round_num)
            if imputation is None:
                return tokens.values, tokens.available
            return tokens.values + imputation.values, tokens.available

    def project(self, view: str, modality: str, values: Tensor) -> Tensor:
        """Project features by a view's projection, [num_rows, feature_dim] -> [num_rows, dim] (instruments only)."""
        with torch.no_grad():
            return self.model.project(self._view(view), modality, values)

    def state(self) -> Params:
        """Return all that this client keeps between rounds, as one flat dict of CPU tensors."""
        state = with_prefix(self.values.params, "params")
        state |= with_prefix(self.values.optimizer, "optimizer") | with_prefix(self.values.ema, "ema")
        if self.combination is not None:
            state["combination"] = torch.tensor(self.combination, dtype=torch.float64)
        if self.prototypes is not None:
            state |= {"prototypes/values": self.prototypes.values, "prototypes/present": self.prototypes.present}
        state |= with_prefix(self.exchange.state(), "exchange")
        state |= with_prefix(self.anchors.state(), "anchors")
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        on_device = {
            name: value.to(self.device) for name, value in state.items() if not name.startswith("optimizer/steps")
        }
        steps = {name: value.clone() for name, value in state.items() if name.startswith("optimizer/steps")}
        whole = on_device | steps
        self.values = ClientValues(
            select_view(whole, "params"), select_view(whole, "optimizer"), select_view(whole, "ema")
        )
        self._imputations.clear()
        self.combination = float(state["combination"]) if "combination" in state else None
        self.prototypes = None
        if "prototypes/values" in state:
            self.prototypes = Prototypes(whole["prototypes/values"], whole["prototypes/present"])
        self.exchange.load_state(select_view(state, "exchange"))
        self.anchors.load_state(select_view(whole, "anchors"))

    def _generator(self, purpose: str, round_num: int) -> torch.Generator:
        return torch_generator(self.config.seed, purpose, round_num=round_num, client=self.data.client)

    def _view(self, view: str) -> Params:
        return select_view(self.values.params, view) | select_view(self.values.ema, view)

    def _inputs(self) -> TrainingInput:
        prototypes = self.prototypes.with_structure() if self.prototypes is not None else None
        return TrainingInput(self.triples, EntityInput(self.available, self.features, prototypes))

    def _init_view(self, view: str) -> None:
        """Start a view from this client's own draws (training without federation)."""
        generator = self._generator(f"init/{view}", 0)
        params = {"entity": self.model.init_entities(len(self.data.entity_ids), generator)}
        self._set_view(view, params | self.model.init_modules(generator))

    def _set_view(self, view: str, params: Mapping[str, Tensor]) -> None:
        overwrite(self.values.params, with_prefix(params, view), self.device)
        averages = {name: value for name, value in params.items() if name.startswith("imputer.")}
        overwrite(self.values.ema, with_prefix(averages, view), self.device)

    def _receive(self, broadcast: Broadcast) -> None:
        """Start the global copy anew from the server's model; a private model starts there once."""
        own = self.strategy.shared_rows(self.values.params)
        arrived, self.prototypes = self.exchange.unpack(broadcast, own, self.prototypes)
        params = self.strategy.place_rows(arrived, self.values.params)
        for view in self.strategy.views:
            if view == "global" or f"{view}/entity" not in self.values.params:
                self._set_view(view, params)

    def end_round(self) -> None:
        """Free what the next round starts without: anchors and optimiser state."""
        self.values.anchors = {}
        self.anchors.end_round(self.values.params)
        reset = self.config.training.reset_optimizer
        if reset == "always":
            reset_state(self.values.optimizer)
        elif reset == "global":
            reset_state(self.values.optimizer, self.strategy.is_shared)

    def update(self, round_num: int, received: Broadcast) -> ClientUpdate:
        """Assemble the message to the server: the global copy, with the averaged denoiser, and the extras.

        Args:
            round_num: the round, from 1.
            received: what the client was sent, the start of what it changed.
        """
        extras = self.strategy.extras(
            self.model,
            self.values,
            self._inputs(),
            self.entity_ids,
            lambda: self._embeddings(round_num),
            self._generator("extras", round_num),
        )
        modules = {name: value.cpu().clone() for name, value in self._view("global").items() if name != "entity"}
        rows = self.strategy.shared_rows(self.values.params)
        assert rows is not None, "a client that trained has rows"
        update = ClientUpdate(
            self.data.client,
            round_num,
            self.num_triples,
            self.shared_ids,
            rows.cpu().clone(memory_format=torch.contiguous_format),
            modules,
            extras.token_present.cpu() if extras.token_present is not None else None,
            extras.tokens.cpu() if extras.tokens is not None else None,
            extras.soft_queries,
        )
        if self.config.privacy.enabled:
            noise = self._generator("dp", round_num)
            update = privatise(update, decode_message(received), self.config.privacy, noise)
        return self.exchange.upload(update)

    def imputation(self, view: str, round_num: int) -> Imputation | None:
        """Fill a view's missing tokens after a round's training; sampled once and kept until the values change."""
        if (view, round_num) not in self._imputations:
            impute_together([self], round_num)
        return self._imputations[view, round_num]

    def _embeddings(self, round_num: int) -> dict[str, Tensor]:
        """Embed all entities under each view, [num_kinds, num_entities, dim]."""
        stack = ClientStack(self.model, [self.member(round_num)])
        return {view: stack.embed(view, self.imputation(view, round_num)) for view in self.strategy.views}

    def _scores(
        self,
        tables: Mapping[str, Tensor],
        weights: Sequence[float | None],
        entity: Tensor,
        relation: Tensor,
        inverse: bool,
    ) -> Iterator[Tensor]:
        relations = self.values.params["relation"]
        query = entity.to(self.device), relation.to(self.device)
        return combined_scores(self.model, relations, tables, weights, *query, inverse=inverse)


def train_together(
    clients: Sequence[Client], round_num: int, broadcasts: Sequence[Broadcast | None]
) -> list[tuple[ClientUpdate | None, ClientReport]]:
    """Let the clients of a batch take part in a round; several train as one stacked computation.

    Args:
        clients: members of one batch.
        round_num: the round, from 1.
        broadcasts: the server's model for each client's entities; None without federation.

    Returns:
        Each client's message to the server (None without federation) and a report.
    """
    started = time.perf_counter()
    broadcasts = [client.begin_round(broadcast) for client, broadcast in zip(clients, broadcasts, strict=True)]
    model, strategy = clients[0].model, clients[0].strategy
    members = [client.member(round_num) for client in clients]
    losses = train_epochs(
        model, strategy.views, members, lambda step: strategy.couple(round_num, step), strategy.relation_views
    )
    for client in clients:
        client.end_round()
    updates: list[ClientUpdate | None] = [None] * len(clients)
    if broadcasts[0] is not None:
        impute_together(clients, round_num)
        for index, (client, sent) in enumerate(zip(clients, broadcasts, strict=True)):
            assert sent is not None, "all clients of a batch are federated, or none"
            updates[index] = client.update(round_num, sent)
    seconds = (time.perf_counter() - started) / sum(len(client.triples) for client in clients)
    return [
        (
            update,
            ClientReport(
                client.data.client,
                own,
                message_bytes(broadcast),
                message_bytes(update),
                seconds * len(client.triples),
            ),
        )
        for client, own, broadcast, update in zip(clients, losses, broadcasts, updates, strict=True)
    ]


def impute_together(clients: Sequence[Client], round_num: int) -> None:
    """Fill the missing tokens of clients after a round's training, under each view; they keep the result."""
    views = [view for view in clients[0].strategy.views if (view, round_num) not in clients[0]._imputations]
    if not views:
        return
    if not clients[0].model.imputes:  # nothing to stack for
        for client in clients:
            client._imputations |= {(view, round_num): None for view in views}
        return
    stack = ClientStack(clients[0].model, [client.member(round_num).without_training() for client in clients])
    for view in views:
        generators = [member.generator_of(f"evaluate/{view}") for member in stack.members]
        imputed = stack.impute(view, generators)
        for client, own in zip(clients, stack.split(imputed), strict=True):
            client._imputations[view, round_num] = own
