"""Ranking with what the server has just aggregated (`evaluation.evaluate_on`), and going on after a kill."""

from pathlib import Path
from typing import Any

import pytest
import torch

from builders import tiny_graph
from experiments import (
    MIXED,
    same_values,
    small_config,
    strategy_runtime,
)
from fedsim import simulation
from fedsim.data.dataset import save_dataset
from fedsim.errors import ConfigError
from fedsim.federated import STRATEGIES
from fedsim.federated.runtime import InProcessRuntime, make_strategy
from fedsim.results import RoundSummary, SilentObserver, result_as_json

FEDERATED = [name for name, strategy in STRATEGIES.items() if strategy.federated]


class Killed(BaseException):
    """Stands for SIGKILL."""


class Killer(SilentObserver):
    """Kills the run after a round."""

    def round_finished(self, summary: RoundSummary) -> None:
        if summary.round_num == 2:
            raise Killed


def _outcome(result: simulation.RunResult) -> dict[str, Any]:
    return {name: value for name, value in result_as_json(result).items() if name != "seconds"}


@pytest.mark.parametrize(("strategy", "evaluate_on"), [("fedec", None), ("pfedeg", "aggregated")])
def test_a_killed_run_ends_with_the_bits_of_an_unbroken_one(
    strategy: str, evaluate_on: str | None, tmp_path: Path
) -> None:
    save_dataset(tiny_graph(), tmp_path / "tiny")
    settings = {
        "data.path": str(tmp_path / "tiny"),
        **MIXED,
        "federation.strategy": strategy,
        "federation.cohort_size": 2,
        "evaluation.evaluate_on": evaluate_on,
    }
    one, other = (small_config({**settings, "output": str(tmp_path / name)}) for name in ("unbroken", "broken"))
    unbroken = simulation.run(one)
    with pytest.raises(Killed):
        simulation.run(other, observer=Killer())
    assert _outcome(simulation.resume(tmp_path / "broken")) == _outcome(unbroken)
    assert _outcome(simulation.evaluate(tmp_path / "unbroken")) == _outcome(unbroken)


@pytest.mark.parametrize("strategy", FEDERATED)
def test_ranking_what_was_aggregated_changes_no_training(strategy: str) -> None:
    """Delivered for the ranking and delivered again at the next round are one: all but the ranking is as without."""
    plain, delivered = strategy_runtime(strategy), strategy_runtime(strategy)
    for round_num, cohort in ((1, [0, 1, 2]), (2, [0, 2]), (3, [1, 2])):
        for runtime in (plain, delivered):
            reports = runtime.train(round_num, cohort).reports
            if runtime is plain:
                expected = reports
        assert [report.losses for report in reports] == [report.losses for report in expected]
        assert [report.bytes_down for report in reports] == [report.bytes_down for report in expected]
        delivered.deliver(round_num + 1)
    assert plain.server is not None
    assert delivered.server is not None
    assert same_values(plain.server.state(), delivered.server.state())


def test_aggregated_ranks_each_client_with_the_servers_rows_of_the_round(tmp_path: Path) -> None:
    """The models of the best round are the server's rows and modules, not what the clients trained."""
    save_dataset(tiny_graph(), tmp_path / "tiny")
    found = {}
    for name in ("trained", "aggregated"):
        config = small_config(
            {
                "data.path": str(tmp_path / "tiny"),
                "output": str(tmp_path / name),
                "federation.strategy": "fede",
                "model.imputer": "zero",
                "evaluation.evaluate_on": name,
            }
        )
        result = simulation.run(config)
        runtime = InProcessRuntime(simulation.prepare(config))
        runtime.load(result.folder / "models")
        assert runtime.server is not None
        same = {
            torch.equal(client.values.params["global/entity"], runtime.server.global_model.entity[client.entity_ids])
            for client in runtime.clients.values()
        }
        assert same == {name == "aggregated"}
        found[name] = result
    assert found["trained"].bytes_down == found["aggregated"].bytes_down
    assert found["trained"].test != found["aggregated"].test


def test_the_protocol_of_fede_ranks_what_was_aggregated_unless_told_otherwise() -> None:
    assert not small_config().evaluation.on_aggregated
    assert small_config({"evaluation.protocol": "fede"}).evaluation.on_aggregated
    assert small_config({"evaluation.evaluate_on": "aggregated"}).evaluation.on_aggregated
    kept = small_config({"evaluation.protocol": "fede", "evaluation.evaluate_on": "trained"})
    assert not kept.evaluation.on_aggregated


def test_rows_that_never_arrive_cannot_be_ranked() -> None:
    settings = {"evaluation.protocol": "fede", "communication.top_k": 0.5, "federation.strategy": "fede"}
    with pytest.raises(ConfigError, match=r"'evaluation\.evaluate_on' .* set evaluate_on to trained, or top_k to null"):
        make_strategy(small_config(settings))
    make_strategy(small_config({**settings, "evaluation.evaluate_on": "trained"}))
    make_strategy(small_config({**settings, "federation.strategy": "local"}))
