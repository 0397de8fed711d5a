"""Reports of benchmarks and sweeps: tables, best marked, links, and what is missing is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import vl_convert

from fedsim import cli
from fedsim.errors import RunError
from fedsim.report import write_benchmark_report, write_report, write_sweep_report
from fedsim.report.html_benchmark import benchmark_page
from fedsim.report.html_page import Cell, Page, Table
from fedsim.report.html_sweep import sweep_page
from fedsim.report.plots import THEME

METHODS = ("mmfede-zero", "mmfede-mean", "central")
# Test MRR by method and seed: the mean of mmfede-mean is 0.30, of mmfede-zero 0.25; central is not ranked.
MRR = {"mmfede-zero": (0.2, 0.3), "mmfede-mean": (0.29, 0.31), "central": (0.9, 0.9)}


def _benchmark(folder: Path, *, kind: str = "benchmark") -> Path:
    """Write the folder of a benchmark with one run that is not there."""
    recipe = {"settings": {}, "tuning": {"trials": [{"model.dropout": 0.4}, {"model.dropout": 0.6}]}}
    manifest = {
        "format_version": 1,
        "kind": kind,
        "fedsim": "0.1.0",
        "changes": {"evaluation.every": 2},
        "on_gpu": False,
        "recipes": {"tiny": recipe},
        "methods": {name: {} for name in METHODS},
        "tuned": {"tiny mmfede-zero": {"training.learning_rate": 0.01}, "tiny mmfede-mean": None},
        "rates": ["tiny 0.5", "tiny client-0.5"],
        "seeds": ["0", "1"],
    }
    folder.mkdir(parents=True)
    (folder / "benchmark.json").write_text(json.dumps(manifest))
    for label in ("0.5", "client-0.5"):
        for method, values in MRR.items():
            place = folder / "tiny" / ("any" if method == "central" else label) / method
            for seed, mrr in enumerate(values):
                if (label, method, seed) != ("client-0.5", "mmfede-zero", 1):
                    test = {"mrr": mrr, "hits_at_1": mrr, "hits_at_3": mrr, "hits_at_10": mrr, "num_queries": 5}
                    result = {"test": test, "valid_mrr": mrr, "seconds": {"train": 2.0, "evaluate": 1.0}}
                    (place / f"seed{seed}").mkdir(parents=True, exist_ok=True)
                    (place / f"seed{seed}" / "result.json").write_text(json.dumps(result))
    return folder


def _tables(page: Page) -> dict[str, list[list[Cell]]]:
    blocks = [block for section in page.sections for block in section.blocks]
    return {block.name: [list(row) for row in block.rows] for block in blocks if isinstance(block, Table)}


def _compile(page: Page) -> list[str]:
    """Let Vega-Lite read every plot; returns their names."""
    for figure in page.figures:
        vl_convert.vegalite_to_vega({**figure.spec, "config": THEME})
        assert any(char.isdigit() for char in figure.summary)
    return [figure.name for figure in page.figures]


def test_a_benchmark_has_its_table_with_the_best_in_bold_and_its_bars(tmp_path: Path) -> None:
    """Standard deviations (n - 1) of (0.2, 0.3) and (0.29, 0.31) are 0.0707 and 0.0141; differences -0.09 and -0.01."""
    folder = _benchmark(tmp_path / "bench")
    page = benchmark_page(folder, folder / "report.html")
    first = {row[0].text: row for row in _tables(page)["tiny-0"]}
    assert list(first) == ["mmfede-zero", "mmfede-mean †", "central † ‡"]
    assert [cell.text for cell in first["mmfede-zero"]][1:] == [*["0.2500 ± 0.0707"] * 3, "0.430", "3.0", "2"]
    assert [cell.bold for cell in first["mmfede-mean †"]][1:4] == [True] * 3
    assert not any(cell.bold for name in ("mmfede-zero", "central † ‡") for cell in first[name])
    assert _compile(page) == ["tiny-0", "tiny-1", "tiny-seconds"]
    glance = {row[0].text: row[1:] for row in _tables(page)["tiny-glance"]}
    assert [cell.text for cell in glance["mmfede-zero"]] == ["0.2500 ± 0.0707°", "0.2000 (1 of 2)"]
    assert [cell.bold for cell in glance["mmfede-mean †"]] == [True, True]
    (bars, of_clients, _) = page.figures
    rows = {row["method"]: row for row in of_clients.spec["data"]["values"]}
    assert (rows["mmfede-zero"]["text"], rows["mmfede-zero"]["low"]) == ("0.2000, 1 seed", 0.2)
    rows = {row["method"]: row for row in bars.spec["data"]["values"]}
    assert rows["mmfede-zero"]["text"] == "0.2500 ± 0.0707, 2 seeds"
    assert rows["mmfede-mean"]["best"]
    assert (rows["mmfede-zero"]["low"], rows["mmfede-zero"]["high"]) == pytest.approx((0.1793, 0.3207), abs=1e-4)


def test_an_option_that_changes_the_task_marks_all_methods_as_not_tuned(tmp_path: Path) -> None:
    folder = _benchmark(tmp_path / "bench")
    manifest = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    (folder / "benchmark.json").write_text(json.dumps(manifest | {"changes": {"privacy.clip": 1.0}}), encoding="utf-8")
    rows = _tables(benchmark_page(folder, folder / "report.html"))["tiny-0"]
    assert [row[0].text for row in rows] == ["mmfede-zero †", "mmfede-mean †", "central † ‡"]


def test_a_result_without_what_the_table_shows_is_told(tmp_path: Path) -> None:
    folder = _benchmark(tmp_path / "bench")
    path = folder / "tiny" / "0.5" / "mmfede-zero" / "seed0" / "result.json"
    path.write_text(json.dumps({"test": {"mrr": 0.1}, "valid_mrr": 0.1, "seconds": {}}), encoding="utf-8")
    text = " ".join(cell.text for row in _tables(benchmark_page(folder, folder / "r.html"))["runs"] for cell in row)
    assert "scores need hits_at_1" in text


def test_a_benchmark_that_is_not_finished_says_what_is_missing(tmp_path: Path) -> None:
    folder = _benchmark(tmp_path / "bench")
    page = benchmark_page(folder, folder / "report.html")
    assert "9 of 10 runs" in page.notice, "central runs once for both rates"
    second = {row[0].text: row for row in _tables(page)["tiny-1"]}
    assert second["mmfede-zero"][-1].text == "1 of 2"
    runs = _tables(page)["runs"]
    assert len(runs) == 10
    assert [row[5].text for row in runs].count("not run yet") == 1
    assert runs[0][6].href == "tiny/0.5/mmfede-zero/seed0"
    moved = benchmark_page(folder, tmp_path / "elsewhere" / "r.html")
    assert _tables(moved)["runs"][0][6].href == "../bench/tiny/0.5/mmfede-zero/seed0"
    assert "mmfede-zero" in write_benchmark_report(folder).read_text(encoding="utf-8")


def test_a_tuning_has_its_trials(tmp_path: Path) -> None:
    folder = _benchmark(tmp_path / "tuning", kind="tuning")
    for run in sorted(folder.glob("tiny/0.5/mmfede-zero/seed*")):
        run.rename(run.with_name(run.name.replace("seed", "trial") + "-seed100"))
    manifest = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    manifest["own_trials"] = {name: [{"model.dim": 8}, {"model.dim": 16}] for name in manifest["methods"]}
    (folder / "benchmark.json").write_text(json.dumps(manifest), encoding="utf-8")
    page = benchmark_page(folder, folder / "report.html")
    num_methods = len(manifest["methods"])
    assert f"2 of {6 + 2 * num_methods} runs" in page.notice
    manifest["recipes"]["tiny"]["tuning"]["own_trials"] = False
    (folder / "benchmark.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert "2 of 6 runs" in benchmark_page(folder, folder / "report.html").notice
    assert [cell.text for cell in _tables(page)["trials"][1]][:6] == [
        *("mmfede-zero", "tiny", "0.5", "model.dropout = 0.6", "100", "0.3000")
    ]
    for old, new in (("trial0-seed100", "trial9"), ("trial1-seed100", "trial2-seed7")):
        (folder / "tiny" / "0.5" / "mmfede-zero" / old).rename(folder / "tiny" / "0.5" / "mmfede-zero" / new)
    rows = _tables(benchmark_page(folder, folder / "report.html"))["trials"]
    assert [[cell.text for cell in row[3:5]] for row in rows] == [["the best of these, model.dim = 8", "7"], ["", ""]]


def _trial(number: int, params: dict[str, Any], mrr: float | None, **more: Any) -> dict[str, Any]:
    trial = {"id": f"trial-{number}", "params": params, "status": "finished", "valid_mrr": mrr, "rounds": 4}
    trial |= {"seconds": 8.0, "seconds_by_phase": {"train": 8.0}, "bytes_up": 4_000_000, "bytes_down": 8_000_000}
    trial |= {"folder": f"trials/{number}", "error": None, "schedule": [{"round": 1, "params": params}]}
    return trial | more


def _sweep(folder: Path, trials: list[dict[str, Any]], **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    plain = {"version": 1, "space": {}, "metric": "valid_mrr", "trials": trials, "best": "trial-1"}
    (folder / "sweep.json").write_text(json.dumps(plain | more))
    return folder


def _params(weight: float, scorer: str = "complex", rate: float = 0.001) -> dict[str, Any]:
    return {"distillation.logit_to_client": weight, "model.scorer": scorer, "training.learning_rate": rate}


def test_a_sweep_shows_values_costs_and_trials(tmp_path: Path) -> None:
    trials = [_trial(0, _params(0.5), 0.2), _trial(1, _params(1.5, "rotate", 0.1), 0.4), _trial(2, _params(1.0), 0.3)]
    (tmp_path / "trials" / "1").mkdir(parents=True)
    page = sweep_page(_sweep(tmp_path, trials), tmp_path / "report.html")
    assert page.notice == ""
    names = _compile(page)
    assert names[:4] == ["parallel", "mrr-0", "mrr-1", "mrr-2"]
    assert len(names) == 1 + 3 + 2 * 3
    figures = {figure.name: figure for figure in page.figures}
    assert figures["mrr-2"].spec["encoding"]["x"]["scale"]["type"] == "log", "0.001 to 0.1"
    assert "highest mean 0.4 at 1.5, lowest 0.2 at 0.5" in figures["mrr-0"].summary
    lines = figures["parallel"].spec["data"]["values"]
    places = {(row["trial"], row["axis"]): row["place"] for row in lines}
    assert places["trial-2", "distillation.logit_to_client"] == 0.5
    assert (places["trial-0", "model.scorer"], places["trial-1", "model.scorer"]) == (0, 1)
    assert [row["measure"] for row in figures["megabytes_per_round-0"].spec["data"]["values"]] == [3.0] * 3
    rows = _tables(page)["trials"]
    assert [row[0].text for row in rows] == ["trial-1", "trial-2", "trial-0"]
    assert rows[0][0].bold
    assert rows[0][-2].href == "trials/1"
    assert rows[1][-2].href == "", "its folder is not there"


def test_a_population_shows_the_schedule_it_found(tmp_path: Path) -> None:
    steps = [{"round": 1, "params": _params(0.5)}, {"round": 3, "params": _params(0.6)}]
    trials = [_trial(0, _params(0.5), 0.2), _trial(1, _params(0.6), 0.4, schedule=steps)]
    page = sweep_page(_sweep(tmp_path, trials, scheduler="pbt"), tmp_path / "report.html")
    assert "schedule-0" in _compile(page)
    (figure,) = [figure for figure in page.figures if figure.name.startswith("schedule")]
    own = [(row["round"], row["value"]) for row in figure.spec["data"]["values"] if row["trial"] == "trial-1"]
    assert own == [(1, 0.5), (3, 0.6), (4, 0.6)], "the last value holds to the last round"
    assert "0.5 from round 1, 0.6 from round 3" in figure.summary


def test_a_sweep_that_is_not_finished_shows_what_there_is(tmp_path: Path) -> None:
    trials = [
        _trial(0, _params(0.5), None, status="failed", rounds=0, error="client 1 died <b>"),
        _trial(1, _params(1.0), None, status="running", rounds=0),
    ]
    page = sweep_page(_sweep(tmp_path, trials, best=None), tmp_path / "report.html")
    assert "1 of 2 trials are still to end" in page.notice
    assert "fedsim tune --resume" in page.notice
    assert page.sections[0].text == "No trial has been validated yet."
    html = write_sweep_report(tmp_path).read_text(encoding="utf-8")
    assert "client 1 died &lt;b&gt;" in html


def test_a_sweep_of_another_version_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has version 7; this fedsim reads version 1"):
        sweep_page(_sweep(tmp_path, [], version=7), tmp_path / "r.html")
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(RunError, match="folder is damaged"):
        sweep_page(tmp_path, tmp_path / "r.html")


def test_the_command_finds_out_what_a_folder_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _benchmark(tmp_path / "bench")
    assert cli.main(["report", str(folder)]) == 0
    assert "report.html" in capsys.readouterr().out
    sweep = _sweep(tmp_path / "sweep", [_trial(1, _params(1.0), 0.25)])
    assert "<title>Sweep sweep</title>" in write_report(sweep).read_text(encoding="utf-8")
    (folder / "benchmark.json").write_text('{"kind": "benchmark"}')
    assert cli.main(["report", str(folder)]) == 2
    assert "folder is damaged" in capsys.readouterr().err
