"""The Grafana dashboard: made by its script, exported by its command, and each of its queries finds data."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from actors.metrics import METRICS
from fedsim import cli

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "fedsim" / "report" / "grafana_dashboard.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]


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
