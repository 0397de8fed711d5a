"""The types of what leaves a client: declared fields, and the actors' methods, so that no new way out opens unseen."""

import dataclasses
import inspect
from typing import Any

import pytest

from actors.client import _ClientActor
from actors.server import _ServerActor
from fedsim.evaluation.consistency import ConsistencySums
from fedsim.evaluation.ranking import RankingMetrics
from fedsim.federated.aggregation import PartialSums
from fedsim.federated.message_checks import Reason, Rejection
from fedsim.federated.messages import ClientHello, ClientUpdate, SentRows, SoftQueries
from fedsim.federated.reports import ClientEvaluation, ClientReport
from fedsim.privacy.secure_aggregation.messages import EncryptedShares, KeyAdvertisement, MaskedUpdate, RevealedShares
from fedsim.privacy.secure_aggregation.sums import PartialMaskedSums

FIELDS: dict[type, dict[str, str]] = {
    ClientHello: {"client": "int", "entity_ids": "Tensor", "num_triples": "int"},
    ClientUpdate: {
        "client": "int",
        "round_num": "int",
        "num_triples": "int",
        "entity_ids": "Tensor",
        "entity": "Tensor",
        "modules": "dict[str, Tensor]",
        "token_present": "Tensor | None",
        "tokens": "Tensor | None",
        "soft_queries": "SoftQueries | None",
    },
    SoftQueries: {"queries": "Tensor", "candidates": "Tensor", "log_labels": "Tensor"},
    SentRows: {"ids": "Tensor", "values": "Tensor"},
    ClientReport: {
        "client": "int",
        "losses": "dict[str, float]",
        "bytes_down": "int",
        "bytes_up": "int",
        "seconds": "float",
    },
    ClientEvaluation: {"client": "int", "metrics": "RankingMetrics", "combination": "float | None"},
    PartialSums: {
        "round_num": "int",
        "clients": "tuple[int, ...]",
        "entity": "Tensor",
        "entity_counts": "Tensor",
        "modules": "dict[str, Tensor]",
        "module_weight": "Tensor",
        "tokens": "Tensor",
        "token_counts": "Tensor",
        "soft_queries": "dict[int, SoftQueries]",
        "rows": "dict[int, SentRows]",
        "seconds": "float",
        "rejected": "tuple[Rejection, ...]",
    },
    Rejection: {"client": "int | None", "round_num": "int", "reason": str(Reason), "message": "str"},
    KeyAdvertisement: {"client": "int", "round_num": "int", "encryption_key": "bytes", "mask_key": "bytes"},
    EncryptedShares: {"client": "int", "round_num": "int", "ciphertexts": "dict[int, bytes]"},
    MaskedUpdate: {"client": "int", "round_num": "int", "table": "Tensor", "common": "Tensor"},
    RevealedShares: {
        "client": "int",
        "round_num": "int",
        "self_seeds": "dict[int, bytes]",
        "mask_seeds": "dict[int, bytes]",
    },
    PartialMaskedSums: {
        "round_num": "int",
        "clients": "tuple[int, ...]",
        "table": "Tensor",
        "common": "Tensor",
        "rejected": "tuple[Rejection, ...]",
        "seconds": "float",
    },
    ConsistencySums: {"owners": "Tensor", "units": "dict[str, Tensor]", "squares": "dict[str, Tensor]"},
}
CLIENT_ACTOR_RETURNS = {
    "start": "tuple[str, str, int, float]",
    "add_clients": "None",
    "hello": "list[ClientHello]",
    "join": "None",
    "train": "tuple[list[ClientUpdate], tuple[list[ClientReport], int]]",
    "train_and_sum": "tuple[list[ClientReport], int]",
    "sum_up": "tuple[PartialSums | PartialMaskedSums, int]",
    "advertise_keys": "list[KeyAdvertisement]",
    "share_keys": "list[EncryptedShares]",
    "take_shares": "None",
    "reveal_shares": "list[RevealedShares]",
    # A client that moves, as a whole: to `adopt` of another client actor alone, nothing else takes it.
    "release": "tuple[list[ClientData], list[dict[str, Tensor]], int]",
    "adopt": "None",
    "evaluate": "list[list[ClientEvaluation]]",
    "measure": "list[dict[str, float]]",
    "sum_tokens": "ConsistencySums",
    # What an actor writes into the run's folder itself, unless its machine does not have that: to that folder alone.
    "save": "dict[int, dict[str, Tensor]] | None",
    "load": "bool",
    "take": "None",
}
SERVER_ACTOR_TAKES = {
    "start": [],
    "register": ["list[ClientHello]"],
    "sum_shape": [],
    "begin_round": ["int"],
    "receive": ["list[ClientUpdate]"],
    "merge": ["PartialSums | PartialMaskedSums"],
    "secure_round": ["int", "Sequence[int]"],
    "take_keys": ["list[KeyAdvertisement]"],
    "take_shares": ["list[EncryptedShares]"],
    "take_revealed": ["list[RevealedShares]"],
    "roster": [],
    "deliveries": ["Sequence[int]"],
    "unmask_request": [],
    "unmask": [],
    "finish_round": [],
    "save": ["Path"],
    "load": ["Path"],
    "take": ["dict[str, Tensor]"],  # what it returned from `save`
}


@pytest.mark.parametrize("message", FIELDS)
def test_only_declared_fields_are_sent(message: type) -> None:
    assert {item.name: _readable(item.type) for item in dataclasses.fields(message)} == FIELDS[message]


def _readable(annotation: Any) -> str:
    """Write a type as it stands in the source."""
    text = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )
    for prefix in (
        "torch.",
        "pathlib.",
        "collections.abc.",
        "fedsim.federated.messages.",
        "fedsim.federated.aggregation.",
        "fedsim.federated.message_checks.",
        "fedsim.privacy.secure_aggregation.messages.",
        "fedsim.privacy.secure_aggregation.sums.",
        "fedsim.federated.reports.",
        "fedsim.data.clients.",
        "fedsim.evaluation.consistency.",
    ):
        text = text.replace(prefix, "")
    return text


def test_the_actors_methods_let_nothing_else_out() -> None:
    returns = {name: _readable(inspect.signature(m).return_annotation) for name, m in _methods(_ClientActor)}
    assert returns == CLIENT_ACTOR_RETURNS
    takes = {
        name: [
            _readable(parameter.annotation)
            for parameter in inspect.signature(m).parameters.values()
            if parameter.name != "self" and not parameter.name.startswith("_ray")  # Ray adds one of its own
        ]
        for name, m in _methods(_ServerActor)
    }
    assert takes == SERVER_ACTOR_TAKES


def _methods(actor: type) -> list[tuple[str, Any]]:
    return [
        (name, method) for name, method in inspect.getmembers(actor, inspect.isfunction) if not name.startswith("_")
    ]


def test_metrics_are_numbers() -> None:
    assert {item.name for item in dataclasses.fields(RankingMetrics)} == {"mrr", "hits", "num_queries"}
