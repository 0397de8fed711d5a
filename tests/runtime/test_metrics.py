"""Ray's metrics: what a live run shows, how many series there are, and what the docs say of them."""

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors import metrics
from actors.calls import Call
from actors.metrics import METRICS, RunMetrics, Watch, WatchedTimeline
from fedsim.errors import RunError

WATCHING = (Path(__file__).parents[2] / "docs" / "watching.md").read_text(encoding="utf-8")
SAMPLE = re.compile(r"^(ray_fedsim_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
CLIENT_ROW = {"round": 2, "client": 1, "losses": {"total": 4.0}, "seconds": 0.5, "valid": {"mrr": 0.25}}
ROUND_ROW = {
    "round": 2,
    "client": None,
    "loss": 4.5,
    "num_trained": 3,
    "bytes_up": 10,
    "bytes_down": 0,
    "phase_seconds": {"train": 1.0},
    "valid": {"mrr": 0.5},
    "participation": {"late": [4, 7]},
    "imputation": {"image/mean": {"cosine": float("nan")}, "image/diffusion": {"cosine": 0.75}},
    "consistency": {"local/total": 0.625},
}


class Instrument:
    """Stands for a metric of Ray's: keeps what it is told."""

    def __init__(self, told: list[tuple[str, float, dict[str, str]]], name: str) -> None:
        self.told, self.name = told, name

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.told.append((self.name, value, tags))

    inc = observe = set


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, dict[str, str]]]:
    """Return the list of all that is told from now on: name, value, labels."""
    found: list[tuple[str, float, dict[str, str]]] = []
    monkeypatch.setattr(metrics, "_instrument", lambda name: Instrument(found, name))
    return found


@pytest.fixture
def run_metrics(told: list[Any]) -> Iterator[RunMetrics]:
    made = RunMetrics("fedsim/trial", 5, per_client=True)
    yield made
    made.close()


def test_a_round_is_told(run_metrics: RunMetrics, told: list[Any]) -> None:
    run_metrics.record([CLIENT_ROW, ROUND_ROW])
    run = {"run": "trial"}
    expected = [
        ("fedsim_round", 2, run),
        ("fedsim_loss", 4.5, run),
        ("fedsim_valid_mrr", 0.5, run),
        ("fedsim_phase_seconds", 1.0, run | {"phase": "train"}),
        ("fedsim_bytes_up", 10, run),
        ("fedsim_clients_trained", 3, run),
        ("fedsim_clients_late", 2, run),
        ("fedsim_imputation_cosine", 0.75, run | {"part": "image/diffusion"}),
        ("fedsim_consistency_cosine", 0.625, run | {"part": "local/total"}),
        ("fedsim_client_loss", 4.0, run | {"client": "1"}),
        ("fedsim_client_seconds", 0.5, run | {"client": "1"}),
        ("fedsim_client_valid_mrr", 0.25, run | {"client": "1"}),
    ]
    assert [item for item in expected if item not in told] == []
    assert not [item for item in told if item[0] == "fedsim_bytes_down"], "a counter cannot be told of nothing"
    assert ("image/mean") not in {labels.get("part") for _, _, labels in told}, "NaN is no value"


def test_many_clients_have_no_series_of_their_own(told: list[Any]) -> None:
    made = RunMetrics("fedsim/trial", 5, per_client=False)
    made.record([{**CLIENT_ROW, "client": number} for number in range(500)] + [ROUND_ROW])
    made.close()
    assert not [labels for _, _, labels in told if "client" in labels]
    assert len({(name, *sorted(labels.items())) for name, _, labels in told}) < 20


def test_rounds_add_no_series(run_metrics: RunMetrics) -> None:
    def series() -> set[Any]:
        # Those of the process itself, which bear its name, come from a thread, sooner or later.
        return {key for key in run_metrics.watch._values.copy() if "actor" not in dict(key[1])}

    run_metrics.record([CLIENT_ROW, ROUND_ROW])
    before = series()
    for round_num in range(3, 50):
        run_metrics.record([CLIENT_ROW | {"round": round_num}, ROUND_ROW | {"round": round_num}])
    assert series() == before


def test_queues_count_down_to_zero_and_results_pass_unchanged(run_metrics: RunMetrics, told: list[Any]) -> None:
    """Actor a has three batches, b one; their results come in the order a, b, a, a."""

    def call(actor: str) -> Call[int]:
        return Call("client 0", f"fedsim/trial/{actor}", "node", "training", lambda: None)  # type: ignore[arg-type, return-value]

    a, b = call("a"), call("b")
    results = [(a, 1), (b, 2), (a, 3), (a, 4)]
    assert list(run_metrics.queues([[a, a, a], [b]], iter(results))) == results
    lengths = [(labels["actor"], value) for name, value, labels in told if name == "fedsim_queue_length"]
    assert lengths == [("a", 3), ("b", 1), ("a", 2), ("b", 0), ("a", 1), ("a", 0)]


def test_a_failure_is_told_with_its_actor() -> None:
    failed: list[str] = []
    timeline = WatchedTimeline(failed.append)
    timeline.ended("fedsim/trial/pool-0", "training", 1.0)
    with pytest.raises(RunError), timeline.span("fedsim/trial/pool-1", "training"):
        raise RunError("no")
    assert failed == ["fedsim/trial/pool-1"]
    assert [span.failed for span in timeline.take()] == [False, True]


def test_a_watch_repeats_its_gauges_until_it_is_closed(told: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "REFRESH_SECONDS", 0.01)
    watch = Watch("trial", lambda: {"fedsim_clients_alive": 2}, actor="pool-0")
    watch.set("fedsim_loss", 3.0)
    deadline = time.monotonic() + 10
    while [name for name, _, _ in told].count("fedsim_loss") < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    watch.close()
    number = len(told)
    time.sleep(0.05)
    assert len(told) == number
    assert not [thread for thread in threading.enumerate() if thread.name == "fedsim-metrics"]
    assert told.count(("fedsim_loss", 3.0, {"run": "trial"})) >= 3
    assert told.count(("fedsim_clients_alive", 2, {"run": "trial", "actor": "pool-0"})) >= 3


def test_the_docs_have_every_metric_as_the_code_has_it() -> None:
    rows = re.findall(r"^\| `(fedsim_\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|$", WATCHING, flags=re.MULTILINE)
    told = {
        name: (kind, tuple(re.findall(r"`(\w+)`", labels)), meaning.strip()) for name, kind, labels, meaning in rows
    }
    assert told == {name: (item.kind, ("run", *item.labels), item.meaning) for name, item in METRICS.items()}
