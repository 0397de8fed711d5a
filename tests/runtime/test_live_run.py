"""A live run seen from outside: its metrics at the node, and each query of the Grafana dashboard in a Prometheus."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest

from actors.metrics import METRICS
from live_run import LiveRun
from live_run import live_run as start_run
from processes import wait_until

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "fedsim" / "report" / "grafana_dashboard.json").read_text(encoding="utf-8"))
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] if panel["type"] != "row" for target in panel["targets"]]
SECONDS = 60.0
SAMPLE = re.compile(r"^(ray_fedsim_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
ALL_CLIENTS = re.compile(r"^ray_fedsim_clients_alive\{.*\} 3\.0$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')


@pytest.fixture(scope="module")
def live_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRun]:
    """Start one run for all tests that look at a run from outside; it ends with them."""
    with start_run(tmp_path_factory.mktemp("live")) as run:
        yield run


def _samples(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for name, labels, value in SAMPLE.findall(text):
        found.setdefault(name, []).append((dict(LABEL.findall(labels)), float(value)))
    return found


def _exported(name: str) -> str:
    """Return the name under which Ray shows a metric."""
    ending = {"gauge": "", "counter": "_total", "histogram": "_count"}[METRICS[name].kind]
    return f"ray_{name}{ending}"


def test_a_live_run_shows_every_metric_with_its_labels(live_run: LiveRun) -> None:
    wanted = {_exported(name) for name in METRICS}
    found = _samples(live_run.scrape_until(lambda text: wanted <= _samples(text).keys()))
    assert wanted - found.keys() == set()
    for name, metric in METRICS.items():
        for labels, _ in found[_exported(name)]:
            assert labels["run"] == "watched"
            assert all(labels[label] for label in metric.labels)


def test_what_a_live_run_shows_is_true(live_run: LiveRun) -> None:
    # Each process tells its own, so the first sample of the actor can be older than the first round of the driver.
    found = _samples(live_run.scrape_until(lambda text: ALL_CLIENTS.search(text) is not None))
    value = {name: samples[0][1] for name, samples in found.items()}
    rows = [json.loads(line) for line in (live_run.folder / "metrics.jsonl").read_text().splitlines()]
    totals = {row["round"]: row for row in rows if row["client"] is None}
    assert value["ray_fedsim_rounds"] == 100_000
    assert 1 <= value["ray_fedsim_round"] <= max(totals)
    assert value["ray_fedsim_valid_mrr"] in {row["valid"]["mrr"] for row in totals.values()}
    assert value["ray_fedsim_clients_alive"] == value["ray_fedsim_clients_trained"] == 3
    assert value["ray_fedsim_clients_failed"] == value["ray_fedsim_clients_late"] == 0
    actors = {labels["actor"] for labels, _ in found["ray_fedsim_host_memory_bytes"]}
    assert actors == {"driver", "server", "pool-0"}
    assert all(50e6 < memory < 2e9 for _, memory in found["ray_fedsim_host_memory_bytes"])
    phases = {labels["phase"] for labels, _ in found["ray_fedsim_phase_seconds"]}
    assert {"train", "aggregate", "distil", "evaluate", "measure", "checkpoint"} == phases
    assert {labels["phase"] for labels, _ in found["ray_fedsim_call_seconds_count"]} == phases - {"checkpoint"}
    assert {labels["client"] for labels, _ in found["ray_fedsim_client_loss"]} == {"0", "1", "2"}


def test_a_gauge_is_still_there_when_ray_would_have_forgotten_it(live_run: LiveRun) -> None:
    """The number of rounds is set once; at the interval of this run Ray forgets a gauge after four seconds."""
    first_round = json.loads((live_run.folder / "metrics.jsonl").read_text().splitlines()[3])
    time.sleep(max(0.0, first_round["unix_seconds"] + 6 - time.time()))
    assert "ray_fedsim_rounds" in live_run.scrape()


@pytest.fixture(scope="module")
def prometheus(live_run: LiveRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Let Prometheus scrape the live run; returns its address."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    discovery = {"job_name": "ray", "file_sd_configs": [{"files": [str(live_run.targets)]}]}
    settings = {"global": {"scrape_interval": "1s"}, "scrape_configs": [discovery]}
    (folder / "prometheus.yml").write_text(json.dumps(settings))  # JSON is YAML
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (
        (folder / "log.txt").open("w") as log,
        subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log) as process,
    ):
        try:
            assert wait_until(lambda: _ready(address), SECONDS), (folder / "log.txt").read_text()
            yield address
        finally:
            process.kill()


def _ready(address: str) -> bool:
    try:
        urllib.request.urlopen(f"http://{address}/-/ready", timeout=10).close()
    except URLError:
        return False
    return True


def _ask(address: str, query: str) -> list[Any]:
    """Return the series that a query of the dashboard finds; an error of the query fails the test."""
    query = query.replace("$run", ".*").replace("$__rate_interval", "10s")
    url = f"http://{address}/api/v1/query?query={urllib.parse.quote(query)}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        found: list[Any] = json.loads(answer.read())["data"]["result"]
    return [item for item in found if item["value"][1] != "NaN"]


def test_every_query_of_every_panel_finds_data(prometheus: str) -> None:
    waiting, deadline = list(QUERIES), time.monotonic() + SECONDS
    while waiting and time.monotonic() < deadline:
        time.sleep(0.5)
        waiting = [query for query in waiting if not _ask(prometheus, query)]
    assert waiting == []
    runs = {item["metric"]["run"] for query in QUERIES for item in _ask(prometheus, query)}
    assert runs == {"watched"}


def test_the_variable_lists_the_runs(prometheus: str) -> None:
    (variable,) = [item for item in DASHBOARD["templating"]["list"] if item["name"] == "run"]
    metric = re.fullmatch(r"label_values\((\w+), run\)", variable["query"])
    assert metric is not None
    deadline = time.monotonic() + SECONDS
    while not (found := _ask(prometheus, metric[1])) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert {item["metric"]["run"] for item in found} == {"watched"}


def test_ray_reads_the_folder_that_the_command_names(live_run: LiveRun) -> None:
    """Ray's settings for Grafana name the folder of dashboards of their session."""
    grafana = live_run.targets.parent / "metrics" / "grafana"
    provisioning = grafana / "provisioning" / "dashboards" / "default.yml"
    assert f"path: {grafana / 'dashboards'}" in provisioning.read_text(encoding="utf-8")
