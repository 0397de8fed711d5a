"""Private set union and intersection: right for any sets, and what is sent tells nothing of the names."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import write_tiny_dataset
from experiments import small_config
from fedsim.data.alignment import align_names
from fedsim.errors import DataError
from fedsim.federated.runtime import prepare
from fedsim.privacy import set_alignment
from fedsim.privacy.set_alignment import (
    AlignmentParty,
    BlindedNames,
    hash_to_point,
    private_intersection,
    private_union,
)

NAMES = st.lists(st.text("abé", max_size=3), unique=True, max_size=5)


def _parties(*names: Sequence[str]) -> list[AlignmentParty]:
    return [AlignmentParty(number, own) for number, own in enumerate(names)]


@settings(max_examples=20, deadline=None)
@given(sets=st.lists(NAMES, min_size=1, max_size=4))
def test_equal_names_have_equal_ids_and_others_have_others(sets: list[list[str]]) -> None:
    union = private_union(_parties(*sets))
    pairs = {
        (name, index) for client, names in enumerate(sets) for name, index in zip(names, union.ids[client], strict=True)
    }
    everything = {name for names in sets for name in names}
    assert {name for name, _ in pairs} == everything
    assert len(pairs) == len(everything) == union.num_names
    assert sorted(index for _, index in pairs) == list(range(union.num_names))


@settings(max_examples=10, deadline=None)
@given(first=NAMES, second=NAMES)
def test_the_intersection_is_the_intersection(first: list[str], second: list[str]) -> None:
    found = private_intersection(*_parties(first, second))
    assert [first[place] for place in found] == [name for name in first if name in second]


def test_bytes_by_hand() -> None:
    """Three clients with 1, 2 and 1 names: four points of 32 bytes, each sent on by three clients: 384."""
    assert private_union(_parties(["a"], ["a", "b"], ["c"])).num_bytes == 4 * 32 * 3


def test_a_name_is_a_point_of_the_curve() -> None:
    """The base point of Curve25519 has x = 9: 9^3 + 486662 * 81 + 9 = 39420360 is a square, as it is for every hash."""
    p = 2**255 - 19

    def is_square(x: int) -> bool:
        return pow(x**3 + 486662 * x**2 + x, (p - 1) // 2, p) == 1

    assert is_square(9)
    assert not is_square(2)  # the smallest number that is on the twist
    hashes = [int.from_bytes(hash_to_point(f"name {number}"), "little") for number in range(40)]
    assert all(is_square(x) for x in hashes)
    assert len(set(hashes)) == 40


def test_what_is_sent_is_never_a_hash_and_never_the_same() -> None:
    """Whoever sees the points can't look names up: they differ between runs and clients, and so does their order."""
    names = [f"name {number}" for number in range(12)]
    one, other, again = AlignmentParty(0, names), AlignmentParty(1, names), AlignmentParty(0, names)
    sent = [set(party.begin().points) for party in (one, other, again)]
    hashes = {hash_to_point(name) for name in names}
    assert all(points.isdisjoint(hashes) for points in sent)
    assert sent[0].isdisjoint(sent[1] | sent[2])
    both = [other.blind(one.begin()).points, one.blind(other.begin()).points]
    assert set(both[0]) == set(both[1])
    assert both[0] != both[1]  # one of 12! orders


def test_ids_do_not_follow_the_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last to blind another's names knows the final points; their order must not be that of the ids."""
    finals: list[tuple[bytes, ...]] = []
    blind = AlignmentParty.blind

    def spy(self: AlignmentParty, names: BlindedNames) -> BlindedNames:
        blinded = blind(self, names)
        finals.append(blinded.points)
        return blinded

    monkeypatch.setattr(AlignmentParty, "blind", spy)
    parties = _parties([f"{number}" for number in range(12)], ["x"])
    ids = private_union(parties).ids[0]
    final = finals[2]  # two clients begin, then the second blinds the first's
    by_point = [ids[parties[0]._order[place]] for place in sorted(range(12), key=lambda place: final[place])]
    assert by_point != sorted(ids)


def test_names_that_are_there_twice_are_refused() -> None:
    with pytest.raises(DataError, match="client 4: the name 'b' is there twice"):
        AlignmentParty(4, ["a", "b", "b"])


@pytest.mark.parametrize(("point", "what"), [(b"short", "has 5 bytes instead of 32"), (bytes(32), "is not a point")])
def test_what_is_no_point_is_refused(point: bytes, what: str) -> None:
    with pytest.raises(DataError, match=rf"client 7: .*{what}"):
        AlignmentParty(0, []).blind(BlindedNames(7, (point,)))


def test_a_data_set_whose_ids_are_not_names_is_found() -> None:
    owned = {0: np.array([0, 1]), 1: np.array([1, 2])}
    union = align_names(["a", "b", "c"], owned)
    assert union.num_names == 3
    assert union.ids[0][1] == union.ids[1][0]
    with pytest.raises(DataError, match="have 3 ids and private set union found 2 names"):
        align_names(["a", "b", "a"], owned)


def test_messages_have_no_field_for_a_name() -> None:
    assert [item.name for item in dataclasses.fields(BlindedNames)] == ["owner", "points"]
    assert [item.name for item in dataclasses.fields(set_alignment.Union)] == ["ids", "num_names", "num_bytes"]


@pytest.mark.parametrize(("strategy", "num_names"), [("fede", 40), ("fedr", 6), ("local", None)])
def test_a_run_aligns_what_its_strategy_shares_and_its_clients_stay_the_same(
    strategy: str, num_names: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Entities with fede, relations with fedr; the small graph has 40 and 6, all of them at some client."""
    paths = {"data.path": str(write_tiny_dataset(tmp_path / "tiny")), "federation.strategy": strategy}
    with caplog.at_level(logging.INFO, "fedsim.data.alignment"):
        aligned = prepare(small_config(paths | {"data.alignment": "psu"}))
    said = [record.getMessage() for record in caplog.records]
    wanted = [] if num_names is None else [f"{num_names} names of 2 clients aligned by private set union"]
    assert [text.partition(" in ")[0] for text in said] == wanted
    given = prepare(small_config(paths))
    for one, other in zip(aligned.clients, given.clients, strict=True):
        assert np.array_equal(one.entity_ids, other.entity_ids)
        assert np.array_equal(one.train, other.train)
