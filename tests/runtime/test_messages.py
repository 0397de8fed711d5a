"""What leaves a client (method.md section 1): no triple, relation embedding, raw feature, text or picture.

A strategy that declares to share relation embeddings (FedR) is held to keep entity embeddings at home instead.
Every message of a run is recorded and searched for the bytes of what is private, in several orders and number
formats; leaks planted on purpose show that the search finds them. `test_message_types.py` holds the declared types.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

import fedsim.federated.runtime
from actors.runtime import RayRuntime, ray_runtime
from builders import write_tiny_dataset
from fedsim.federated import STRATEGIES
from fedsim.federated.aggregation import PartialSums, encode
from fedsim.federated.client import Client
from fedsim.federated.client_batch import train_clients
from fedsim.federated.messages import ClientHello, ClientUpdate
from fedsim.federated.reports import ClientReport
from fedsim.federated.runtime import Experiment, InProcessRuntime, prepare
from leak_search import Secrets, leaks, leaves, secrets
from runs import small_config


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    dataset = write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")
    # Rate 0.5 hides features; wide enough rows that dim, feature widths and hidden widths all differ.
    return prepare(small_config(dataset, Path("unused"), model__dim=18))


@dataclasses.dataclass
class Recorder:
    """Keeps every message, and what its client's secrets were when it was sent."""

    messages: list[tuple[Any, Secrets]] = dataclasses.field(default_factory=list)

    def record(self, client: Client, message: Any) -> None:
        self.messages.append((message, secrets(client)))

    def leaks(self) -> list[str]:
        return [f"{type(message).__name__}: {leak}" for message, held in self.messages for leak in leaks(message, held)]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Record whatever a client, or a batch of clients, gives to the runtime."""
    kept = Recorder()
    hello = Client.hello

    def watched_hello(self: Client) -> Any:
        result = hello(self)
        kept.record(self, result)
        return result

    monkeypatch.setattr(Client, "hello", watched_hello)

    def watch(name: str) -> None:
        original: Callable[..., Any] = getattr(fedsim.federated.runtime, name)

        def watched(clients: Sequence[Client], *args: Any) -> Any:
            results = original(clients, *args)
            for client, result in zip(clients, results, strict=True):
                kept.record(client, result)
            return results

        monkeypatch.setattr(fedsim.federated.runtime, name, watched)

    for name in ("train_clients", "evaluate_clients"):
        watch(name)
    return kept


def test_no_message_of_a_run_holds_what_is_private(experiment: Experiment, recorder: Recorder) -> None:
    runtime = InProcessRuntime(experiment)
    for round_num in (1, 2, 3):
        runtime.train(round_num, [0, 1, 2])
        runtime.evaluate("valid", round_num, choose=True)
    runtime.measure(3)
    sent = [message[0] for message, _ in recorder.messages if isinstance(message, tuple)]
    assert len(recorder.messages) == 3 + 9 + 9
    assert all(update.tokens is not None and update.soft_queries is not None for update in sent)
    assert recorder.leaks() == []


@pytest.mark.parametrize("strategy", [name for name, kind in STRATEGIES.items() if kind.federated])
def test_no_strategy_sends_more_than_it_declares(strategy: str, tmp_path: Path, recorder: Recorder) -> None:
    """Entities or relations cross, never both; what the server publishes for a client is searched as well."""
    settings = {"federation__strategy": strategy, "model__dim": 18}
    dataset = write_tiny_dataset(tmp_path / "tiny")
    runtime = InProcessRuntime(prepare(small_config(dataset, tmp_path / "unused", **settings)))
    assert runtime.server is not None
    for round_num in (1, 2):
        runtime.train(round_num, [0, 1, 2])
    for client in runtime.clients.values():
        shared = client.data.relation_ids if STRATEGIES[strategy].shares == "relation" else client.data.entity_ids
        held = secrets(client)
        for update in [message for message, _ in recorder.messages if isinstance(message, ClientHello)]:
            if update.client == client.data.client:
                assert update.entity_ids.tolist() == shared.tolist()
        part = client.own_part(runtime.server.begin_round(3))
        assert leaks(part, held) == []
        assert part.entity.shape[0] == len(shared)
    assert recorder.leaks() == []


def test_an_entity_row_of_fedr_is_found(tmp_path: Path) -> None:
    """The other way round: what is common of the other strategies is a leak there, and relations are none."""
    settings = {"federation__strategy": "fedr", "model__dim": 18}
    dataset = write_tiny_dataset(tmp_path / "tiny")
    runtime = InProcessRuntime(prepare(small_config(dataset, tmp_path / "unused", **settings)))
    assert runtime.server is not None
    client = runtime.clients[1]
    update, _ = client.train(1, client.own_part(runtime.server.begin_round(1)))
    assert update is not None
    held = secrets(client)
    assert leaks(update, held) == []
    rows = client.values.params["global/entity"]
    for bad in (_plant(update, entity=rows), _plant(update, modules=update.modules | {"x": rows[3:4].half()})):
        assert any("entity embedding" in leak for leak in leaks(bad, held))


def test_arrays_of_ids_name_entities_and_nothing_else(experiment: Experiment, recorder: Recorder) -> None:
    runtime = InProcessRuntime(experiment)
    runtime.train(1, [0, 1, 2])
    num_modalities = len(experiment.feature_dims)
    for message, _ in recorder.messages:
        update = message[0] if isinstance(message, tuple) else message
        client = runtime.clients[update.client]
        integers = {path for path, leaf in leaves(update) if isinstance(leaf, Tensor) and not leaf.is_floating_point()}
        assert integers <= {".entity_ids", ".soft_queries.candidates", ".token_present"}
        assert torch.equal(update.entity_ids, update.entity_ids.unique())
        if isinstance(update, ClientUpdate):
            assert update.soft_queries is not None
            assert torch.isin(update.soft_queries.candidates, client.entity_ids).all()
            assert update.token_present is not None
            assert update.token_present.shape == (num_modalities, len(client.entity_ids))
            # No module has a row per relation or per triple.
            lengths = {length for value in update.modules.values() for length in value.shape}
            assert lengths.isdisjoint({len(client.triples)})
            assert "relation" not in " ".join(update.modules)


def _plant(update: ClientUpdate, **changes: Any) -> ClientUpdate:
    return dataclasses.replace(update, **changes)


def _undeclared(update: ClientUpdate, value: Any) -> ClientUpdate:
    copy = dataclasses.replace(update)
    object.__setattr__(copy, "more", value)
    return copy


LEAKS: dict[str, tuple[str, Callable[[Client, ClientUpdate], ClientUpdate]]] = {
    "relation table among the modules": (
        "relation embedding",
        lambda client, update: _plant(update, modules=update.modules | {"gate.x": client.values.params["relation"]}),
    ),
    "one relation row in half precision": (
        "relation embedding",
        lambda client, update: _plant(
            update, modules=update.modules | {"x": client.values.params["relation"][..., :1, :].half()}
        ),
    ),
    "raw features as tokens": (
        "raw feature",
        lambda client, update: _plant(update, tokens=torch.from_numpy(client.data.features["text"].values)),
    ),
    "a raw feature row among zeros, transposed": (
        "raw feature",
        lambda client, update: _plant(
            update, entity=torch.from_numpy(client.data.features["image"].values[3:4]).expand(3, -1).T.contiguous()
        ),
    ),
    "triples behind the entity ids": (
        "triple",
        lambda client, update: _plant(update, entity_ids=torch.cat([update.entity_ids, client.triples.flatten()])),
    ),
    "heads as candidates, in 32 bits": (
        "triple",
        lambda client, update: _plant(update, entity_ids=client.triples[:, 0].int()),
    ),
    "a label": ("text", lambda client, update: _undeclared(update, "entity 3")),
    "triples in a field that is not declared": ("triple", lambda client, update: _undeclared(update, client.triples)),
    "a Python object": ("Client", lambda client, update: _undeclared(update, client)),
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_planted_leak_is_found(name: str, experiment: Experiment) -> None:
    runtime = InProcessRuntime(experiment)
    assert runtime.server is not None
    client = runtime.clients[1]
    update, _ = client.train(1, runtime.server.begin_round(1).for_entities(client.entity_ids))
    assert update is not None
    held = secrets(client)
    assert leaks(update, held) == []
    kind, plant = LEAKS[name]
    assert any(kind in leak for leak in leaks(plant(client, update), held))


@pytest.mark.usefixtures("ray_cluster")
def test_what_comes_out_of_a_client_actor_is_the_same_message(experiment: Experiment) -> None:
    """The update between two actors is taken on its way and held to the same rule."""
    twin = InProcessRuntime(experiment)
    assert twin.server is not None
    with closing(ray_runtime(experiment)) as runtime:
        assert isinstance(runtime, RayRuntime)
        assert runtime.server is not None
        (broadcast,) = ray.get(runtime.server.begin_round.remote(1))
        for held in runtime.pool:
            (number,) = held.clients
            pair: Any = held.actor.train.remote([number], 1, broadcast)
            (update,), ((report,), at_once) = ray.get(list(pair))
            assert at_once == 1
            client = twin.clients[number]
            expected, _ = client.train(1, twin.server.begin_round(1).for_entities(client.entity_ids))
            assert type(update) is ClientUpdate
            assert type(report) is ClientReport
            assert leaks(update, secrets(client)) == leaks(report, secrets(client)) == []
            for (path, value), (other, wanted) in zip(leaves(update), leaves(expected), strict=True):
                assert path == other
                assert torch.equal(value, wanted) if isinstance(value, Tensor) else value == wanted


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_pool_sends_is_the_sum_of_the_updates_and_nothing_else(experiment: Experiment) -> None:
    """The sums are taken on their way, searched for secrets, and recomputed from the updates of a twin."""
    config = experiment.config.model_copy(
        update={"runtime": experiment.config.runtime.model_copy(update={"placement": "pooled", "num_actors": 1})}
    )
    experiment = dataclasses.replace(experiment, config=config)
    twin = InProcessRuntime(experiment)
    assert twin.server is not None
    welcome = twin.server.begin_round(1)
    with closing(ray_runtime(experiment)) as runtime:
        assert isinstance(runtime, RayRuntime)
        assert runtime.server is not None
        (broadcast,) = ray.get(runtime.server.begin_round.remote(1))
        (held,) = runtime.pool
        reports = [
            report
            for batch in held.batches
            for report in ray.get(held.actor.train_and_sum.remote(batch, 1, broadcast))[0]
        ]
        pair: Any = held.actor.sum_up.remote(1)
        partial, number = ray.get(list(pair))
    assert number == 3
    assert type(partial) is PartialSums
    updates = [
        update
        for batch in twin.batches
        for update, _ in train_clients([twin.clients[client] for client in batch], 1, welcome)
        if update is not None
    ]
    for client in twin.clients.values():
        assert leaks(partial, secrets(client)) == leaks(reports, secrets(client)) == []
    total = torch.zeros_like(partial.entity)
    for update in updates:
        total[update.entity_ids] += encode(update.entity)
        sent, expected = partial.soft_queries[update.client], update.soft_queries
        assert expected is not None
        assert all(torch.equal(one, other) for (_, one), (_, other) in zip(leaves(sent), leaves(expected), strict=True))
    assert torch.equal(partial.entity, total)
    assert set(partial.modules) == set(updates[0].modules)


@pytest.mark.parametrize("kind", ["floats", "integers"])
def test_a_leak_planted_in_partial_sums_is_found(kind: str, experiment: Experiment) -> None:
    """As its own field in floats, or the triples behind the counts."""
    runtime = InProcessRuntime(experiment)
    assert runtime.server is not None
    client = runtime.clients[1]
    runtime.server.begin_round(1)
    partial = runtime.server.sums.partial()
    held = secrets(client)
    assert leaks(partial, held) == []
    if kind == "floats":
        bad = dataclasses.replace(partial, modules={"x": client.values.params["relation"]})
    else:
        bad = dataclasses.replace(partial, entity_counts=torch.cat([partial.entity_counts, client.triples.flatten()]))
    assert any(("relation embedding" if kind == "floats" else "triple") in leak for leak in leaks(bad, held))
