"""Smaller messages: which rows cross and what both sides then know, half precision, refusals, and whole runs."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import tiny_graph
from experiments import small_config, small_runtime
from fedsim import simulation
from fedsim.data.dataset import save_dataset
from fedsim.errors import ConfigError, RunError
from fedsim.federated.compression import Exchange, check_rows, decode_message, num_rows_sent
from fedsim.federated.messages import Broadcast, ClientUpdate, PrototypeTable, SoftQueries, message_bytes
from fedsim.federation_config import CommunicationConfig
from fedsim.results import RunResult, SilentObserver, result_as_json

IDS = torch.tensor([2, 5, 7, 9])
BOTH = {"communication.top_k": 0.4, "communication.full_every": 3, "communication.dtype": "float16"}


def _exchange(**settings: Any) -> Exchange:
    return Exchange(CommunicationConfig(**settings), 3, IDS)


def _broadcast(round_num: int, rows: list[float], prototypes: PrototypeTable | None = None) -> Broadcast:
    return Broadcast(round_num, torch.tensor(rows).unsqueeze(1), {"w": torch.ones(2)}, prototypes)


def _update(round_num: int, rows: list[float], **changes: Any) -> ClientUpdate:
    entity = torch.tensor(rows).unsqueeze(1)
    return replace(ClientUpdate(3, round_num, 10, IDS, entity, {"w": torch.ones(2)}, None, None, None), **changes)


def test_how_many_rows_cross() -> None:
    """Rounds 0 (joining), 1, 4, 7, ... are full; else 0.4 x 10 = 4 rows, and never none."""
    config = CommunicationConfig(top_k=0.4, full_every=3)
    assert [num_rows_sent(config, round_num, 10) for round_num in range(8)] == [None, None, 4, 4, None, 4, 4, None]
    assert num_rows_sent(config, 2, 1) == 1
    assert num_rows_sent(CommunicationConfig(), 2, 10) is None
    assert num_rows_sent(CommunicationConfig(top_k=0.4, full_every=1), 2, 10) is None


def test_rows_by_hand_through_three_rounds() -> None:
    """Both sides know 0, 0, 0, 0 after joining, and 1, 2, 3, 4 after the full first round.

    Round 2, down: the server has 1, 9, 3, 0. Rows 1 and 3 changed (by 7 and 4) and cross. The client keeps its own 1.4
    and 3 for the others. Up: it trained to 1.4, 9.1, 3.3, 0. Against what is known now (1, 9, 3, 0) that is 0.4, 0.1,
    0.3, 0: rows 0 and 2 cross.
    Round 3, up: 1.5, 9.2, 3.3, 0 differ from 1.4, 9, 3.3, 0 by 0.1, 0.2, 0, 0: the small change of row 1 has added up.
    """
    link = _exchange(top_k=0.5, full_every=9)
    params, _ = link.unpack(link.download(_broadcast(0, [0.0, 0.0, 0.0, 0.0])), None, None)
    assert params["entity"].flatten().tolist() == [0.0] * 4
    full = link.upload(_update(1, [1.0, 2.0, 3.0, 4.0]))
    assert full.entity_ids.tolist() == IDS.tolist()
    sent = link.download(_broadcast(2, [1.0, 9.0, 3.0, 0.0]))
    assert sent.rows is not None
    assert (sent.rows.tolist(), sent.entity.flatten().tolist()) == ([1, 3], [9.0, 0.0])
    own = torch.tensor([[1.4], [2.2], [3.0], [4.1]])
    params, _ = link.unpack(sent, own, None)
    assert params["entity"].flatten().tolist() == pytest.approx([1.4, 9.0, 3.0, 0.0])
    assert own.flatten().tolist() == pytest.approx([1.4, 2.2, 3.0, 4.1]), "what the client had is not written to"
    assert torch.equal(params["w"], torch.ones(2))
    update = link.upload(_update(2, [1.4, 9.1, 3.3, 0.0]))
    assert (update.entity_ids.tolist(), update.entity.flatten().tolist()) == ([2, 7], pytest.approx([1.4, 3.3]))
    last = link.upload(_update(3, [1.5, 9.2, 3.3, 0.0]))
    assert (last.entity_ids.tolist(), last.entity.flatten().tolist()) == ([2, 5], pytest.approx([1.5, 9.2]))


def test_of_equal_changes_the_lower_ids_cross() -> None:
    link = _exchange(top_k=0.5, full_every=9)
    link.download(_broadcast(0, [0.0, 0.0, 0.0, 0.0]))
    assert link.upload(_update(2, [1.0, 1.0, -1.0, 1.0])).entity_ids.tolist() == [2, 5]


def test_tokens_go_with_the_rows_of_their_entities() -> None:
    """Two modalities; entities 5 and 9 changed. Image tokens at 2, 5, 9, text tokens at 9: three of four are sent."""
    link = _exchange(top_k=0.5, full_every=9)
    link.download(_broadcast(0, [0.0, 0.0, 0.0, 0.0]))
    present = torch.tensor([[True, True, False, True], [False, False, False, True]])
    tokens = torch.tensor([[10.0], [20.0], [30.0], [40.0]])
    sent = link.upload(_update(2, [0.0, 8.0, 0.0, 9.0], token_present=present, tokens=tokens))
    assert sent.token_present is not None
    assert sent.tokens is not None
    assert sent.token_present.tolist() == [[True, True], [False, True]]
    assert sent.tokens.flatten().tolist() == [20.0, 30.0, 40.0]
    assert link.sent is not None
    assert link.sent.rounds.tolist() == [[0, 2, 0, 2], [0, 0, 0, 2]]
    assert link.sent.values[..., 0].tolist() == [[0.0, 20.0, 0.0, 30.0], [0.0, 0.0, 0.0, 40.0]]


def test_own_tokens_of_any_round_are_taken_out_of_prototypes() -> None:
    """The client sent 4 for entity 2 in round 1 and 6 for entity 5 in round 2; two senders' means are 5 and 7.

    The others' share is 2 * 5 - 4 = 6 and 2 * 7 - 6 = 8. Entity 7's prototype is older than the client's token, entity
    9 has only the client's own.
    """
    link = _exchange()
    present = torch.tensor([[True, False, True, True]])
    link.upload(_update(1, [0.0] * 4, token_present=present, tokens=torch.tensor([[4.0], [9.0], [3.0]])))
    link.upload(_update(2, [0.0] * 4, token_present=~present, tokens=torch.tensor([[6.0]])))
    table = PrototypeTable(
        torch.tensor([[[5.0], [7.0], [2.0], [3.0]]]), torch.tensor([[2, 2, 1, 1]]), torch.tensor([[1, 2, 3, 1]])
    )
    _, prototypes = link.unpack(link.download(_broadcast(4, [0.0] * 4, table)), None, None)
    assert prototypes is not None
    assert prototypes.values[0, :, 0].tolist() == [6.0, 8.0, 2.0, 0.0]
    assert prototypes.present.tolist() == [[True, True, True, False]]


def test_prototypes_of_rows_that_are_not_sent_stay() -> None:
    link = _exchange(top_k=0.5, full_every=9)
    table = PrototypeTable(torch.ones(1, 4, 1), torch.tensor([[1, 1, 0, 1]]), torch.ones(1, 4, dtype=torch.int64))
    zeros = torch.zeros(4, 1)
    link.download(_broadcast(0, [0.0] * 4))
    _, first = link.unpack(link.download(_broadcast(2, [5.0, 0.0, 6.0, 0.0], table)), zeros, None)
    assert first is not None
    assert first.present.tolist() == [[True, False, False, False]], "of rows 0 and 2, row 2 has none"
    table = replace(table, values=table.values * 3)
    _, second = link.unpack(link.download(_broadcast(3, [5.0, 7.0, 6.0, 8.0], table)), zeros, first)
    assert second is not None
    assert second.values[0, :, 0].tolist() == [1.0, 3.0, 0.0, 3.0]


def test_half_precision_halves_what_floats_take_and_arrives_rounded() -> None:
    """8 bytes per id or number stay: 4 rows, 2 weights, 1 token and 3 soft numbers are 10 floats, 20 bytes less."""
    soft = SoftQueries(torch.full((1, 1, 1), 0.1), IDS[:2].unsqueeze(0), torch.tensor([[-0.1, -2.0]]))
    present = torch.tensor([[False, True, False, False]])
    update = _update(1, [0.1, 0.2, 0.3, 0.4], token_present=present, tokens=torch.tensor([[0.7]]), soft_queries=soft)
    sent = _exchange(dtype="float16").upload(update)
    assert message_bytes(update) - message_bytes(sent) == 20
    arrived = decode_message(sent)
    assert arrived.soft_queries is not None
    assert arrived.entity.dtype == arrived.modules["w"].dtype == arrived.soft_queries.queries.dtype == torch.float32
    assert torch.equal(arrived.entity, update.entity.half().float())
    assert torch.equal(arrived.entity_ids, IDS)
    assert torch.equal(arrived.soft_queries.candidates, soft.candidates)


def test_what_half_precision_cannot_hold_is_named() -> None:
    link = _exchange(dtype="float16")
    with pytest.raises(RunError) as caught:
        link.upload(_update(2, [0.0, -70000.0, 0.0, 0.0]))
    assert str(caught.value) == (
        "client 3, round 2, ClientUpdate: 'entity' holds 70000, beyond float16 (65504); set communication.dtype to "
        "float32, or lower training.learning_rate"
    )
    with pytest.raises(RunError, match=r"client 3, round 2, Broadcast: 'modules.w' holds 1e\+06"):
        link.download(replace(_broadcast(2, [0.0] * 4), modules={"w": torch.tensor([1e6])}))
    sent = link.upload(_update(2, [0.0, float("nan"), 0.0, 0.0]))
    assert bool(sent.entity.isnan().any()), "the server refuses it by its own message"


@pytest.mark.parametrize(
    ("ids", "part"),
    [
        ([2, 3], "rows of entities that the client does not own"),
        ([2, 5, 7], "has 3 rows, in this round there must be 2"),
        ([2, 2], "sorted, each once"),
        ([5, 2], "sorted, each once"),
    ],
)
def test_rows_that_do_not_belong_are_refused(ids: list[int], part: str) -> None:
    config = CommunicationConfig(top_k=0.5)
    update = _update(2, [0.0] * 4, entity_ids=torch.tensor(ids))
    with pytest.raises(RunError, match=part):
        check_rows(config, update, IDS)
    check_rows(config, replace(update, entity_ids=IDS[:2]), IDS)
    with pytest.raises(RunError, match="rows of entities that the client does not own"):
        check_rows(config, replace(update, round_num=1), IDS)


def test_sums_of_some_rows_are_exact_in_any_order() -> None:
    """Three clients, a sparse round: any order of arrival gives the same bits, and rows nobody sent keep theirs."""
    settings = {"data.num_clients": 3, **BOTH, "distillation.server_steps": 0}
    runtime = small_runtime(settings)
    runtime.train(1, [0, 1, 2])
    assert runtime.server is not None
    before = copy.deepcopy(runtime.server.state())
    broadcast = runtime.server.begin_round(2)
    updates = [c.train(2, broadcast.for_entities(c.entity_ids))[0] for c in runtime.clients.values()]
    states = []
    for order in itertools.permutations(range(3)):
        runtime.server.load_state(copy.deepcopy(before))
        runtime.server.begin_round(2)
        for index in order:
            update = updates[index]
            assert update is not None
            runtime.server.receive(update)
        runtime.server.finish_round()
        states.append(runtime.server.state())
    for state in states[1:]:
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())
    sent = torch.cat([update.entity_ids for update in updates if update is not None]).unique()
    kept = torch.ones(len(before["entity"]), dtype=torch.bool)
    kept[sent] = False
    assert kept.any()
    assert torch.equal(states[0]["entity"][kept], before["entity"][kept])
    assert not torch.equal(states[0]["entity"][sent], before["entity"][sent])


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"top_k": 0}, "communication.top_k"),
        ({"top_k": 1.5}, "communication.top_k"),
        ({"full_every": 0}, "communication.full_every"),
        ({"dtype": "int8"}, "'float32' or 'float16'"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small_config({f"communication.{name}": value for name, value in settings.items()})
    assert part in str(caught.value)


class Killed(BaseException):
    """Stands for SIGKILL."""


class Killer(SilentObserver):
    """Kills the run before a round."""

    def __init__(self, round_num: int) -> None:
        self.round_num = round_num

    def round_started(self, round_num: int) -> None:
        if round_num == self.round_num:
            raise Killed


@pytest.fixture
def data(tmp_path: Path) -> Path:
    save_dataset(tiny_graph(), tmp_path / "tiny")
    return tmp_path / "tiny"


def _config(data: Path, name: str, **overrides: Any) -> Any:
    return small_config({"data.path": str(data), "output": str(data.parent / name), **overrides})


def _outcome(result: RunResult) -> dict[str, Any]:
    """Result and models, without times and bytes."""
    found = {k: v for k, v in result_as_json(result).items() if "seconds" not in k and "bytes" not in k}
    models = sorted((result.folder / "models").rglob("*.safetensors"))
    return found | {path.name: path.read_bytes() for path in models}


@pytest.mark.parametrize("strategy", ["fede", "mmfed3"])
def test_a_killed_run_with_smaller_messages_resumes_to_the_same_bits(strategy: str, data: Path) -> None:
    """One of two clients a round, so that what was exchanged last differs in age."""
    settings = {**BOTH, "federation.strategy": strategy, "federation.cohort_size": 1, "federation.num_rounds": 5}
    whole = simulation.run(_config(data, "whole", **settings))
    with pytest.raises(Killed):
        simulation.run(_config(data, "broken", **settings), observer=Killer(4))
    resumed = simulation.resume(data.parent / "broken")
    assert _outcome(resumed) == _outcome(whole)
    assert (resumed.bytes_up, resumed.bytes_down) == (whole.bytes_up, whole.bytes_down)


def test_all_rows_as_the_top_k_change_nothing_but_bytes(data: Path) -> None:
    """The top 100 % are everything: positions are sent beside it, and all else has the same bits."""
    plain = simulation.run(_config(data, "plain"))
    everything = simulation.run(_config(data, "all", **{"communication.top_k": 1.0}))
    states = [_outcome(result) for result in (plain, everything)]
    for path in (plain.folder / "models").glob("client*"):
        for state in states:
            state.pop(path.name)  # holds what was exchanged last
    assert states[0] == states[1]
    assert everything.bytes_down > plain.bytes_down
    assert everything.bytes_up == plain.bytes_up


def test_bytes_show_the_saving(data: Path) -> None:
    """Half precision saves a bit less than half (ids and counts stay); the top 40 %, in two of three rounds, most."""
    totals = {}
    for name, settings in {
        "float32": {},
        "float16": {"communication.dtype": "float16"},
        "top_k": {"communication.top_k": 0.4},
        "both": BOTH,
    }.items():
        result = simulation.run(_config(data, name, **{"federation.strategy": "fede", **settings}))
        totals[name] = (result.bytes_up, result.bytes_down)
    for way in (0, 1):
        full = totals["float32"][way]
        assert 0.5 < totals["float16"][way] / full < 0.6
        assert totals["both"][way] < min(totals["float16"][way], totals["top_k"][way]) < full
