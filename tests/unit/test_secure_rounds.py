"""Rounds with secure aggregation end with the bits of rounds without; what the server is sent tells less."""

import dataclasses
from typing import Any

import pytest
import torch

from experiments import MIXED, all_values, small_config, small_runtime
from fedsim.config import Config
from fedsim.errors import ConfigError, RunError
from fedsim.federated.client import Client
from fedsim.federated.messages import ClientUpdate, message_bytes
from fedsim.federated.runtime import InProcessRuntime, make_strategy
from fedsim.federated.server import Server
from fedsim.privacy.secure_aggregation.clients import SecureClients, exchange_keys, reveal_shares
from fedsim.privacy.secure_aggregation.compatibility import check_secure_aggregation
from fedsim.privacy.secure_aggregation.messages import MaskedUpdate
from fedsim.privacy.secure_aggregation.server_party import ServerParty

SECURE: dict[str, Any] = {"secure_aggregation.enabled": True}
HIDDEN = SECURE | {"secure_aggregation.hide_ownership": True}
BASE = {**MIXED, "distillation.num_soft_queries": 0, "model.imputer": "zero"}


def _runtime(overrides: dict[str, Any]) -> InProcessRuntime:
    return small_runtime({**BASE, "federation.strategy": "fede", **overrides})


def _rounds(overrides: dict[str, Any], num_rounds: int = 2) -> InProcessRuntime:
    runtime = _runtime(overrides)
    for round_num in range(1, num_rounds + 1):
        runtime.train(round_num, list(runtime.clients))
    return runtime


@pytest.mark.parametrize("secure", [SECURE, HIDDEN], ids=["known", "hidden"])
@pytest.mark.parametrize(
    "changes",
    [
        {"federation.strategy": "fede"},
        {"federation.strategy": "fedr"},
        {"federation.strategy": "mmfed3", "model.imputer": "diffusion"},
        {"federation.strategy": "fede", "communication.dtype": "float16"},
        {"federation.strategy": "fede", "privacy.noise": "client"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_masks_change_no_bit(changes: dict[str, Any], secure: dict[str, Any]) -> None:
    plain, masked = all_values(_rounds(changes)), all_values(_rounds(changes | secure))
    assert plain.keys() == masked.keys()
    assert all(torch.equal(plain[name], masked[name]) for name in plain)


def test_the_server_is_sent_no_single_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain updates never reach it, and of what does not one number is that of the update."""
    sent: list[MaskedUpdate] = []
    made: dict[int, ClientUpdate] = {}
    receive, update = Server.receive_masked, Client.update

    def keep(self: Server, message: Any) -> None:
        sent.append(message)
        receive(self, message)

    def note(self: Client, *arguments: Any) -> ClientUpdate:
        made[self.data.client] = update(self, *arguments)
        return made[self.data.client]

    monkeypatch.setattr(Server, "receive_masked", keep)
    monkeypatch.setattr(Server, "receive", lambda self, message: pytest.fail("a plain update"))
    monkeypatch.setattr(Client, "update", note)
    _rounds(SECURE, 1)
    assert sorted(message.client for message in sent) == [0, 1, 2]
    for message in sent:
        plain = torch.round(made[message.client].entity.double() * 2**40).to(torch.int64)
        assert message.table.shape == plain.shape
        assert not (message.table == plain).any()


def test_with_hidden_ownership_the_server_does_not_learn_who_owns_what() -> None:
    runtime = _runtime(HIDDEN)
    assert runtime.server is not None
    assert [len(ids) for ids in runtime.server.ownership.values()] == [0, 0, 0]
    shapes = []
    add = runtime.server.receive_masked
    runtime.server.receive_masked = lambda update: (shapes.append(tuple(update.table.shape)), add(update))[1]  # type: ignore[method-assign, func-returns-value]
    runtime.train(1, [0, 1, 2])
    assert set(shapes) == {(40, 8 + 1)}


@pytest.mark.parametrize("secure", [SECURE, HIDDEN], ids=["known", "hidden"])
def test_bytes_by_hand(secure: dict[str, Any]) -> None:
    """With three clients, of n rows and d = 8, and m numbers in modules.

    Up: keys 80, shares 16 + 2 * (8 + 48) = 128, the masked update 16 + 8 (n d + m + 1), 16 + 3 * 24 = 88 at the end.
    Down beside the model: keys 16 + 3 * 80 = 256, shares 16 + 2 * (8 + 48) = 128 and with known ownership 2 * (8 + n)
    flags, at the end 8 + 3 * 8 = 32. With hidden ownership n is 40 and d is 9, for the flag of the owner; the model is
    the whole one.
    """
    runtime = _runtime(secure)
    assert runtime.server is not None
    model = runtime.server.global_model
    num_module = sum(value.numel() for value in model.modules.values())
    hidden = secure is HIDDEN
    for report in runtime.train(1, [0, 1, 2]).reports:
        owned = len(runtime.clients[report.client].entity_ids)
        num_rows, width = (40, 9) if hidden else (owned, 8)
        assert report.bytes_up == 80 + 128 + 16 + 8 * (num_rows * width + num_module + 1) + 88
        flags = 0 if hidden else 2 * (8 + owned)
        assert report.bytes_down == 8 + 4 * (num_rows * 8 + num_module) + 256 + 128 + flags + 32


def _poison(monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    update = Client.update

    def broken(self: Client, *arguments: Any) -> ClientUpdate:
        made = update(self, *arguments)
        if self.data.client != bad:
            return made
        return dataclasses.replace(made, entity=torch.full_like(made.entity, float("nan")))

    monkeypatch.setattr(Client, "update", broken)


def test_a_client_with_a_broken_update_drops_out_and_the_others_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can check a masked update, so its client does; without masks the server rejects it."""
    _poison(monkeypatch, 1)
    allowed = {"federation.max_failed_clients": 1}
    plain, masked = _rounds(allowed, 1), _rounds(allowed | SECURE, 1)
    values = all_values(plain), all_values(masked)
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    with pytest.raises(RunError, match="client 1, round 1: 'entity' in the update is not finite"):
        _rounds(SECURE, 1)


def test_below_the_threshold_nothing_is_unmasked(monkeypatch: pytest.MonkeyPatch) -> None:
    _poison(monkeypatch, 2)
    everybody = {"secure_aggregation.threshold": 1.0, "federation.max_failed_clients": 1}
    with pytest.raises(RunError, match=r"round 1: 2 of 3 clients sent a masked update, .* needs 3 .*not finite"):
        _rounds(SECURE | everybody, 1)


def test_a_plain_update_is_refused_in_a_secure_round() -> None:
    runtime = _runtime(SECURE)
    assert runtime.server is not None
    runtime.server.begin_round(1)
    party = runtime.server.secure_round(1, [0, 1, 2])
    with pytest.raises(RunError, match="round 1: what arrived is no masked update but a str"):
        runtime.server.receive_masked("a plain update")  # type: ignore[arg-type]
    assert isinstance(party, ServerParty)
    assert not party.sums.received


def test_sums_of_masked_updates_from_two_places_are_merged() -> None:
    """As actors do it: each sums what its clients send, and forwards one message."""
    whole = all_values(_rounds({}, 1))
    runtime = _runtime(SECURE)
    server = runtime.server
    assert server is not None
    broadcast = server.begin_round(1)
    party = server.secure_round(1, [0, 1, 2])
    exchange_keys(party, runtime.secure, [0, 1, 2])
    for members in ([2], [0, 1]):
        sums = runtime.secure.sums(server.sum_shape(), 1, server.ownership)
        for client in members:
            for masked, _ in runtime.secure.mask(runtime._train([client], 1, broadcast), server.sum_shape(), broadcast):
                sums.add(masked)
        server.merge(sums.partial())
    reveal_shares(party, runtime.secure)
    server.unmask()
    server.finish_round()
    summed = all_values(runtime)
    assert all(torch.equal(whole[name], summed[name]) for name in whole)


def test_keys_are_new_in_each_round() -> None:
    clients = SecureClients(_runtime(SECURE).secure.config)
    first, second = (clients.advertise([0, 1], round_num)[0] for round_num in (1, 2))
    assert first.mask_key != second.mask_key
    assert message_bytes(first) == 80


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"federation.strategy": "pfedeg"}, "keeps each client's rows at the server"),
        (
            {"federation.strategy": "mmfed3", "distillation.num_soft_queries": 4},
            "set distillation.num_soft_queries to 0",
        ),
        ({"communication.top_k": 0.5}, "set top_k to null"),
        ({"federation.cohort_size": 1}, "set federation.cohort_size to 2 or more"),
        ({"participation.bytes_per_second": 1e6}, "set it to null"),
        ({"federation.aggregator": "median"}, "compares single updates: set it to mean"),
        ({"robustness.max_norm_ratio": 3.0}, "robustness.max_norm_ratio compares the sizes"),
        ({"adversary.attack": "alie"}, "meet at the server"),
        ({"data.alignment": "psu", "secure_aggregation.hide_ownership": True}, "learns who has which id"),
        ({"privacy.noise": "server", "secure_aggregation.hide_ownership": True}, "scales it by who owns what"),
    ],
)
def test_what_needs_single_updates_is_refused(changes: dict[str, Any], what: str) -> None:
    config = _config(changes | SECURE)
    with pytest.raises(ConfigError, match=f"config field 'secure_aggregation.enabled' = True: .*{what}"):
        check_secure_aggregation(config, make_strategy(config))
    allowed = _config(changes)
    check_secure_aggregation(allowed, make_strategy(allowed))


def test_who_sends_nothing_has_nothing_to_mask() -> None:
    config = _config({"federation.strategy": "local"} | SECURE)
    check_secure_aggregation(config, make_strategy(config))


def test_one_client_alone_is_refused() -> None:
    runtime = _runtime(SECURE)
    with pytest.raises(RunError, match="round 1: secure aggregation of one client alone hides nothing"):
        runtime.train(1, [1])


def _config(overrides: dict[str, Any]) -> Config:
    return small_config({**BASE, "federation.strategy": "fede", **overrides})
