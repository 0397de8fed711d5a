"""Messages: their size, their cut-outs, and what is not finite in them."""

import dataclasses

import pytest
import torch

from fedsim.federated.messages import (
    Broadcast,
    ClientHello,
    ClientUpdate,
    PrototypeTable,
    SentRows,
    SoftQueries,
    check_finite,
    message_bytes,
)


def _update() -> ClientUpdate:
    """Two of five entities, d = 4, one module of 4 numbers, one token, one soft query over 2 candidates."""
    queries = SoftQueries(torch.zeros(1, 1, 4), torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2))
    present = torch.tensor([[True, False]])
    return ClientUpdate(
        client=0,
        round_num=1,
        num_triples=7,
        entity_ids=torch.tensor([1, 3]),
        entity=torch.zeros(2, 4),
        modules={"w": torch.zeros(4)},
        token_present=present,
        tokens=torch.zeros(1, 4),
        soft_queries=queries,
    )


def test_bytes_by_hand() -> None:
    """Three numbers 24, ids 16, rows 32, module 16, flags 2, token 16, soft query 16 + 16 + 8: 146."""
    assert message_bytes(_update()) == 24 + 16 + 32 + 16 + 2 + 16 + 40
    assert message_bytes(ClientHello(0, torch.tensor([1, 3]), 7)) == 8 + 16 + 8
    assert message_bytes(None) == 0


def test_a_client_is_sent_its_own_rows() -> None:
    prototypes = PrototypeTable(
        torch.arange(10.0).view(1, 5, 2), torch.arange(5).view(1, 5), torch.arange(5).view(1, 5) * 10
    )
    whole = Broadcast(4, torch.arange(5.0).view(5, 1), {"w": torch.ones(1)}, prototypes)
    cut = whole.for_entities(torch.tensor([1, 3]))
    assert cut.entity.flatten().tolist() == [1.0, 3.0]
    assert cut.round_num == 4
    assert cut.modules is whole.modules
    assert cut.prototypes is not None
    assert cut.prototypes.values.tolist() == [[[2.0, 3.0], [6.0, 7.0]]]
    assert cut.prototypes.counts.tolist() == [[1, 3]]
    assert cut.prototypes.rounds.tolist() == [[10, 30]]
    assert Broadcast(0, whole.entity, {}, None).for_entities(torch.tensor([0])).prototypes is None


def test_a_client_is_sent_its_own_table_if_there_is_one() -> None:
    """Client 7 has a table of its own, of which nothing goes to client 8, who is sent the common rows."""
    whole = Broadcast(4, torch.arange(5.0).view(5, 1), {}, None, personal={7: torch.tensor([[9.0], [8.0]])})
    ids = torch.tensor([1, 3])
    for client, expected in ((7, [9.0, 8.0]), (8, [1.0, 3.0])):
        cut = whole.for_client(client, ids)
        assert cut.entity.flatten().tolist() == expected
        assert cut.personal is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["entity", "modules.w", "tokens", "soft_queries", "soft_queries.log_labels"])
def test_what_is_not_finite_is_named(field: str, bad: float) -> None:
    update = _update()
    assert check_finite(update) is None
    assert update.tokens is not None
    assert update.soft_queries is not None
    tensors = {
        "entity": update.entity,
        "modules.w": update.modules["w"],
        "tokens": update.tokens,
        "soft_queries": update.soft_queries.queries,
        "soft_queries.log_labels": update.soft_queries.log_labels,
    }
    tensors[field].view(-1)[0] = bad
    assert check_finite(update) == field
    assert check_finite(dataclasses.replace(update, tokens=None, soft_queries=None)) == (
        field if field in ("entity", "modules.w") else None
    )


def test_messages_have_no_field_for_what_is_private() -> None:
    """Private are triples, relations, raw features, texts and pictures. A new field must be thought about here."""
    classes = (ClientUpdate, ClientHello, SentRows)
    names = {cls.__name__: [item.name for item in dataclasses.fields(cls)] for cls in classes}
    assert names == {
        "ClientUpdate": [
            "client",
            "round_num",
            "num_triples",
            "entity_ids",
            "entity",
            "modules",
            "token_present",
            "tokens",
            "soft_queries",
        ],
        "ClientHello": ["client", "entity_ids", "num_triples"],
        "SentRows": ["ids", "values"],
    }
