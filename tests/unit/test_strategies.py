"""The federated optimisers: each formula by hand, what is shared, what is kept, and what must not change anything."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch

from experiments import (
    MIXED,
    all_values,
    same_values,
    small_config,
    small_experiment,
    small_runtime,
    strategy_runtime,
    train_rounds,
)
from fedsim.errors import ConfigError
from fedsim.federated import STRATEGIES
from fedsim.federated.aggregation import RoundSums
from fedsim.federated.fedec import contrast
from fedsim.federated.fedprox import squared_distance
from fedsim.federated.fedr import relation_rows, relation_table
from fedsim.federated.message_sizes import MessageSizes
from fedsim.federated.pfedeg import mix_rows
from fedsim.federated.runtime import make_strategy
from fedsim.federated.server import Server

FEDERATED = [name for name, strategy in STRATEGIES.items() if strategy.federated]
# FedProx


def test_the_proximal_term_by_hand() -> None:
    """Of w = (1, 2; 3), w^t = (0, 0; 5): 1 + 4 + 4 = 9, and its gradient is 2 (w - w^t)."""
    own = {"entity": torch.tensor([[1.0, 2.0]]).requires_grad_(), "w": torch.tensor([3.0]).requires_grad_()}
    distance = squared_distance(own, {"entity": torch.zeros(1, 2), "w": torch.tensor([5.0])})
    assert float(distance.detach()) == 9.0
    distance.backward()
    assert own["entity"].grad is not None
    assert own["w"].grad is not None
    assert own["entity"].grad.tolist() == [[2.0, 4.0]]
    assert own["w"].grad.tolist() == [-4.0]


@pytest.mark.parametrize("imputer", ["zero", "diffusion"])
def test_fedprox_with_mu_zero_is_fede_to_the_bit(imputer: str) -> None:
    settings = {"model.imputer": imputer, "model.dropout": 0.2, "federation.proximal_mu": 0.0}
    one, other = strategy_runtime("fedprox", **settings), strategy_runtime("fede", **settings)
    assert train_rounds(one, 3) == train_rounds(other, 3)
    assert same_values(all_values(one), all_values(other))


def test_a_large_mu_holds_rows_and_modules_and_not_the_relations() -> None:
    """What a round moves, against FedE: federated parameters move much less, the private relations do not."""
    moved: dict[str, dict[str, float]] = {}
    for mu in (0.0, 1000.0):
        runtime = strategy_runtime("fedprox", **{"federation.proximal_mu": mu, "training.batch_size": 8})
        client = runtime.clients[0]
        before = {name: value.clone() for name, value in client.values.params.items()}
        losses = train_rounds(runtime, 1)
        assert ("proximal" in losses[0]) == (mu > 0)
        moved[str(mu)] = {name: float((client.values.params[name] - value).norm()) for name, value in before.items()}
    free, held = moved.values()
    for name in ("global/entity", "global/projection.text.weight"):
        assert held[name] < 0.5 * free[name]
    assert held["relation"] > 0.5 * free["relation"]


# FedEC


def test_the_contrastive_term_by_hand() -> None:
    """Rows (1, 0) and (0, 2); t = 0.5. The second list's padded row does not count.

    Row 1: cos to received (1, 0) is 1, to previous (0, 1) is 0: -log(e^2 / (e^2 + 1)) = ln(1 + e^-2) = 0.126928.
    Row 2: received (3, 0) 0, previous (0, -1) -1: the same. Row 3, received and previous alike, would be ln 2.
    """
    own = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    received = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 1.0]])
    previous = torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 1.0]])
    real = torch.tensor([True, True, False])
    assert float(contrast(own, received, previous, real, 0.5)) == pytest.approx(0.126928, rel=1e-5)
    assert float(contrast(own[:2], received[:2], previous[:2], None, 0.5)) == pytest.approx(0.126928, rel=1e-5)
    assert float(contrast(own[2:], received[2:], previous[2:], None, 0.5)) == pytest.approx(math.log(2))


def test_padded_rows_take_no_gradient_and_real_ones_turn_to_the_received() -> None:
    own = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).requires_grad_()
    received, previous = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    contrast(own, received, previous, torch.tensor([True, False]), 0.2).backward()
    assert own.grad is not None
    assert own.grad[1].tolist() == [0.0, 0.0]
    assert float(own.grad[0, 0]) < 0 < float(own.grad[0, 1])


def test_before_a_first_training_the_term_is_ln_2_and_moves_nothing() -> None:
    """Round 1 is FedE's to the bit; the rows that clients keep are those they sent, and round 2 differs."""
    one, other = strategy_runtime("fedec", **{"federation.contrastive_weight": 0.5}), strategy_runtime("fede")
    first = train_rounds(one, 1)[0]
    train_rounds(other, 1)
    assert first["contrastive"] == pytest.approx(0.5 * math.log(2), rel=1e-6)
    for number, client in one.clients.items():
        rows = client.values.params["global/entity"]
        assert torch.equal(rows, other.clients[number].values.params["global/entity"])
        assert client.anchors.previous is not None
        assert torch.equal(client.anchors.previous, rows)
    assert train_rounds(one, 1, start=2)[0]["contrastive"] != first["contrastive"]
    train_rounds(other, 1, start=2)
    name = "server/entity"
    assert not torch.equal(all_values(one)[name], all_values(other)[name])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_those_that_ask_for_constants_have_them_and_for_a_round_alone(strategy: str) -> None:
    runtime = small_runtime({"federation.strategy": strategy})
    client = next(iter(runtime.clients.values()))
    broadcast = client.own_part(runtime.server.begin_round(1)) if runtime.server is not None else None
    client.begin_round(broadcast)
    kinds = {name.split("/")[0] for name in client.values.anchors}
    assert kinds == set(STRATEGIES[strategy].anchors)
    client.end_round()
    assert client.values.anchors == {}
    assert (client.anchors.previous is not None) == ("previous" in STRATEGIES[strategy].anchors)


# FedR


@pytest.mark.parametrize("reciprocal", [True, False])
def test_a_relation_is_one_row(reciprocal: bool) -> None:
    """Two parts, three relations, width 2: relation 1 is its rows of both parts and, if there are two, both halves."""
    halves = 2 if reciprocal else 1
    table = torch.arange(2.0 * halves * 3 * 2).view(2, halves * 3, 2)
    rows = relation_rows(table, reciprocal)
    assert rows.shape == (3, 2 * halves * 2)
    expected = [table[part, half * 3 + 1].tolist() for part in range(2) for half in range(halves)]
    assert rows[1].tolist() == list(itertools.chain(*expected))
    assert torch.equal(relation_table(rows, 2, reciprocal), table)


def test_fedr_averages_relations_over_their_holders_and_leaves_entities_alone() -> None:
    runtime = strategy_runtime("fedr", **{"model.fusion": "split"})
    assert runtime.server is not None
    sent = []
    broadcast = runtime.server.begin_round(1)
    for client in runtime.clients.values():
        update, _ = client.train(1, client.own_part(broadcast))
        assert update is not None
        assert torch.equal(update.entity_ids, torch.from_numpy(client.data.relation_ids))
        sent.append(update)
        runtime.server.receive(update)
    runtime.server.finish_round()
    held = torch.cat([update.entity_ids for update in sent])
    assert int(held.bincount().max()) > 1, "a relation is held by several clients"
    for relation in held.unique():
        rows = [update.entity[update.entity_ids == relation] for update in sent]
        mean = torch.cat(rows).mean(0)
        assert torch.allclose(runtime.server.global_model.entity[relation], mean, atol=1e-6)
    entities = {number: client.values.params["global/entity"].clone() for number, client in runtime.clients.items()}
    runtime.deliver(2)
    for number, client in runtime.clients.items():
        assert torch.equal(client.values.params["global/entity"], entities[number])
        rows = relation_rows(client.values.params["relation"], reciprocal=True)
        assert torch.equal(rows, runtime.server.global_model.entity[client.shared_ids])
    assert not torch.equal(entities[0][:5], entities[1][:5]), "each client drew its own"


def test_fedr_shares_nothing_between_clients_without_a_common_relation() -> None:
    """With the relations split, the server's row is the one its only holder sent."""
    runtime = strategy_runtime("fedr", **{"data.split": "relation", "data.num_clients": 2})
    train_rounds(runtime, 1)
    assert runtime.server is not None
    for client in runtime.clients.values():
        mine = relation_rows(client.values.params["relation"], reciprocal=True)
        assert torch.allclose(runtime.server.global_model.entity[client.shared_ids], mine, atol=1e-6)


def test_the_optimiser_of_what_is_federated_starts_anew_where_asked() -> None:
    runtime = strategy_runtime("fedr", **{"training.reset_optimizer": "global"})
    train_rounds(runtime, 1)
    kept = {slot.split("/", 1)[1] for slot in runtime.clients[0].values.optimizer}
    assert kept == {"global/entity"}, "with FedR entities are private: their state is kept"


# PFedEG


def test_a_mixture_by_hand() -> None:
    """Clients 0 {0, 1}, 1 {1, 2}, 2 {1}; t = 1, rows (1, 0) (1, 0), (0, 2) (5, 5), (2, 0).

    Entity 1: c_01 = 0, c_02 = 1, c_12 = 0. Client 0: weights e, 1, e on (1, 0), (0, 2), (2, 0):
    ((e + 2 e) / (2 e + 1), 2 / (2 e + 1)) = (1.266956, 0.310725). Entities 0 and 2 have one owner: their rows stay.
    """
    owned = {0: torch.tensor([0, 1]), 1: torch.tensor([1, 2]), 2: torch.tensor([1])}
    rows = {
        0: torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
        1: torch.tensor([[0.0, 2.0], [5.0, 5.0]]),
        2: torch.tensor([[2.0, 0.0]]),
    }
    mixed = mix_rows(owned, rows, 1.0)
    assert mixed[0][1].tolist() == pytest.approx([1.266956, 0.310725], rel=1e-5)
    assert mixed[0][0].tolist() == [1.0, 0.0]
    assert mixed[1][1].tolist() == [5.0, 5.0]
    assert torch.equal(mixed[2][0], mixed[0][1])
    # Client 1: weights 1, e, 1.
    e = math.e
    assert mixed[1][0].tolist() == pytest.approx([3 / (2 + e), 2 * e / (2 + e)], rel=1e-5)
    assert mix_rows(owned, rows, 1e6)[0][1].tolist() == pytest.approx([1.0, 2 / 3], rel=1e-4), "the plain mean"
    assert mix_rows(owned, rows, 1e-3)[1][0].tolist() == pytest.approx([0.0, 2.0]), "its own"


def test_each_client_is_sent_its_own_mixture_and_none_of_the_others() -> None:
    runtime = strategy_runtime("pfedeg")
    assert runtime.server is not None
    assert runtime.server.begin_round(0).personal is None
    train_rounds(runtime, 2)
    trained = {number: client.values.params["global/entity"].clone() for number, client in runtime.clients.items()}
    owned = {number: client.entity_ids for number, client in runtime.clients.items()}
    broadcast = runtime.server.begin_round(3)
    expected = mix_rows(owned, trained, small_config().federation.affinity_temperature)
    for number, client in runtime.clients.items():
        part = client.own_part(broadcast)
        assert part.personal is None
        assert torch.equal(part.entity, expected[number])
        assert not torch.equal(part.entity, broadcast.entity[client.entity_ids])
        client.begin_round(part)
        assert torch.equal(client.values.params["global/entity"], expected[number])


def test_a_client_that_never_sent_is_sent_the_mean() -> None:
    runtime = strategy_runtime("pfedeg")
    runtime.train(1, [0, 1])
    assert runtime.server is not None
    broadcast, client = runtime.server.begin_round(2), runtime.clients[2]
    assert broadcast.personal is not None
    assert set(broadcast.personal) == {0, 1}
    assert torch.equal(client.own_part(broadcast).entity, broadcast.entity[client.entity_ids])


@pytest.mark.parametrize("communication", [{}, {"communication.top_k": 0.3}])
def test_mixtures_have_the_same_bits_in_any_order_and_by_partial_sums(communication: dict[str, Any]) -> None:
    runtime = strategy_runtime("pfedeg", **communication)
    server = runtime.server
    assert server is not None
    train_rounds(runtime, 1)
    before = {name: value.clone() for name, value in server.state().items()}
    broadcast = server.begin_round(2)
    updates = [client.train(2, client.own_part(broadcast))[0] for client in runtime.clients.values()]
    states = []
    for order in [*itertools.permutations(range(3)), None]:
        other = Server(server.config, server.strategy, len(server.global_model.entity), {"text": 12, "image": 8})
        for client in runtime.clients.values():
            other.register(client.hello())
        other.load_state(before)
        other.begin_round(2)
        if order is None:
            sums = RoundSums(other.sum_shape(), 2, other.ownership)
            for update in updates:
                assert update is not None
                sums.add(update)
            other.merge(sums.partial())
        for number in order or ():
            update = updates[number]
            assert update is not None
            other.receive(update)
        other.finish_round()
        personal = other.begin_round(3).personal
        assert personal is not None
        states.append(other.state() | {f"personal/{client}": rows for client, rows in personal.items()})
    assert all(same_values(states[0], state) for state in states)
    for number, client in runtime.clients.items():
        rows = client.values.params["global/entity"]
        known = states[0][f"clients/{number:05d}"]
        if not communication:
            assert torch.equal(known, rows)
        else:
            update = updates[number]
            assert update is not None
            place = torch.searchsorted(client.shared_ids, update.entity_ids)
            assert torch.equal(known[place], rows[place])


# All of them


@pytest.mark.parametrize("strategy", FEDERATED)
def test_the_bytes_of_messages_are_foreseen(strategy: str) -> None:
    runtime = strategy_runtime(strategy)
    experiment = small_experiment({"federation.strategy": strategy, "model.imputer": "zero", **MIXED})
    sizes = MessageSizes(experiment.config, make_strategy(experiment.config), experiment.feature_dims)
    for round_num in (1, 2):
        reports = runtime.train(round_num, [0, 1, 2]).reports
        for data, report in zip(experiment.clients, reports, strict=True):
            assert sizes.per_round(data)[round_num - 1] == report.bytes_up + report.bytes_down


@pytest.mark.parametrize("strategy", FEDERATED)
def test_state_of_clients_and_server_is_all_that_a_round_depends_on(strategy: str) -> None:
    runtime, other = strategy_runtime(strategy), strategy_runtime(strategy)
    train_rounds(runtime, 2)
    assert runtime.server is not None
    assert other.server is not None
    other.server.load_state(copy.deepcopy(runtime.server.state()))
    for number, client in other.clients.items():
        client.load_state(copy.deepcopy(runtime.clients[number].state()))
    assert train_rounds(runtime, 1, start=3) == train_rounds(other, 1, start=3)
    assert same_values(all_values(runtime), all_values(other))


def test_one_client_with_all_data_trains_as_central_training_to_the_bit() -> None:
    """From the same values a round of `fede` with one client is one of `central`, in loss and in every bit.

    What follows differs by the server's fixed point, which cuts tiny values at 2^-41: less than 1e-12.
    """
    settings = {"data.num_clients": 1, "model.imputer": "mean", "model.dropout": 0.3, "training.local_epochs": 3}
    fede = small_runtime({**settings, "federation.strategy": "fede"})
    # Noise and dropout are drawn by the view's name, so central training is that of the federated view.
    central = small_runtime({**settings, "federation.strategy": "central"})
    client, other = fede.clients[0], central.clients[0]
    other.strategy.views = ("global",)
    other.load_state(copy.deepcopy(client.state()))
    assert train_rounds(fede, 1) == [report.losses for report in central.train(1, [0]).reports]
    assert same_values(client.state(), other.state())
    assert client.evaluate("test", 1, choose=False)[0].metrics == other.evaluate("test", 1, choose=False)[0].metrics
    assert fede.server is not None
    after = fede.server.begin_round(2)
    assert torch.allclose(after.entity[client.entity_ids], client.values.params["global/entity"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("federation.proximal_mu", -0.1),
        ("federation.contrastive_weight", float("nan")),
        ("federation.contrastive_temperature", 0.0),
        ("federation.affinity_temperature", 0.0),
        ("evaluation.evaluate_on", "both"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field.replace(".", r"\.")):
        small_config({field: value})
