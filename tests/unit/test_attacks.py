"""Simulated attacks: by hand, who attacks, and that the rest of a run does not change (method.md section 5)."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from experiments import MIXED, generator, same_values, small_experiment
from fedsim.errors import ConfigError
from fedsim.federated.attacks import ATTACKS, Received, choose_attackers, make_attack, poison_clients
from fedsim.federated.attacks.alie import little_enough
from fedsim.federated.client_batch import train_clients
from fedsim.federated.messages import ClientUpdate
from fedsim.federated.robust import sends_singly
from fedsim.federated.runtime import Experiment, InProcessRuntime
from fedsim.federated.server import Server

CROWD = {**MIXED, "data.num_clients": 4, "model.imputer": "mean", "federation.strategy": "mmfed3"}


def _update(client: int = 0, value: float = 3.0, ids: tuple[int, ...] = (0, 1)) -> ClientUpdate:
    """A client's message in which every number is `value`; its first entity alone has a token."""
    number = len(ids)
    present = torch.arange(number).view(1, -1) == 0
    rows, tokens = torch.full((number, 2), value), torch.full((1, 2), value)
    return ClientUpdate(client, 1, 5, torch.tensor(ids), rows, {"w": torch.full((2, 3), value)}, present, tokens, None)


def _received(num_rows: int = 2) -> Received:
    """What came from the server: ones."""
    return Received(torch.ones(num_rows, 2), {"w": torch.ones(2, 3)})


@pytest.mark.parametrize(
    ("name", "strength", "sent", "token"),
    [
        ("sign_flip", 2.0, -3.0, -6.0),
        ("boost", 4.0, 9.0, 12.0),
        ("free_rider", None, 1.0, 0.0),
        ("tail_flip", None, 3.0, 3.0),
    ],
)
def test_what_one_attacker_sends_by_hand(name: str, strength: float | None, sent: float, token: float) -> None:
    """3 was learned from 1: turned around twice as long 1 - 2 * 2, four times as long 1 + 4 * 2, or 1 is sent back."""
    crafted = ATTACKS[name](strength).craft(_update(), _received(), generator())
    assert crafted.entity.unique().tolist() == [sent]
    assert crafted.modules["w"].unique().tolist() == [sent]
    assert crafted.tokens is not None
    assert crafted.tokens.unique().tolist() == [token]


def test_noise_is_as_long_as_asked() -> None:
    """The honest change is 2 everywhere, so strength 3 is noise with deviation 6 around what was received, 1."""
    update = dataclasses.replace(_update(), entity=torch.full((9000, 2), 3.0), entity_ids=torch.arange(9000))
    crafted = ATTACKS["noise"](3.0).craft(update, _received(9000), generator())
    assert float(crafted.entity.std()) == pytest.approx(6.0, rel=0.02)
    assert float(crafted.entity.mean()) == pytest.approx(1.0, abs=0.2)
    again = ATTACKS["noise"](3.0).craft(update, _received(9000), generator())
    assert torch.equal(again.entity, crafted.entity)


def test_half_precision_stays() -> None:
    half = dataclasses.replace(_update(), entity=torch.full((2, 2), 3.0).half())
    assert ATTACKS["boost"](None).craft(half, _received(), generator()).entity.dtype == torch.float16


def test_a_little_is_enough_by_hand() -> None:
    """N = 50, f = 12: 26 - 12 = 14 supporters, Phi(z) = (38 - 14) / 38 = 0.63158, z = 0.336. Of 10 one needs none."""
    assert little_enough(50, 12) == pytest.approx(0.336, abs=5e-4)
    assert little_enough(10, 1) == 0.0
    assert little_enough(3, 3) == 0.0


def test_colluders_by_hand() -> None:
    """Entity 1 is owned by both: mean 4, deviation 1; entities 0 and 2 by one of them, without deviation.

    ALIE with z = 2 sends 4 - 2 and the lone rows 3 and 5 as they are; the inner product with strength 2, from 1, sends
    1 - 2 * (4 - 1) = -5, 1 - 2 * 2 and 1 - 2 * 4. Tokens are of entities 0 and 1, from 0.
    """
    honest = [_update(0, 3.0, (0, 1)), _update(3, 5.0, (1, 2))]
    for name, rows, shared, tokens in (
        ("alie", ([3.0, 2.0], [2.0, 5.0]), 2.0, (3.0, 5.0)),
        ("inner_product", ([-3.0, -5.0], [-5.0, -7.0]), -5.0, (-6.0, -10.0)),
    ):
        forged = ATTACKS[name](2.0).forge(honest, _received(4), 5, 2)
        assert [update.client for update in forged] == [0, 3]
        for update, expected, token in zip(forged, rows, tokens, strict=True):
            assert update.entity[:, 0].tolist() == expected
            assert update.modules["w"].unique().tolist() == [shared]
            assert update.tokens is not None
            assert update.tokens.unique().tolist() == [token]
    assert ATTACKS["alie"](None).forge([], _received(), 5, 2) == []


def _experiment(**overrides: Any) -> Experiment:
    """An experiment with its attackers, as `prepare` makes it."""
    experiment = small_experiment({**CROWD, **overrides})
    config = choose_attackers(experiment.config, len(experiment.clients))
    return dataclasses.replace(experiment, config=config, clients=poison_clients(experiment.clients, config))


def test_who_attacks_is_drawn_by_the_seed() -> None:
    chosen = [
        _experiment(**{"adversary.attack": "noise", "adversary.share": 0.5, "seed": seed}) for seed in (0, 0, 1, 2)
    ]
    attackers = [item.config.adversary.clients for item in chosen]
    assert all(found is not None and len(found) == 2 and set(found) <= set(range(4)) for found in attackers)
    assert attackers[0] == attackers[1]
    assert len(set(attackers)) > 1
    named = _experiment(**{"adversary.attack": "noise", "adversary.clients": [3, 1, 3]})
    assert named.config.adversary.clients == (1, 3)
    assert small_experiment().config.adversary.clients is None


def test_flipped_tails() -> None:
    """Half of an attacker's training triples have another tail of the client's; nothing else changes, nor do others."""
    before = small_experiment(CROWD)
    after = _experiment(**{"adversary.attack": "tail_flip", "adversary.clients": [1], "adversary.strength": 0.5})
    for client, (old, new) in enumerate(zip(before.clients, after.clients, strict=True)):
        changed = old.train[:, 2] != new.train[:, 2]
        assert changed.sum() == (round(0.5 * len(old.train)) if client == 1 else 0)
        assert np.array_equal(old.train[:, :2], new.train[:, :2])
        assert new.train.min() >= 0
        assert new.train[:, 2].max() < len(new.entity_ids)
        assert np.array_equal(old.groups[0].triples["train"], new.groups[0].triples["train"]), (
            "ranks are filtered alike"
        )
    again = _experiment(**{"adversary.attack": "tail_flip", "adversary.clients": [1], "adversary.strength": 0.5})
    assert np.array_equal(after.clients[1].train, again.clients[1].train)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"adversary.attack": "bribe"}, "'adversary.attack' = 'bribe': unknown name; choose from sign_flip, boost"),
        ({"adversary.attack": "noise", "adversary.clients": [9]}, "names client 9, but the clients are 0 to 3"),
        ({"adversary.attack": "tail_flip", "adversary.strength": 2.0}, "'adversary.strength' = 2: .* at most 1"),
        ({"adversary.attack": "noise", "adversary.clients": [-1]}, "adversary.clients.*greater than or equal to 0"),
        ({"adversary.attack": "noise", "adversary.strength": 0.0}, "adversary.strength.*greater than 0"),
    ],
)
def test_attacks_that_cannot_be_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _experiment(**overrides)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_round_with_attackers(name: str) -> None:
    """Attackers send something else, which the checks let pass; honest clients send what they send without them."""
    plain = InProcessRuntime(_experiment())
    strong = {"adversary.strength": 1.5} if name == "alie" else {}
    attacked = InProcessRuntime(_experiment(**{"adversary.attack": name, "adversary.clients": [1, 2], **strong}))
    results = [runtime.train(1, [0, 1, 2, 3]) for runtime in (plain, attacked)]
    assert results[1].server is not None
    assert results[1].server.num_updates == 4
    assert results[1].server.rejected == ()
    honest = [[report.losses for report in result.reports if report.client in (0, 3)] for result in results]
    assert honest[0] == honest[1]
    assert plain.server is not None
    assert attacked.server is not None
    assert not torch.equal(plain.server.global_model.entity, attacked.server.global_model.entity)
    assert sends_singly(attacked.server.config) == ATTACKS[name].colludes


def test_nobody_attacks_by_default() -> None:
    experiment = _experiment()
    assert make_attack(experiment.config) is None
    runtime, other = InProcessRuntime(experiment), InProcessRuntime(_experiment(**{"adversary.share": 0.9}))
    for made in (runtime, other):
        made.train(1, [0, 1, 2, 3])
    assert runtime.server is not None
    assert other.server is not None
    assert same_values(runtime.server.state(), other.server.state())


@pytest.mark.parametrize("communication", [{}, {"communication.dtype": "float16"}])
def test_collusion_does_not_depend_on_who_arrives_first(communication: dict[str, Any]) -> None:
    runtime = InProcessRuntime(
        _experiment(**{"adversary.attack": "inner_product", "adversary.clients": [0, 2], **communication})
    )
    server = runtime.server
    assert server is not None
    updates = [
        update
        for client in runtime.clients.values()
        for update, _ in train_clients([client], 1, server.begin_round(1))
        if update is not None
    ]
    states = []
    for order in itertools.islice(itertools.permutations(updates), 0, 24, 5):
        other = Server(server.config, server.strategy, len(server.global_model.entity), {"text": 12, "image": 8})
        for client in runtime.clients.values():
            other.register(client.hello())
        other.begin_round(1)
        for update in order:
            other.receive(update)
        assert other.finish_round().num_updates == 4
        states.append(other.state())
    assert all(same_values(state, states[0]) for state in states[1:])


def test_attackers_in_a_batch_are_those_that_train_alone() -> None:
    """Stacked clients send, to 1e-4, what they send one by one; the attack's draws are the client's own."""
    options = {"adversary.attack": "noise", "adversary.clients": [0, 3]}
    states = []
    for batch in (1, 4):
        runtime = InProcessRuntime(_experiment(**options, **{"runtime.clients_per_batch": batch}))
        runtime.train(1, [0, 1, 2, 3])
        assert runtime.server is not None
        states.append(runtime.server.state())
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=1e-4), name
