"""Targets that are messages of clients and server: well-formed ones with strange parts, drawn from an input's bytes."""

import random
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.config import make_config
from fedsim.federated.message_checks import UpdateFormat, find_fault, find_oversized
from fedsim.federated.messages import ClientUpdate, SoftQueries
from fedsim.privacy.secure_aggregation.client_party import ClientParty
from fedsim.privacy.secure_aggregation.messages import MaskedUpdate, PlainInput, Roster, ShareDelivery, UnmaskRequest
from fedsim.privacy.secure_aggregation.server_party import ServerParty
from fedsim.privacy.secure_aggregation.sums import MaskedSums
from fedsim.privacy.set_alignment import AlignmentParty, BlindedNames
from fuzzing.engine import Target
from fuzzing.mutation import Input, any_value

DIM, TOKEN_DIM, LIMIT = 4, 3, 2.0**20
OWNERSHIP = {0: torch.tensor([0, 2, 3]), 1: torch.tensor([1, 2])}
FORM = UpdateFormat(DIM, TOKEN_DIM, 2, {"w": (2, 3), "b": (3,)}, (1, 2, 3), {0: 5, 1: 7}, make_config().communication)
HUGE = 2**40  # elements that a message of a few bytes can claim, by a stride of zero


def update() -> ClientUpdate:
    """Make a right update of client 0 in round 1."""
    present = torch.tensor([[True, False, True], [False, False, True]])
    soft = SoftQueries(torch.zeros(1, 2, TOKEN_DIM), torch.tensor([[0, 2, 3], [3, 2, 0]]), torch.zeros(2, 3))
    modules = {"w": torch.zeros(2, 3), "b": torch.zeros(3)}
    return ClientUpdate(0, 1, 5, OWNERSHIP[0], torch.zeros(3, DIM), modules, present, torch.zeros(3, TOKEN_DIM), soft)


def strange_tensor(generator: random.Random) -> Tensor:
    """Make a tensor that a sum should never see."""
    makers: tuple[Callable[[], Tensor], ...] = (
        lambda: torch.full((3, DIM), float("nan")),
        lambda: torch.full((3, DIM), float("inf")),
        lambda: torch.full((3, DIM), 1e30),
        lambda: torch.zeros(3, DIM, dtype=torch.float64),
        lambda: torch.zeros(3, DIM, dtype=torch.complex64),
        lambda: torch.zeros(3, DIM).to_sparse(),
        lambda: torch.zeros(3, DIM, device="meta"),
        lambda: torch.zeros(3, dtype=torch.int64, device="meta"),
        lambda: torch.zeros(1).expand(HUGE),
        lambda: torch.zeros(1, dtype=torch.int64).expand(HUGE),
        lambda: torch.zeros(1, 1).expand(HUGE, DIM),
        lambda: torch.zeros(1, 1, dtype=torch.int64).expand(2, HUGE),
        lambda: torch.zeros(0),
        lambda: torch.zeros(0, dtype=torch.int64),
        lambda: torch.tensor(1),
        lambda: torch.tensor([3, 2, 0]),
        lambda: torch.tensor([0, 2, 99]),
        lambda: torch.tensor([-1, 2, 3]),
        lambda: torch.tensor([0, 2, 2**62]),
        lambda: torch.zeros(3, DIM, requires_grad=True),
        lambda: torch.nn.Parameter(torch.zeros(3, DIM)),
        lambda: torch.quantize_per_tensor(torch.zeros(3, DIM), 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        lambda: torch.ones(2, 3, dtype=torch.bool),
        lambda: torch.zeros(2, 3),
        lambda: torch.zeros(DIM, 3).T,
    )
    return generator.choice(makers)()


def strange(generator: random.Random) -> Any:
    """Make a part of a message that may be anything that can be sent."""
    kind = generator.randrange(6)
    if kind < 3:
        return strange_tensor(generator)
    if kind == 3:
        return any_value(generator)
    sizes = (0, 1, 15, 16, 31, 32, 33, 48, 64)
    if kind == 4:
        return generator.choice((bytes, generator.randbytes, bytearray))(generator.choice(sizes))
    some = generator.choice((generator.randbytes(16), generator.randbytes(48), any_value(generator), b""))
    return {generator.choice((0, 1, 2, 99, -1, "0", None)): some for _ in range(generator.randrange(4))}


def spoil(generator: random.Random, message: Any) -> Any:
    """Replace one to three fields of a message, or parts of one."""
    for _ in range(generator.choice((1, 1, 2, 3))):
        name = generator.choice([item.name for item in fields(message)])
        value = getattr(message, name)
        if isinstance(value, dict) and value and generator.random() < 0.7:
            changed = dict(value)
            key = generator.choice(list(changed))
            changed[generator.choice((key, key, 99, "x"))] = strange(generator)
            message = replace(message, **{name: changed})
        elif isinstance(value, SoftQueries) and generator.random() < 0.8:
            message = replace(message, **{name: spoil(generator, value)})
        elif isinstance(value, tuple) and value and generator.random() < 0.7:
            place = generator.randrange(len(value))
            part = value[place]
            new = spoil(generator, part) if hasattr(part, "__dataclass_fields__") else strange(generator)
            message = replace(message, **{name: (*value[:place], new, *value[place + 1 :])})
        elif isinstance(value, bytes) and value and generator.random() < 0.5:
            place = generator.randrange(len(value))
            message = replace(message, **{name: value[:place] + generator.randbytes(1) + value[place + 1 :]})
        elif isinstance(value, int) and generator.random() < 0.5:
            message = replace(message, **{name: generator.choice((-1, 0, 1, 2, 3, 10**30, True))})
        else:
            message = replace(message, **{name: strange(generator)})
    return message


def _redraw(generator: random.Random, given: Input, others: Sequence[Input]) -> Input:
    return {"draws.bin": generator.randbytes(8)}


def _generator(folder: Path) -> tuple[random.Random, bool]:
    """Return the generator that an input stands for, and whether it stands for a right message."""
    content = (folder / "draws.bin").read_bytes()
    return random.Random(content), content == RIGHT["draws.bin"]


RIGHT: Input = {"draws.bin": b"right"}


def _check_update(folder: Path) -> None:
    generator, right = _generator(folder)
    sent: Any = update()
    if not right:
        sent = strange(generator) if generator.random() < 0.03 else spoil(generator, sent)
    received = () if right else generator.choice(((), (), (1,), (0,)))
    fault = find_fault(sent, FORM, 1, OWNERSHIP, received, LIMIT)
    assert not right or fault is None
    if fault is None:
        assert isinstance(sent, ClientUpdate)
        assert all(bool(torch.isfinite(value).all()) for value in (sent.entity, *sent.modules.values()))
        assert torch.equal(sent.entity_ids, OWNERSHIP[0])
        assert sent.num_triples == 5
        others = {1: update(), 2: update(), 0: sent}
        find_oversized(others, torch.zeros(4, DIM), {"w": torch.zeros(2, 3), "b": torch.zeros(3)}, 10.0, 1)


def _secure_round(folder: Path) -> None:
    """Play a round of secure aggregation with one message spoilt on its way."""
    generator, right = _generator(folder)
    spoilt = (
        None if right else generator.choice(("keys", "roster", "shares", "delivery", "masked", "request", "revealed"))
    )

    def pass_on(kind: str, message: Any) -> Any:
        return spoil(generator, message) if kind == spoilt else message

    parties = [ClientParty(client, 1, 0.6) for client in range(3)]
    sums = MaskedSums(1, 4, 2, 2, None)
    server = ServerParty(1, [0, 1, 2], 0.6, sums)
    for party in parties:
        server.receive(pass_on("keys", party.advertise()))
    roster: Roster = server.roster()
    for party in parties:
        server.receive(pass_on("shares", party.share(pass_on("roster", roster))))
    deliveries: dict[int, ShareDelivery] = server.deliveries([0, 1, 2])
    for party in parties:
        party.receive(pass_on("delivery", deliveries[party.client]))
        sums.add(pass_on("masked", _masked(party)))
    request: UnmaskRequest = server.request()
    for party in parties:
        server.receive(pass_on("revealed", party.reveal(pass_on("request", request))))
    server.unmask()


def _masked(party: ClientParty) -> MaskedUpdate:
    return party.mask(PlainInput(None, torch.ones(4, 2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)))


def _blind(folder: Path) -> None:
    generator, right = _generator(folder)
    first, second = AlignmentParty(0, ["a", "b"]), AlignmentParty(1, ["b"])
    sent: BlindedNames = first.begin()
    second.blind(sent if right else spoil(generator, sent))


def message_targets() -> list[Target]:
    """Make the targets."""
    return [
        Target("message-update", [RIGHT], _check_update, 2.0, _redraw),
        Target("message-secure", [RIGHT], _secure_round, 0.3, _redraw),
        Target("message-names", [RIGHT], _blind, 0.7, _redraw),
    ]
