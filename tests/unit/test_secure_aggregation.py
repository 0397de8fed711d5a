"""Secure aggregation: the server's sum is the plain sum, whoever drops out; no single update can be unmasked."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.errors import RunError
from fedsim.federated.messages import message_bytes
from fedsim.privacy.secure_aggregation.client_party import ClientParty, sign_of
from fedsim.privacy.secure_aggregation.clients import unmasking_bytes
from fedsim.privacy.secure_aggregation.keys import MaskStream, add_mask, private_key, public_key
from fedsim.privacy.secure_aggregation.messages import (
    EncryptedShares,
    KeyAdvertisement,
    MaskedUpdate,
    PlainInput,
    RevealedShares,
    Roster,
    ShareDelivery,
    UnmaskRequest,
)
from fedsim.privacy.secure_aggregation.server_party import ServerParty
from fedsim.privacy.secure_aggregation.sharing import join_shares, split_secret, threshold_of
from fedsim.privacy.secure_aggregation.sums import MaskedSums

ROUND = 4
NUM_ROWS, WIDTH, NUM_COMMON = 7, 3, 5


@dataclass
class Federation:
    """A round with made-up inputs, its phases one by one; `lost` is who goes away before each phase."""

    num_clients: int
    threshold: float = 0.6
    hidden: bool = False
    seed: int = 0
    inputs: dict[int, PlainInput] = field(init=False)
    parties: dict[int, ClientParty] = field(init=False)
    server: ServerParty = field(init=False)

    def __post_init__(self) -> None:
        draws = torch.Generator().manual_seed(self.seed)
        clients = [10 * number + 3 for number in range(self.num_clients)]
        ownership = {c: (torch.rand(NUM_ROWS, generator=draws) < 0.6).nonzero().flatten() for c in clients}
        self.inputs = {}
        for client, rows in ownership.items():
            num_rows = NUM_ROWS if self.hidden else len(rows)
            table, common = (
                torch.randint(-(2**45), 2**45, shape, generator=draws) for shape in ((num_rows, WIDTH), (NUM_COMMON,))
            )
            self.inputs[client] = PlainInput(None if self.hidden else rows, table, common)
        self.parties = {client: ClientParty(client, ROUND, self.threshold) for client in clients}
        sums = MaskedSums(ROUND, NUM_ROWS, WIDTH, NUM_COMMON, None if self.hidden else ownership)
        self.server = ServerParty(ROUND, clients, self.threshold, sums)

    def advertise(self, lost: Collection[int] = ()) -> "Federation":
        for client in self.parties.keys() - set(lost):
            self.server.receive(self.parties[client].advertise())
        return self

    def share(self, lost: Collection[int] = ()) -> "Federation":
        roster = self.server.roster()
        for client in set(roster.clients) - set(lost):
            self.server.receive(self.parties[client].share(roster))
        return self

    def deliver(self) -> "Federation":
        for client, delivery in self.server.deliveries(list(self.parties)).items():
            self.parties[client].receive(delivery)
        return self

    def mask(self, lost: Collection[int] = ()) -> "Federation":
        for client in self.server.shares.keys() - set(lost):
            self.server.sums.add(self.parties[client].mask(self.inputs[client]))
        return self

    def reveal(self, lost: Collection[int] = ()) -> "Federation":
        request = self.server.request()
        for client in set(request.survivors) - set(lost):
            self.server.receive(self.parties[client].reveal(request))
        return self

    def plain_sum(self, clients: Collection[int]) -> tuple[Tensor, Tensor]:
        table, common = torch.zeros(NUM_ROWS, WIDTH, dtype=torch.int64), torch.zeros(NUM_COMMON, dtype=torch.int64)
        for client in clients:
            one = self.inputs[client]
            table[slice(None) if one.rows is None else one.rows] += one.table
            common += one.common
        return table, common


def _until(phase: str, **options: int) -> Federation:
    """Play a round of three clients up to a phase."""
    federation = Federation(3, **options)
    for name in ("advertise", "share", "deliver", "mask", "reveal"):
        if name == phase:
            break
        getattr(federation, name)()
    return federation


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_sum_is_that_of_the_survivors_or_nothing(data: st.DataObject) -> None:
    """Over clients, thresholds and dropouts at each phase: the plain sum to the bit, or an error if too few stay."""
    share = data.draw(st.sampled_from([0.51, 0.67, 0.8, 1.0]), label="threshold")
    federation = Federation(
        data.draw(st.integers(2, 7), label="clients"), share, data.draw(st.booleans(), label="hidden"),
        data.draw(st.integers(0, 99), label="seed"),
    )  # fmt: skip
    needed = threshold_of(share, federation.num_clients)
    alive = set(federation.parties)
    steps: list[tuple[str, Callable[[Collection[int]], object]]] = [
        ("advertise", federation.advertise),
        ("share", federation.share),
        ("mask", federation.mask),
        ("reveal", federation.reveal),
    ]
    senders: set[int] = set()
    for name, play in steps:
        lost = data.draw(st.sets(st.sampled_from(sorted(alive)), max_size=2), label=f"lost before {name}")
        alive -= lost
        if name == "mask":
            federation.deliver()
        play(lost)
        if len(alive) < needed:
            close = {"advertise": federation.server.roster, "share": lambda: federation.server.deliveries([])}
            close |= {"mask": federation.server.request, "reveal": federation.server.unmask}
            with pytest.raises(RunError, match=rf"{len(alive)} of {federation.num_clients} clients .* needs {needed}"):
                close[name]()
            return
        if name == "mask":
            senders = set(alive)
    federation.server.unmask()
    table, common = federation.plain_sum(senders)
    assert torch.equal(federation.server.sums.table, table)
    assert torch.equal(federation.server.sums.common, common)


def test_masked_updates_have_nothing_of_their_input() -> None:
    """Inputs of zeros: every number that is sent is uniform, its mean bit 1/2 within 5 deviations of 45,000 bits."""
    federation = _until("mask")
    bits = []
    for client, party in federation.parties.items():
        plain = federation.inputs[client]
        rows = torch.zeros(len(plain.table), 200, dtype=torch.int64)
        masked = party.mask(PlainInput(plain.rows, rows, torch.zeros(20, dtype=torch.int64)))
        numbers = torch.cat([masked.table.flatten(), masked.common])
        assert (numbers == 0).sum() == 0
        bits.append((numbers.unsqueeze(1) >> torch.arange(64)) & 1)
    flat = torch.cat(bits).double().flatten()
    assert abs(float(flat.mean()) - 0.5) < 5 * 0.5 / len(flat) ** 0.5


def test_pairs_of_masks_cancel_by_hand() -> None:
    """Client 3 adds the mask that it has with 13, and 13 subtracts it: rows that both have sum to what they were."""
    assert (sign_of(3, 13), sign_of(13, 3)) == (1, -1)
    table, common = torch.zeros(4, 2, dtype=torch.int64), torch.tensor([2**63 - 1])
    add_mask(bytes(32), common, table, torch.tensor([1, 2]), 1)
    assert (table[[0, 3]] == 0).all()
    assert (table[[1, 2]] != 0).all()
    add_mask(bytes(32), common, table, torch.tensor([1, 2]), -1)
    assert (table == 0).all()
    assert common.tolist() == [2**63 - 1]


def test_a_long_mask_is_one_stream() -> None:
    """In chunks it is the stream in one piece, of ChaCha20: RFC 8439, appendix A.1, vector 1, a key of zeros."""
    first = MaskStream(bytes(32)).draw(1)
    assert first.numpy().tobytes().hex() == "76b8e0ada0f13d90"
    stream = MaskStream(bytes(32))
    pieces = torch.cat([stream.draw(count) for count in (5, 1, 10)])
    assert torch.equal(pieces, MaskStream(bytes(32)).draw(16))
    table, common = torch.zeros(70_000, 2, dtype=torch.int64), torch.zeros(70_000, dtype=torch.int64)
    add_mask(bytes(32), common, table, None, 1)
    stream = MaskStream(bytes(32))
    whole = torch.cat([stream.draw(count) for count in [30_000] * 7])
    assert torch.equal(torch.cat([common, table.flatten()]), whole)


@pytest.mark.parametrize(
    ("share", "num_clients", "expected"), [(0.51, 2, 2), (2 / 3, 3, 2), (0.51, 10, 6), (0.67, 100, 67), (1.0, 7, 7)]
)
def test_thresholds_by_hand(share: float, num_clients: int, expected: int) -> None:
    assert threshold_of(share, num_clients) == expected


@settings(max_examples=15, deadline=None)
@given(secret=st.binary(min_size=16, max_size=16), data=st.data())
def test_any_t_shares_join_and_fewer_do_not(secret: bytes, data: st.DataObject) -> None:
    number = data.draw(st.integers(2, 6))
    threshold = data.draw(st.integers(2, number))
    shares = dict(enumerate(split_secret(secret, threshold, number), start=1))
    chosen = data.draw(st.permutations(sorted(shares)))[:threshold]
    assert join_shares({index: shares[index] for index in chosen}, threshold) == secret
    fewer = chosen[:-1]
    assert join_shares({index: shares[index] for index in fewer}, threshold - 1) != secret


def test_a_client_never_reveals_both_secrets_of_another() -> None:
    federation = _until("reveal")
    request = federation.server.request()
    party = federation.parties[3]
    with pytest.raises(
        RunError, match="client 3, round 4: refused to reveal both the self-mask and the key of client 13"
    ):
        party.reveal(dataclasses.replace(request, dropped=(13,)))
    with pytest.raises(RunError, match="asked to reveal in the phase 'done'"):
        party.reveal(request)


@pytest.mark.parametrize(
    ("survivors", "dropped", "what"),
    [
        ((3, 13, 23, 33), (), "other clients than those who shared"),
        ((3, 13), (), "other clients than those who shared"),
        ((13, 23), (3,), "as if this client had sent nothing"),
        ((3,), (13, 23), "the sum of 1 clients, 2 must be in it"),
    ],
)
def test_requests_that_do_not_fit_are_refused(survivors: tuple[int, ...], dropped: tuple[int, ...], what: str) -> None:
    with pytest.raises(RunError, match=what):
        _until("reveal").parties[3].reveal(UnmaskRequest(ROUND, survivors, dropped))


def test_a_client_answers_once_so_two_lists_get_nothing() -> None:
    """A server that tells half of the clients that 23 survived and half that it dropped has too few shares of each."""
    federation = _until("reveal")
    told = {3: UnmaskRequest(ROUND, (3, 13, 23), ()), 13: UnmaskRequest(ROUND, (3, 13), (23,))}
    answers = [federation.parties[client].reveal(request) for client, request in told.items()]
    assert sum(23 in answer.self_seeds for answer in answers) < federation.server.threshold
    assert sum(23 in answer.mask_seeds for answer in answers) < federation.server.threshold
    for client, request in told.items():
        with pytest.raises(RunError, match="in the phase 'done'"):
            federation.parties[client].reveal(request)


def _tampered_roster(roster: Roster, change: Callable[[list[KeyAdvertisement]], list[KeyAdvertisement]]) -> Roster:
    return dataclasses.replace(roster, keys=tuple(change(list(roster.keys))))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda keys: keys[1:], "are not those that this client advertised"),
        (lambda keys: [dataclasses.replace(keys[0], mask_key=bytes(32)), *keys[1:]], "not those that this client"),
        (lambda keys: keys[::-1], "not in the order of clients, each once"),
        (lambda keys: [*keys, keys[-1]], "not in the order of clients, each once"),
        (lambda keys: [*keys[:-1], dataclasses.replace(keys[0], client=99)], "two clients advertise the same key"),
        (lambda keys: keys[:1], "1 clients advertised keys, the server asks for 2"),
        (lambda keys: [dataclasses.replace(key, round_num=9) for key in keys], "keys are of round 9"),
        (lambda keys: [*keys[:-1], dataclasses.replace(keys[-1], mask_key=b"x")], "must be 32 bytes, not 1 bytes"),
    ],
)
def test_a_roster_that_is_not_right_is_refused(
    change: Callable[[list[KeyAdvertisement]], list[KeyAdvertisement]], what: str
) -> None:
    federation = _until("share")
    with pytest.raises(RunError, match=what):
        federation.parties[3].share(_tampered_roster(federation.server.roster(), change))


def test_a_threshold_that_the_server_lowers_is_refused() -> None:
    federation = _until("share")
    with pytest.raises(RunError, match="asks for 1 to unmask, and this client for at least 2"):
        federation.parties[3].share(dataclasses.replace(federation.server.roster(), threshold=1))


def test_a_key_that_agrees_with_everybody_is_refused() -> None:
    """The point of order one: the agreed secret would be zero."""
    federation = _until("share")
    weak = _tampered_roster(
        federation.server.roster(), lambda keys: [*keys[:-1], dataclasses.replace(keys[-1], encryption_key=bytes(32))]
    )
    with pytest.raises(RunError, match="from client 3 to client 23, round 4: not a usable public key"):
        federation.parties[3].share(weak)


def test_shares_that_were_changed_swapped_or_are_too_few_are_refused() -> None:
    def delivery(federation: Federation, client: int) -> ShareDelivery:
        return federation.server.deliveries([client])[client]

    federation = _until("deliver")
    right = delivery(federation, 3)
    flipped = dict(right.ciphertexts) | {13: bytes([right.ciphertexts[13][0] ^ 1]) + right.ciphertexts[13][1:]}
    swapped = {13: right.ciphertexts[23], 23: right.ciphertexts[13]}
    for texts in (flipped, swapped):
        with pytest.raises(RunError, match=r"from client 13 to client 3, round 4: .* changed on their way"):
            federation.parties[3].receive(dataclasses.replace(right, ciphertexts=texts))
        federation = _until("deliver")
        right = delivery(federation, 3)
        swapped = {13: right.ciphertexts[23], 23: right.ciphertexts[13]}
    with pytest.raises(RunError, match="1 clients shared their keys, 2 must"):
        federation.parties[3].receive(ShareDelivery(3, ROUND, {}, {}))
    with pytest.raises(RunError, match="got the shares that client 13 was sent"):
        federation.parties[23].receive(delivery(federation, 13))


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (KeyAdvertisement(99, ROUND, bytes(32), bytes(32)), "of a client that does not take part"),
        (KeyAdvertisement(3, ROUND - 1, bytes(32), bytes(32)), "KeyAdvertisement is stale, the server is in round 4"),
        (KeyAdvertisement(3, ROUND, bytes(31), bytes(32)), "encryption_key must be 32 bytes, not 31 bytes"),
        (EncryptedShares(3, ROUND, {13: bytes(47)}), "shares for client 13 must be 48 bytes, not 47"),
        (RevealedShares(3, ROUND, {13: bytes(15)}, {}), "share of client 13 must be 16 bytes, not 15"),
    ],
)
def test_messages_that_do_not_belong_are_refused(message: KeyAdvertisement, what: str) -> None:
    with pytest.raises(RunError, match=what):
        Federation(3).server.receive(message)


def test_a_message_that_comes_twice_is_refused() -> None:
    federation = Federation(3)
    message = federation.parties[3].advertise()
    federation.server.receive(message)
    with pytest.raises(RunError, match="client 3, round 4: KeyAdvertisement came a second time"):
        federation.server.receive(message)
    with pytest.raises(RunError, match="asked to advertise in the phase 'share'"):
        federation.parties[3].advertise()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"round_num": 3}, "the masked update is stale"),
        ({"client": 99}, "a client that is not registered"),
        ({"table": torch.zeros(1, WIDTH, dtype=torch.int64)}, "'table' of the masked update is torch.int64"),
        ({"common": torch.zeros(NUM_COMMON)}, "'common' of the masked update is torch.float32"),
    ],
)
def test_masked_updates_that_do_not_belong_never_touch_the_sum(change: Mapping[str, object], what: str) -> None:
    federation = _until("mask")
    update = federation.parties[3].mask(federation.inputs[3])
    sums = federation.server.sums
    with pytest.raises(RunError, match=what):
        sums.add(dataclasses.replace(update, **change))  # type: ignore[arg-type]
    assert not sums.received
    assert not sums.table.any()
    assert not sums.common.any()
    sums.add(update)
    with pytest.raises(RunError, match="a second masked update"):
        sums.add(update)


def test_partial_sums_are_the_sums() -> None:
    """Two actors sum their clients; the server merges, in any order, and takes none twice."""
    federation = _until("mask")
    ownership = federation.server.sums.ownership
    parts = [MaskedSums(ROUND, NUM_ROWS, WIDTH, NUM_COMMON, ownership) for _ in range(2)]
    for number, (client, party) in enumerate(federation.parties.items()):
        parts[number % 2].add(party.mask(federation.inputs[client]))
    for part in reversed(parts):
        federation.server.sums.merge(part.partial())
    with pytest.raises(RunError, match="client 3, round 4: a second masked update"):
        federation.server.sums.merge(parts[0].partial())
    with pytest.raises(RunError, match="masked sums of round 9 are stale"):
        federation.server.sums.merge(dataclasses.replace(parts[0].partial(), round_num=9))
    federation.reveal()
    federation.server.unmask()
    assert torch.equal(federation.server.sums.table, federation.plain_sum(federation.parties)[0])


def test_a_key_that_does_not_join_is_found() -> None:
    federation = _until("mask")
    federation.mask(lost=[23])
    request = federation.server.request()
    for client in request.survivors:
        revealed = federation.parties[client].reveal(request)
        federation.server.receive(dataclasses.replace(revealed, mask_seeds={23: bytes(16)}))
    with pytest.raises(RunError, match="the shares of client 23's key, who dropped out, do not join"):
        federation.server.unmask()


def test_one_client_alone_is_refused() -> None:
    with pytest.raises(RunError, match="of one client alone hides nothing"):
        Federation(1)


def test_bytes_by_hand() -> None:
    """Advertising: 2 numbers, 2 keys: 80. Unmasking three: a number and 3 ids down, 2 numbers and 3 x (8 + 16) up."""
    federation = _until("share")
    roster = federation.server.roster()
    assert message_bytes(roster.keys[0]) == 16 + 64
    assert message_bytes(roster) == 16 + 3 * 80
    assert message_bytes(federation.parties[3].share(roster)) == 16 + 2 * (8 + 48)
    assert unmasking_bytes(3) == (8 + 24, 16 + 72)


def test_seeds_make_the_keys() -> None:
    """What is shared is the seed: it alone decides the key."""
    assert public_key(private_key(bytes(16))) == public_key(private_key(bytes(16)))
    assert public_key(private_key(bytes(16))) != public_key(private_key(bytes([1]) + bytes(15)))


def test_what_is_sent_of_the_secrets() -> None:
    """No message of a client has a field for a secret but in shares; a new field must be thought about here."""
    classes = (KeyAdvertisement, EncryptedShares, MaskedUpdate, RevealedShares)
    assert {cls.__name__: [item.name for item in dataclasses.fields(cls)] for cls in classes} == {
        "KeyAdvertisement": ["client", "round_num", "encryption_key", "mask_key"],
        "EncryptedShares": ["client", "round_num", "ciphertexts"],
        "MaskedUpdate": ["client", "round_num", "table", "common"],
        "RevealedShares": ["client", "round_num", "self_seeds", "mask_seeds"],
    }
