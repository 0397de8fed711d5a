"""The server: aggregation by hand, refusals, prototypes and state (method.md eq. 3 and 11)."""

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from experiments import COUPLINGS, small_config, small_runtime
from fedsim.errors import RunError
from fedsim.federated.aggregation import PartialSums, RoundSums
from fedsim.federated.compression import SentTokens
from fedsim.federated.messages import ClientHello, ClientUpdate, PrototypeTable
from fedsim.federated.runtime import InProcessRuntime, make_strategy
from fedsim.federated.server import Server

OWNED = {0: [0, 1], 1: [1, 2], 2: [1, 3]}
TRIPLES = {0: 10, 1: 20, 2: 10}


def _server(**overrides: Any) -> Server:
    config = small_config({"model.dim": 2, "federation.strategy": "fede", "model.imputer": "zero", **overrides})
    server = Server(config, make_strategy(config), 5, {"text": 3})
    for client, ids in OWNED.items():
        server.register(ClientHello(client, torch.tensor(ids), TRIPLES[client]))
    server.begin_round(1)
    return server


def _update(server: Server, client: int, value: float, **changes: Any) -> ClientUpdate:
    """A client's message in which every number is `value`; its second entity alone has a text token."""
    modules = {name: torch.full_like(tensor, value) for name, tensor in server.global_model.modules.items()}
    sends_tokens = server.sum_shape().form.num_modalities > 0
    update = ClientUpdate(
        client,
        1,
        TRIPLES[client],
        torch.tensor(OWNED[client]),
        torch.full((2, 2), value),
        modules,
        torch.tensor([[False, True]]) if sends_tokens else None,
        torch.full((1, 2), value) if sends_tokens else None,
        None,
    )
    return replace(update, **changes)


def test_rows_and_modules_by_hand() -> None:
    """The clients send 1, 2 and 6.

    Entity 0 is client 0's alone: 1. Entity 1 is everybody's: (1 + 2 + 6) / 3 = 3. Nobody owns entity 4. Modules weigh
    10, 20 and 10 triples: (10 * 1 + 20 * 2 + 10 * 6) / 40 = 2.75.
    """
    server = _server()
    before = server.global_model.entity.clone()
    for client, value in ((0, 1.0), (1, 2.0), (2, 6.0)):
        server.receive(_update(server, client, value))
    report = server.finish_round()
    assert report.num_updates == 3
    assert server.global_model.entity[:4, 0].tolist() == [1.0, 3.0, 2.0, 6.0]
    assert torch.equal(server.global_model.entity[4], before[4])
    for name, value in server.global_model.modules.items():
        assert torch.allclose(value, torch.full_like(value, 2.75)), name


def test_a_partial_cohort_weighs_those_who_came() -> None:
    """Clients 0 and 1 alone: modules (10 * 1 + 20 * 4) / 30 = 3; entity 1 is (1 + 4) / 2."""
    server = _server()
    server.receive(_update(server, 0, 1.0))
    server.receive(_update(server, 1, 4.0))
    server.finish_round()
    assert float(server.global_model.entity[1, 0]) == 2.5
    assert torch.allclose(server.global_model.modules["fusion.weight_in"], torch.tensor(3.0))


def test_the_order_of_arrival_does_not_matter_to_the_bit() -> None:
    states = []
    for order in itertools.permutations(OWNED):
        server = _server(**{"federation.strategy": "mmfed3", "model.imputer": "diffusion"})
        for client in order:
            server.receive(_update(server, client, 0.1 * (client + 1) / 3))
        server.finish_round()
        states.append(server.state())
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())


def test_messages_that_do_not_belong_are_refused_and_change_nothing() -> None:
    server = _server()
    server.receive(_update(server, 0, 1.0))
    good = _update(server, 1, 2.0)
    large = {name: torch.full_like(value, 1e5) for name, value in good.modules.items()}
    for update, message in (
        (_update(server, 0, 5.0), "client 0, round 1: a second update"),
        (replace(good, round_num=7), "client 1, round 7: the update is stale, the server is in round 1"),
        (replace(good, entity_ids=torch.tensor([0, 1])), "rows of entities that the client does not own"),
        (replace(good, entity=torch.full((2, 2), float("nan"))), "'entity' in the update is not finite; lower"),
        (replace(good, modules=large), "beyond what can be summed"),
    ):
        with pytest.raises(RunError, match=message):
            server.receive(update)
    server.receive(good)
    server.finish_round()
    assert server.global_model.entity[:3, 0].tolist() == [1.0, 1.5, 2.0]


def _partial(server: Server, *clients: int) -> PartialSums:
    sums = RoundSums(server.sum_shape(), 1, server.ownership)
    for client in clients:
        sums.add(_update(server, client, 0.1 * (client + 1) / 3))
    return sums.partial()


def test_partial_sums_end_in_the_bits_of_single_updates() -> None:
    overrides = {"federation.strategy": "mmfed3", "model.imputer": "diffusion"}
    alone, merged = _server(**overrides), _server(**overrides)
    for client in OWNED:
        alone.receive(_update(alone, client, 0.1 * (client + 1) / 3))
    merged.merge(_partial(merged, 2, 0))
    merged.merge(_partial(merged, 1))
    assert alone.finish_round().num_updates == merged.finish_round().num_updates == 3
    expected = alone.state()
    assert all(torch.equal(value, expected[name]) for name, value in merged.state().items())


def test_partial_sums_that_do_not_belong_are_refused() -> None:
    server = _server()
    server.merge(_partial(server, 0))
    unknown = replace(_partial(server, 1), clients=(7,))
    for partial, message in (
        (_partial(server, 1, 0), "client 0, round 1: a second update in the same round"),
        (replace(_partial(server, 1), round_num=3), "partial sums of round 3 are stale, this is round 1"),
        (unknown, "client 7, round 1: an update of a client that is not registered"),
    ):
        with pytest.raises(RunError, match=message):
            server.merge(partial)
    assert server.finish_round().num_updates == 1


def test_prototypes_by_hand_and_the_old_ones_stay() -> None:
    """Round 1: entity 1 has client 0's token 1, entities 2 and 3 have 2 and 6. In round 2 client 2 alone sends 8."""
    server = _server(**{"federation.strategy": "mmfed3", "distillation.server_steps": 0})
    for client, value in ((0, 1.0), (1, 2.0), (2, 6.0)):
        server.receive(_update(server, client, value))
    server.finish_round()
    table = server.global_model.prototypes
    assert table is not None
    assert table.values[0, :, 0].tolist() == [0.0, 1.0, 2.0, 6.0, 0.0]
    assert table.counts.tolist() == [[0, 1, 1, 1, 0]]
    server.begin_round(2)
    server.receive(_update(server, 2, 8.0, round_num=2))
    server.finish_round()
    table = server.global_model.prototypes
    assert table is not None
    assert table.values[0, :, 0].tolist() == [0.0, 1.0, 2.0, 8.0, 0.0]
    assert table.rounds.tolist() == [[0, 1, 1, 2, 0]]


def _mmfed3(**overrides: Any) -> InProcessRuntime:
    return small_runtime({"data.missing_rate": {"text": 0.2, "image": 0.2}, "data.num_clients": 3, **overrides})


def test_a_client_is_shown_the_prototypes_of_the_others_alone() -> None:
    """Eq. 11 with a client's own tokens taken out, recomputed from the clients' messages."""
    runtime = _mmfed3()
    runtime.train(1, [0, 1, 2])
    assert runtime.server is not None
    sent = {number: client.exchange.sent for number, client in runtime.clients.items()}
    broadcast = runtime.server.begin_round(2)
    for number, client in runtime.clients.items():
        client.join(broadcast.for_entities(client.entity_ids))
        assert client.prototypes is not None
        for row, entity in enumerate(client.entity_ids.tolist()):
            for modality in range(2):
                tokens = []
                for other, message in sent.items():
                    place = (runtime.clients[other].entity_ids == entity).nonzero().flatten()
                    if other != number and len(place) and message is not None and message.rounds[modality, place[0]]:
                        tokens.append(message.values[modality, place[0]])
                assert bool(client.prototypes.present[modality, row]) == bool(tokens)
                if tokens:
                    expected = torch.stack(tokens).mean(0)
                    assert torch.allclose(client.prototypes.values[modality, row], expected, atol=1e-5)
                else:
                    assert float(client.prototypes.values[modality, row].abs().max()) == 0.0


def test_an_old_message_is_not_taken_out_of_newer_prototypes() -> None:
    """Client 0's token 1 of round 1 was replaced by others' of round 2: what is left is theirs, unchanged."""
    runtime = _mmfed3()
    client = runtime.clients[0]
    assert runtime.server is not None
    num = len(client.entity_ids)
    client.exchange.sent = SentTokens(torch.ones(2, num, 8), torch.ones(2, num).long())
    table = PrototypeTable(torch.full((2, num, 8), 5.0), torch.ones(2, num).long(), torch.full((2, num), 2))
    broadcast = runtime.server.begin_round(3).for_entities(client.entity_ids)
    client.join(replace(broadcast, prototypes=table))
    assert client.prototypes is not None
    assert bool(client.prototypes.present.all())
    assert bool((client.prototypes.values == 5.0).all())
    client.join(replace(broadcast, prototypes=replace(table, rounds=table.rounds - 1)))
    assert client.prototypes is not None
    assert not bool(client.prototypes.present.any()), "its own token was the only one"


def test_state_goes_back_and_forth() -> None:
    runtime = _mmfed3()
    runtime.train(1, [0, 1, 2])
    other = _mmfed3()
    assert runtime.server is not None
    assert other.server is not None
    other.server.load_state(copy.deepcopy(runtime.server.state()))
    for number, client in other.clients.items():
        client.load_state(copy.deepcopy(runtime.clients[number].state()))
    assert runtime.train(2, [0, 1, 2]).reports[0].losses == other.train(2, [0, 1, 2]).reports[0].losses
    again = other.server.state()
    assert all(torch.equal(value, again[name]) for name, value in runtime.server.state().items())


def test_clients_without_a_message_keep_their_state() -> None:
    """A cohort of one: the others' private state does not move, and ownership is still everybody's."""
    runtime = _mmfed3(**dict.fromkeys((f"distillation.{name}" for name in COUPLINGS), 0.0))
    before = {name: value.clone() for name, value in runtime.clients[1].state().items()}
    runtime.train(1, [0])
    after = runtime.clients[1].state()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
