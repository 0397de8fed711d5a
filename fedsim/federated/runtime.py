"""Where clients and server run: the `Runtime` protocol, and the one that runs all of them in this process."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from fedsim.checkpoint import load_clients, load_tensors, save_clients, save_tensors, server_file
from fedsim.config import Config
from fedsim.data.clients import ClientData, build_clients, load_federated_split
from fedsim.data.dataset import load_dataset, resolve_dataset
from fedsim.errors import ConfigError, FedSimError, LostActorError, RunError
from fedsim.evaluation.consistency import semantic_consistency, shared_entities
from fedsim.federated import STRATEGIES, Strategy
from fedsim.federated.attacks import choose_attackers, poison_clients
from fedsim.federated.batches import ClientSize, plan_batches
from fedsim.federated.client import Client
from fedsim.federated.client_batch import evaluate_clients, measure_clients, train_clients
from fedsim.federated.failures import Failure, unchanged_on_failure
from fedsim.federated.gpu_memory import PartSize
from fedsim.federated.messages import Broadcast, ClientUpdate
from fedsim.federated.reports import ClientEvaluation, ClientReport
from fedsim.federated.robust import check_robustness, placement_lines
from fedsim.federated.server import Server, ServerReport
from fedsim.federated.shelf import Shelf
from fedsim.federated.timeline import Timeline
from fedsim.models.client_model import ClientModel, pick
from fedsim.privacy.differential_privacy import check_privacy
from fedsim.privacy.secure_aggregation.clients import SecureClients, exchange_keys, reveal_shares
from fedsim.privacy.secure_aggregation.compatibility import check_secure_aggregation
from fedsim.process import settle_process

logger = logging.getLogger(__name__)

HERE = "this process"  # who works, in the timeline of a run without actors


@dataclass(frozen=True)
class Experiment:
    """A config with the data it names, divided among clients.

    Attributes:
        config: the experiment.
        graph_name: the data set's name.
        num_entities: size of the global entity id space.
        feature_dims: modality -> width of its features.
        clients: each client's private data.
        num_moved: valid and test triples that the split moved to train.
    """

    config: Config
    graph_name: str
    num_entities: int
    feature_dims: dict[str, int]
    clients: list[ClientData]
    num_moved: int


@dataclass(frozen=True)
class RoundResult:
    """One round of training.

    Attributes:
        reports: of each client of the cohort, in client order.
        server: the server's report; None without federation.
        seconds: phase -> seconds of wall time.
        failures: clients that the round went on without, in client order.
    """

    reports: list[ClientReport]
    server: ServerReport | None
    seconds: dict[str, float]
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True)
class Measurements:
    """What the evaluation instruments saw.

    Attributes:
        imputation: client -> metric -> value (see `measure_imputation`).
        consistency: view and modality -> mean cosine between clients.
    """

    imputation: dict[int, dict[str, float]] = field(default_factory=dict)
    consistency: dict[str, float] = field(default_factory=dict)


class Runtime(Protocol):
    """Runs clients and server; the round loop in `fedsim.simulation` sees nothing else."""

    placement: list[str]
    timeline: Timeline

    def train(self, round_num: int, cohort: Sequence[int]) -> RoundResult:
        """Broadcast, train the cohort, aggregate and distil."""
        ...

    def deliver(self, round_num: int) -> None:
        """Give every client the server's model, as it goes out in a round; without federation there is none."""
        ...

    def evaluate(self, split: str, round_num: int, *, choose: bool) -> list[ClientEvaluation]:
        """Rank every client's triples of a split; results in client order."""
        ...

    def measure(self, round_num: int) -> Measurements:
        """Measure imputation and semantic consistency."""
        ...

    def record(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show a finished round to whoever watches the processes; rows as `fedsim.results.metric_rows` makes them."""
        ...

    def save(self, folder: Path) -> None:
        """Write the state of server and clients into a folder."""
        ...

    def kept(self, folder: Path, round_num: int) -> None:
        """Learn that what `save` wrote last is whole, and where it is."""
        ...

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote."""
        ...

    def recover(self, error: LostActorError, folder: Path | None, round_num: int) -> None:
        """After that error, bring everything to the checkpoint of a round, or to the start if there is none."""
        ...

    def close(self) -> None:
        """Let go of processes and memory."""
        ...


RuntimeFactory = Callable[[Experiment], Runtime]


def prepare(config: Config) -> Experiment:
    """Load the data set that the config names and divide it among clients."""
    strategy = make_strategy(config)
    check_robustness(config, strategy)
    check_secure_aggregation(config, strategy)
    check_privacy(config, strategy)
    ClientModel(config, {})  # refuses unknown parts here, before any process starts
    graph = load_dataset(resolve_dataset(config.data.path))
    split = load_federated_split(graph, config)
    size = config.federation.cohort_size
    if size is not None and size > split.num_clients:
        raise ConfigError(
            f"config field 'federation.cohort_size' = {size}, but there are {split.num_clients} clients; "
            f"give at most {split.num_clients}"
        )
    clients = build_clients(graph, split, config, together=strategy.together)
    if config.data.alignment == "psu" and strategy.federated:
        from fedsim.data.alignment import align_names  # here: it brings the library of cryptography

        names = graph.entity_keys if strategy.shares == "entity" else graph.relation_keys
        align_names(names, {data.client: strategy.shared_ids(data) for data in clients})
    config = choose_attackers(config, len(clients))
    clients = poison_clients(clients, config)
    feature_dims = {name: item.dim for name, item in clients[0].features.items()}
    return Experiment(config, graph.name, graph.num_entities, feature_dims, clients, split.num_moved)


def make_strategy(config: Config) -> Strategy:
    """Make the strategy that the config names."""
    return pick(STRATEGIES, "federation.strategy", config.federation.strategy)(config)


def make_client(data: ClientData, config: Config, device: torch.device) -> Client:
    """Make one client."""
    return Client(data, config, make_strategy(config), device)


def client_device(config: Config) -> torch.device:
    """Choose where clients' tensors live: on the GPU if the config gives them a share of one."""
    if config.runtime.gpus_per_client == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RunError("torch finds no CUDA device; install torch with CUDA, or set runtime.gpus_per_client to 0")
    return torch.device("cuda")


class InProcessRuntime:
    """All clients and the server in this process, one after the other."""

    def __init__(self, experiment: Experiment) -> None:
        config = self.config = experiment.config
        settle_process(config.runtime.torch_threads)
        strategy = make_strategy(config)
        device = client_device(config)
        self.clients = {data.client: make_client(data, config, device) for data in experiment.clients}
        self.part_size = PartSize()
        self.failures: list[Failure] = []  # of the round
        self.timeline = Timeline()
        self.shelf = Shelf(config.runtime.scratch)
        self.batches = plan_batches(config, client_sizes(experiment))
        self.placement = [
            f"{len(self.clients)} clients in this process, {config.runtime.torch_threads} torch thread(s)",
            *placement_lines(config),
        ]
        self.secure = SecureClients(config.secure_aggregation)
        self.server: Server | None = None
        if strategy.federated:
            self.server = Server(config, strategy, num_shared(experiment), experiment.feature_dims)
            for client in self.clients.values():
                self.server.register(client.hello())
            self.deliver(0)

    def train(self, round_num: int, cohort: Sequence[int]) -> RoundResult:
        """Train the cohort batch by batch; each update is added to the server's sums as it comes."""
        started = time.perf_counter()
        reports, self.failures = [], []
        broadcast = self.server.begin_round(round_num) if self.server is not None else None
        if self.server is not None and broadcast is not None and self.secure.config.enabled:
            reports = self._train_masked(self.server, round_num, cohort, broadcast)
        else:
            for members in sampled(self.batches, cohort):
                for update, report in self._train(members, round_num, broadcast):
                    if self.server is not None and update is not None:
                        self.server.receive(update)
                    reports.append(report)
        reports.sort(key=lambda report: report.client)
        failures = tuple(sorted(self.failures, key=lambda failure: failure.client))
        elapsed = time.perf_counter() - started
        if self.server is None:
            return RoundResult(reports, None, {"train": elapsed}, failures)
        with self.timeline.span(HERE, f"distilling in round {round_num}"):
            server = self.server.finish_round()
        return RoundResult(reports, server, phase_seconds(elapsed, server), failures)

    def deliver(self, round_num: int) -> None:
        """Give every client the server's model."""
        if self.server is None:
            return
        broadcast = self.server.begin_round(round_num)
        for client in self.clients.values():
            with self.shelf.at_work([client]):
                client.join(client.own_part(broadcast))

    def evaluate(self, split: str, round_num: int, *, choose: bool) -> list[ClientEvaluation]:
        """Rank every client's triples of a split."""
        parts: dict[int, list[ClientEvaluation]] = {}
        for members in self.batches:
            clients = [self.clients[number] for number in members]
            what = f"evaluation on {split} in round {round_num}"
            with self.timeline.span(HERE, what), self.shelf.at_work(clients, changes=choose):
                done = self.part_size.run(
                    clients,
                    f"evaluation in round {round_num}",
                    lambda part: evaluate_clients(part, split, round_num, choose),
                )
            parts |= zip(members, done, strict=True)
        return [evaluation for number in self.clients for evaluation in parts[number]]

    def measure(self, round_num: int) -> Measurements:
        """Measure imputation and semantic consistency."""
        shared = shared_entities({number: client.entity_ids for number, client in self.clients.items()})
        with self.timeline.span(HERE, f"measurement in round {round_num}"):
            imputation, sums = measure_clients(self.shelf, list(self.clients.values()), shared, round_num)
        return Measurements(dict(zip(self.clients, imputation, strict=True)), semantic_consistency(sums))

    def record(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing: this process is watched by its own output."""

    def save(self, folder: Path) -> None:
        """Write one file per batch of clients and one for the server."""
        if self.server is not None:
            save_tensors(self.server.state(), server_file(folder))
        for members in self.batches:
            with self.shelf.at_work([self.clients[number] for number in members], changes=False):
                save_clients({number: self.clients[number].state() for number in members}, folder)

    def load(self, folder: Path) -> None:
        """Restore server and clients."""
        if self.server is not None:
            self.server.load_state(load_tensors(server_file(folder)))
        for members in self.batches:
            with self.shelf.at_work([self.clients[number] for number in members]):
                for number, state in load_clients(members, folder).items():
                    self.clients[number].load_state(state)

    def kept(self, folder: Path, round_num: int) -> None:
        """Do nothing: what is lost of this process is all of it."""

    def recover(self, error: LostActorError, folder: Path | None, round_num: int) -> None:
        """Raise the error: there are no actors here."""
        raise error

    def close(self) -> None:
        """Nothing to let go of."""

    def _train_masked(
        self, server: Server, round_num: int, cohort: Sequence[int], broadcast: Broadcast
    ) -> list[ClientReport]:
        """Train the cohort between the phases of secure aggregation; the server gets masked updates."""
        shape, reports = server.sum_shape(), []
        party = server.secure_round(round_num, cohort)
        exchange_keys(party, self.secure, cohort)
        for members in sampled(self.batches, cohort):
            results = self._train(members, round_num, broadcast)
            for masked, report in self.secure.mask(results, shape, broadcast):
                server.receive_masked(masked)
                reports.append(report)
        reveal_shares(party, self.secure)
        server.unmask()
        return reports

    def _train(
        self, members: Sequence[int], round_num: int, broadcast: Broadcast | None
    ) -> list[tuple[ClientUpdate | None, ClientReport]]:
        """Train a batch; one that fails leaves its clients as they were, in a run that goes on without them."""
        known = self.part_size.most
        clients = [self.clients[number] for number in members]
        what = f"training in round {round_num}"
        try:
            with (
                self.timeline.span(HERE, what),
                self.shelf.at_work(clients),
                unchanged_on_failure(clients, self.config),
            ):
                results = self.part_size.run(
                    clients,
                    what,
                    lambda part: train_clients(part, round_num, broadcast),
                )
        except FedSimError as err:
            if self.config.federation.max_failed_clients == 0:
                raise
            self.failures += [Failure(number, round_num, "error", str(err)) for number in members]
            results = []
        if self.part_size.most != known:
            logger.warning(
                "the GPU ran out of memory in round %d: clients of a batch train %d at once from now on, which changes "
                "the last digits; lower runtime.clients_per_batch to avoid it",
                round_num,
                self.part_size.most,
            )
        return results


def client_sizes(experiment: Experiment) -> dict[int, ClientSize]:
    """Return the size of each client."""
    return {data.client: ClientSize(len(data.entity_ids), len(data.train)) for data in experiment.clients}


def num_module_numbers(experiment: Experiment) -> int:
    """Return how many parameters the modules of one client's model have; the widest client's."""
    widths = {name: item.matrix.shape[1] for data in experiment.clients for name, item in data.features.items()}
    modules = ClientModel(experiment.config, widths).init_modules(torch.Generator())
    return sum(value.numel() for value in modules.values())


def num_shared(experiment: Experiment) -> int:
    """Return the size of the global id space of what clients share: entities, or relations."""
    if make_strategy(experiment.config).shares == "entity":
        return experiment.num_entities
    return 1 + max(int(data.relation_ids.max()) for data in experiment.clients)


def sampled(batches: Iterable[Sequence[int]], cohort: Iterable[int]) -> list[tuple[int, ...]]:
    """Return the members of each batch that are in the cohort, without batches that have none."""
    chosen = set(cohort)
    members = [tuple(client for client in batch if client in chosen) for batch in batches]
    return [batch for batch in members if batch]


def phase_seconds(train_seconds: float, server: ServerReport) -> dict[str, float]:
    """Split a round's wall time into phases; aggregation overlaps training, so it is shown within its own time."""
    return {
        "train": max(train_seconds - server.aggregate_seconds, 0.0),
        "aggregate": server.aggregate_seconds,
        "distil": server.distil_seconds,
    }
