"""The Grafana dashboard: made by its script, exported by its command, and each of its queries finds data."""

import importlib.util
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
from fedsim import cli
from live_run import LiveRun
from processes import wait_until

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "fedsim" / "report" / "grafana_dashboard.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
SECONDS = 60.0


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


def test_the_file_is_what_the_script_makes() -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="Grafana's builder library needs Python 3.11")
    spec = importlib.util.spec_from_file_location("builder", ROOT / "scripts" / "build_grafana_dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    mend = "run python scripts/build_grafana_dashboard.py"
    assert builder.TARGET.read_text(encoding="utf-8") == builder.build(), mend


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    endings = {"gauge": "", "counter": "_total", "histogram": "_bucket"}
    named = {name for query in QUERIES for name in re.findall(r"ray_(\w+)\{", query)}
    assert named == {f"{name}{endings[metric.kind]}" for name, metric in METRICS.items()}


def test_panels_do_not_overlap() -> None:
    cells = [
        (x, y)
        for position in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(position["x"], position["x"] + position["w"])
        for y in range(position["y"], position["y"] + position["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24, "a row of Grafana's has 24 columns"


def test_export_writes_into_the_folder_that_ray_or_the_user_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = "fedsim_grafana_dashboard.json"
    assert cli.main(["dashboard", "export", str(tmp_path / "given")]) == 0
    assert json.loads((tmp_path / "given" / written).read_text()) == DASHBOARD
    assert str(tmp_path / "given" / written) in capsys.readouterr().out
    monkeypatch.setenv("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", str(tmp_path / "named"))
    assert cli.main(["dashboard", "export"]) == 0
    assert (tmp_path / "named" / written).is_file()
    monkeypatch.delenv("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    session = tmp_path / "ray" / "session_latest" / "metrics" / "grafana" / "dashboards"
    session.mkdir(parents=True)
    assert cli.main(["dashboard", "export"]) == 0
    assert (session / written).is_file()


def test_export_without_a_folder_or_into_a_file_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert cli.main(["dashboard", "export"]) == 2
    shown = capsys.readouterr().err
    assert "no Ray session with a dashboard has run on this machine" in shown
    assert "start the cluster first, or give DIR" in shown
    (tmp_path / "file").write_text("")
    assert cli.main(["dashboard", "export", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_ray_reads_the_folder_that_the_command_names(live_run: LiveRun) -> None:
    """Ray's settings for Grafana name the folder of dashboards of their session."""
    grafana = live_run.targets.parent / "metrics" / "grafana"
    provisioning = grafana / "provisioning" / "dashboards" / "default.yml"
    assert f"path: {grafana / 'dashboards'}" in provisioning.read_text(encoding="utf-8")
