"""Broken updates are rejected before they touch a sum, counted and named; a round below its quorum is not averaged."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from builders import write_tiny_dataset
from experiments import MIXED, same_values, small_runtime
from fedsim import simulation
from fedsim.config import load_config
from fedsim.errors import RunError
from fedsim.federated.aggregation import RoundSums, range_limit
from fedsim.federated.message_checks import Rejection, find_fault, find_oversized
from fedsim.federated.messages import ClientUpdate
from fedsim.federated.runtime import InProcessRuntime
from fedsim.federated.server import Server
from fedsim.results import SilentObserver
from runs import SMALL

Opened = Callable[..., Server]


class Round:
    """Round 1 of three clients with MMFeD3 and HidE: the updates, and servers that wait for them."""

    def __init__(self, **overrides: Any) -> None:
        self.runtime: InProcessRuntime = small_runtime({**MIXED, **overrides})
        assert self.runtime.server is not None
        self.config = self.runtime.server.config
        broadcast = self.runtime.server.begin_round(1)
        made = [client.train(1, client.own_part(broadcast))[0] for client in self.runtime.clients.values()]
        self.updates = [update for update in made if update is not None]
        self.form, self.ownership = self.runtime.server.sum_shape().form, self.runtime.server.ownership

    def server(self, **changes: dict[str, Any]) -> Server:
        """A server in round 1; `changes` are fields of sections of its config."""
        first = self.runtime.server
        assert first is not None
        sections = {name: getattr(self.config, name).model_copy(update=fields) for name, fields in changes.items()}
        config = self.config.model_copy(update=sections)
        server = Server(config, first.strategy, len(first.global_model.entity), {"text": 12, "image": 8})
        for client in self.runtime.clients.values():
            server.register(client.hello())
        server.begin_round(1)
        return server


@pytest.fixture(scope="module")
def opened() -> Round:
    return Round()


def _with(value: float) -> Callable[[Tensor], Tensor]:
    """Put a value into a tensor."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[-1] = value
        return changed

    return change


def _changed(update: ClientUpdate, field: str, change: Callable[[Tensor], Any]) -> ClientUpdate:
    """Change one tensor of an update, `modules` the first module."""
    if field == "modules":
        name = next(iter(update.modules))
        return replace(update, modules={**update.modules, name: change(update.modules[name])})
    if field.startswith("soft_queries."):
        assert update.soft_queries is not None
        inner = field.removeprefix("soft_queries.")
        soft = replace(update.soft_queries, **{inner: change(getattr(update.soft_queries, inner))})
        return replace(update, soft_queries=soft)
    return replace(update, **{field: change(getattr(update, field))})


FLOATS = ["entity", "modules", "tokens", "soft_queries.queries", "soft_queries.log_labels"]
TENSORS = [*FLOATS, "entity_ids", "token_present", "soft_queries.candidates"]


def _rejection(opened: Round, update: Any, received: tuple[int, ...] = ()) -> Rejection | None:
    return find_fault(update, opened.form, 1, opened.ownership, received, range_limit(3))


def _reason(opened: Round, update: Any) -> str | None:
    found = _rejection(opened, update)
    return None if found is None else found.reason


def test_honest_updates_have_no_fault(opened: Round) -> None:
    assert [_rejection(opened, update) for update in opened.updates] == [None] * 3


@pytest.mark.parametrize("field", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite(opened: Round, field: str, bad: float) -> None:
    found = _rejection(opened, _changed(opened.updates[1], field, _with(bad)))
    assert found is not None
    assert (found.client, found.round_num, found.reason) == (1, 1, "not_finite")
    assert "client 1, round 1: '" in found.message


@pytest.mark.parametrize("field", ["entity", "modules", "tokens"])
def test_what_is_too_large_to_be_summed(opened: Round, field: str) -> None:
    found = _rejection(opened, _changed(opened.updates[1], field, _with(-4096.0)))
    assert found is not None
    assert found.reason == "out_of_range"
    assert "holds 4096.0, beyond what can be summed (4096); lower training.learning_rate" in found.message


@pytest.mark.parametrize("field", TENSORS)
@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor[..., :-1],
        lambda tensor: tensor.unsqueeze(0),
        lambda tensor: tensor.double(),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.float().to_sparse(),
        lambda tensor: None,
        lambda tensor: "text",
    ],
    ids=["shape", "dimension", "dtype", "type", "layout", "none", "text"],
)
def test_what_has_another_form(opened: Round, field: str, change: Callable[[Tensor], Any]) -> None:
    found = _rejection(opened, _changed(opened.updates[2], field, change))
    assert found is not None
    # Ids that are fewer, with all rows: it is the rows that do not fit.
    assert found.reason == "malformed"
    assert found.message.startswith("client 2, round 1: ")


def test_the_form_that_was_found_and_the_one_wanted_are_named(opened: Round) -> None:
    update = opened.updates[0]
    found = _rejection(opened, replace(update, entity=update.entity.double()[:2]))
    assert found is not None
    assert found.message.endswith(
        f"'entity' in the update is float64 [2, 8] instead of float32 [{len(update.entity)}, 8]"
    )


def test_modules_and_parts_that_are_not_expected(opened: Round) -> None:
    update = opened.updates[0]
    for changed, message in (
        (replace(update, modules={}), "'modules' of the update are not the shared modules"),
        (replace(update, modules=update.modules | {"more": torch.ones(1)}), "are not the shared modules"),
        (replace(update, modules=[1]), "are not the shared modules"),
        (replace(update, token_present=None), "'token_present' and 'tokens' of the update go together"),
        (replace(update, num_triples=2.0), "'num_triples' in the update is not a whole number"),
        (replace(update, client=True), "'client' in the update is not a whole number"),
        ("hello", "round 1: what arrived is no update but a str"),
    ):
        found = _rejection(opened, changed)
        assert found is not None
        assert found.reason == "malformed"
        assert message in found.message
    fede = Round(**{"federation.strategy": "fede", "model.imputer": "zero"})
    for extra in (
        {"soft_queries": update.soft_queries},
        {"token_present": update.token_present, "tokens": update.tokens},
    ):
        found = _rejection(fede, replace(fede.updates[0], **extra))
        assert found is not None
        assert "which the strategy does not send" in found.message


def test_rows_that_the_client_does_not_own(opened: Round) -> None:
    one, other = opened.updates[:2]
    ids = one.entity_ids.clone()
    ids[-1] = 10**9
    assert _reason(opened, replace(one, entity_ids=ids)) == "foreign_rows"
    assert _reason(opened, replace(one, entity_ids=one.entity_ids.flip(0))) == "foreign_rows"
    assert _reason(opened, replace(other, client=0)) in ("foreign_rows", "wrong_weight")
    owned = set(one.entity_ids.tolist())
    foreign = next(entity for entity in range(40) if entity not in owned)
    assert one.soft_queries is not None
    candidates = one.soft_queries.candidates.clone()
    candidates[0, 0] = foreign
    assert (
        _reason(opened, replace(one, soft_queries=replace(one.soft_queries, candidates=candidates))) == "foreign_rows"
    )


def test_who_and_when(opened: Round) -> None:
    update = opened.updates[1]
    assert _reason(opened, replace(update, round_num=2)) == "stale"
    assert _reason(opened, replace(update, client=3)) == "unknown_client"
    assert _reason(opened, replace(update, num_triples=update.num_triples + 1)) == "wrong_weight"
    again = _rejection(opened, update, received=(1,))
    assert again is not None
    assert (again.reason, again.message) == ("duplicate", "client 1, round 1: a second update in the same round")


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.builds(
        lambda shape, dtype: torch.zeros(shape, dtype=dtype),
        st.lists(st.integers(0, 4), max_size=3),
        st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64]),
    ),
)
FIELDS = ["client", "round_num", "num_triples", "entity_ids", "entity", "modules", "token_present", "tokens"]


@given(field=st.sampled_from([*FIELDS, "soft_queries"]), value=VALUES)
@settings(max_examples=200, deadline=None)
def test_whatever_arrives_is_named_and_never_an_error(opened: Round, field: str, value: Any) -> None:
    update = opened.updates[0]
    found = _rejection(opened, replace(update, **{field: value}))
    may_be_left_out = field == "soft_queries" and value is None
    is_right = field in FIELDS[:3] and type(value) is int and value == getattr(update, field)
    assert (found is None) == (may_be_left_out or is_right)


def test_a_rejected_update_changes_nothing_and_is_counted(opened: Round) -> None:
    """Clients 0 and 1 count; the broken one of client 2 is named, and so is the second one of client 0."""
    tolerant = {"max_failed_clients": 2}
    alone, with_broken = opened.server(federation=tolerant), opened.server(federation=tolerant)
    one, other, third = opened.updates
    for server in (alone, with_broken):
        server.receive(one)
        if server is with_broken:
            server.receive(_changed(third, "entity", _with(float("nan"))))
            server.receive(one)
        server.receive(other)
    expected, report = alone.finish_round(), with_broken.finish_round()
    assert same_values(alone.state(), with_broken.state())
    assert expected.rejected == ()
    assert expected.num_updates == report.num_updates == 2
    assert [(item.client, item.reason) for item in report.rejected] == [(0, "duplicate"), (2, "not_finite")]


def test_a_client_whose_broken_update_was_rejected_may_still_send_a_whole_one(opened: Round) -> None:
    server = opened.server(federation={"max_failed_clients": 1})
    server.receive(replace(opened.updates[0], round_num=9))
    server.receive(opened.updates[0])
    assert server.finish_round().num_updates == 1


def test_by_default_a_broken_update_stops_the_run(opened: Round) -> None:
    server = opened.server()
    with pytest.raises(RunError, match="client 2, round 1: 'entity' .* not finite; .*federation.max_failed_clients"):
        server.receive(_changed(opened.updates[2], "entity", _with(float("nan"))))


def test_more_failed_clients_than_allowed_stop_the_run(opened: Round) -> None:
    server = opened.server(federation={"max_failed_clients": 1})
    broken = [_changed(update, "entity", _with(float("nan"))) for update in opened.updates]
    server.receive(broken[2])
    message = (
        "updates of 2 clients were rejected, more than federation.max_failed_clients 1; the first: client 2, round 1"
    )
    with pytest.raises(RunError, match=message):
        server.receive(broken[0])


@pytest.mark.parametrize("too_few", ["stop", "skip"])
def test_a_round_below_its_quorum_is_not_averaged(opened: Round, too_few: str) -> None:
    server = opened.server(federation={"max_failed_clients": 2}, participation={"min_clients": 2, "too_few": too_few})
    before = {name: value.clone() for name, value in server.state().items()}
    server.receive(opened.updates[0])
    for update in opened.updates[1:]:
        server.receive(replace(update, round_num=5))
    if too_few == "stop":
        with pytest.raises(
            RunError, match=r"1 update\(s\) are left, fewer than participation.min_clients 2, as 2 were"
        ):
            server.finish_round()
    else:
        report = server.finish_round()
        assert report.num_updates == 0
        assert len(report.rejected) == 2
    assert same_values(server.state(), before)


def test_sums_of_an_actor_bring_what_was_rejected_there(opened: Round) -> None:
    tolerant = {"max_failed_clients": 1}
    alone, merged = opened.server(federation=tolerant), opened.server(federation=tolerant)
    broken = _changed(opened.updates[1], "tokens", _with(float("inf")))
    sums = RoundSums(merged.sum_shape(), 1, merged.ownership)
    for update in (opened.updates[0], broken):
        alone.receive(update)
        sums.add(update)
    merged.merge(sums.partial())
    for server in (alone, merged):
        server.receive(opened.updates[2])
    reports = [server.finish_round() for server in (alone, merged)]
    assert reports[0].rejected == reports[1].rejected
    assert [item.client for item in reports[1].rejected] == [1]
    assert same_values(alone.state(), merged.state())


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("entity", lambda value: value[1:]),
        ("entity", lambda value: value.float()),
        ("entity_counts", lambda value: value + 3),
        ("entity_counts", lambda value: value - 1),
        ("tokens", lambda value: value[:1]),
        ("token_counts", lambda value: value + 9),
        ("module_weight", lambda value: value.view(1)),
        ("modules", lambda value: {}),
        ("modules", lambda value: {name: item.float() for name, item in value.items()}),
    ],
)
def test_sums_of_another_form_are_refused(opened: Round, field: str, change: Callable[[Any], Any]) -> None:
    server = opened.server()
    before = server.sums.rows.counts.clone()
    sums = RoundSums(server.sum_shape(), 1, server.ownership)
    for update in opened.updates[:2]:
        sums.add(update)
    partial = sums.partial()
    with pytest.raises(RunError, match=f"'{field}[^']*' in the partial sums of clients 0, 1 is malformed"):
        server.merge(replace(partial, **{field: change(getattr(partial, field))}))
    assert torch.equal(server.sums.rows.counts, before)


def _toy(client: int, rows: float, modules: float, ids: tuple[int, ...] = (0,)) -> ClientUpdate:
    """An update with one number in all rows and one in the module."""
    entity = torch.full((len(ids), 2), rows)
    return ClientUpdate(client, 1, 1, torch.tensor(ids), entity, {"w": torch.full((3,), modules)}, None, None, None)


def test_oversized_updates_by_hand() -> None:
    """Rows stood at 1: changes 1, 2, 30 with the median 2. 30 is above 10 * 2 and not above 16 * 2; so for modules.

    How many rows a client owns does not count. Of four the lower middle one is the median: 1, 2, 3, 30.
    """
    entity, modules = torch.ones(5, 2), {"w": torch.zeros(3)}
    updates = {0: _toy(0, 2.0, 1.0), 1: _toy(1, 3.0, 1.0, (0, 1, 2)), 2: _toy(2, 31.0, 1.0, (3, 4))}

    def named(ratio: float, **more: ClientUpdate) -> list[tuple[int | None, str]]:
        found = find_oversized({**updates, **{int(k[1:]): v for k, v in more.items()}}, entity, modules, ratio, 1)
        return [(item.client, item.reason) for item in found]

    assert named(10.0) == [(2, "oversized")]
    assert named(16.0) == []
    assert named(10.0, c3=_toy(3, 4.0, 11.0)) == [(2, "oversized"), (3, "oversized")]
    assert find_oversized({0: updates[0], 2: updates[2]}, entity, modules, 2.0, 1) == [], "two have no median"
    (message,) = [item.message for item in find_oversized(updates, entity, modules, 10.0, 1)]
    assert message.startswith(
        "client 2, round 1: the update's rows measure 30, more than 10 times the cohort's median 2"
    )


def test_oversized_updates_are_in_no_sum_and_the_mean_stays_exact(opened: Round) -> None:
    tolerant = {"max_failed_clients": 1}
    plain = opened.server(federation=tolerant)
    bounded = opened.server(federation=tolerant, robustness={"max_norm_ratio": 50.0})
    alike = opened.server(federation=tolerant, robustness={"max_norm_ratio": 50.0})
    for update in opened.updates[:2]:
        plain.receive(update)
    far = _changed(opened.updates[2], "entity", lambda value: value + 1000.0)
    for update in (far, *opened.updates[:2]):
        bounded.receive(update)
    plain.finish_round()
    report = bounded.finish_round()
    assert [(item.client, item.reason) for item in report.rejected] == [(2, "oversized")]
    assert report.num_updates == 2
    assert same_values(plain.state(), bounded.state())
    everybody = opened.server()
    for server in (alike, everybody):
        for update in opened.updates:
            server.receive(update)
        server.finish_round()
    assert same_values(alike.state(), everybody.state())


class _Listener(SilentObserver):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def message(self, text: str) -> None:
        self.heard.append(text)


def _attacked_config(tmp_path: Path, **changes: Any) -> Any:
    write_tiny_dataset(tmp_path / "data")
    overrides = SMALL | {"data.path": str(tmp_path / "data"), "output": str(tmp_path / "run")}
    overrides |= {"data.split": "dirichlet", "data.num_clients": 4, "data.dirichlet_alpha": 5.0}
    overrides |= {"adversary.attack": "boost", "adversary.clients": [1], "adversary.strength": 200.0}
    overrides |= {"robustness.max_norm_ratio": 10.0, "federation.num_rounds": 2, **changes}
    return load_config(overrides=overrides)


def test_a_run_names_who_was_rejected_in_metrics_and_messages(tmp_path: Path) -> None:
    listener = _Listener()
    simulation.run(_attacked_config(tmp_path, **{"federation.max_failed_clients": 1}), observer=listener)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    totals = [row for row in rows if row["client"] is None]
    assert [row["num_aggregated"] for row in totals] == [3, 3]
    for row in totals:
        (rejected,) = row["rejected"]
        assert (rejected["client"], rejected["round_num"], rejected["reason"]) == (1, row["round"], "oversized")
    assert [text for text in listener.heard if text.startswith("rejected (oversized): client 1, round 2: ")]


def test_a_run_that_tolerates_nothing_stops_and_says_who(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"client 1, round 1: the update's \w+ measure .* raise federation.max_failed_cli"
    ):
        simulation.run(_attacked_config(tmp_path))


def test_a_rejection_can_be_written() -> None:
    assert json.loads(json.dumps(asdict(Rejection(None, 3, "malformed", "x")))) == {
        "client": None,
        "round_num": 3,
        "reason": "malformed",
        "message": "x",
    }
