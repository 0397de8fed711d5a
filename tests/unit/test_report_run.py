"""The report of a run: what it shows is what the run did, finished or not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import vl_convert

from builders import tiny_graph
from experiments import small_config
from fedsim import cli, simulation
from fedsim.data.dataset import save_dataset
from fedsim.errors import RunError
from fedsim.report import write_run_report
from fedsim.report.html_examples import MAX_PICTURE_BYTES, data_uri
from fedsim.report.html_page import Figure, Page, Table
from fedsim.report.html_run import run_page
from fedsim.report.html_timeline import timeline_figure
from fedsim.report.plots import THEME
from fedsim.run_folder import RunFolder

NASTY = "<script>alert(1)</script>"
# The smallest PNG that there is: one pixel.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three rounds on data with pictures, some of whose labels look like markup."""
    place = tmp_path_factory.mktemp("report")
    graph = tiny_graph()
    labels = [f"{NASTY}{i}" if i % 2 else label for i, label in enumerate(graph.entity_labels)]
    graph = replace(graph, entity_labels=labels, entity_pictures=["a.png"] * graph.num_entities)
    save_dataset(graph, place / "data")
    (place / "data" / "pictures").mkdir(exist_ok=True)
    (place / "data" / "pictures" / "a.png").write_bytes(PIXEL)
    split = {"data.split": "dirichlet", "data.dirichlet_alpha": 2.0, "data.num_clients": 3}
    simulation.run(small_config({"data.path": str(place / "data"), "output": str(place / "run"), **split}))
    return place / "run"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def _texts(page: Page) -> dict[str, str]:
    return {section.name: section.text for section in page.sections}


def _figures(page: Page) -> dict[str, Figure]:
    return {figure.name: figure for figure in page.figures}


def test_a_finished_run_shows_all_its_plots(finished: Path) -> None:
    page = run_page(finished)
    assert page.notice == ""
    assert set(_figures(page)) == {
        *("mrr", "loss", "loss-terms", "seconds", "bytes", "available-before", "available-after"),
        *("sampling-cosine", "sampling-hits_at_10", "map-before", "map-after", "timeline"),
    }
    tables = {block.name for section in page.sections for block in section.blocks if isinstance(block, Table)}
    assert tables == {"test", "imputation", "consistency", "examples"}
    for figure in page.figures:
        assert len(figure.summary) > 20
        assert any(char.isdigit() for char in figure.summary), figure.name
        vl_convert.vegalite_to_vega({**figure.spec, "config": THEME})


def test_what_is_computed_from_the_models_is_what_the_run_measured(finished: Path) -> None:
    """The run's own number of sampling steps gives its imputation metrics, and the map has its consistency."""
    result = json.loads((finished / "result.json").read_text())
    figures = _figures(run_page(finished))
    for metric in ("cosine", "hits_at_10"):
        rows = figures[f"sampling-{metric}"].spec["data"]["values"]
        found = {row["modality"]: row["value"] for row in rows if row["steps"] == 3 and row["imputer"] == "diffusion"}
        assert found == {
            name: pytest.approx(result["imputation"][f"{name}/diffusion"][metric]) for name in ("text", "image")
        }
        assert {row["steps"] for row in rows} == {1, 2, 3, 4, 8}, "the schedule has 10 steps"
    after = figures["map-after"].summary
    assert f"Mean cosine between clients {result['consistency']['global/total']:.3f}" in after
    assert figures["map-before"].summary != after


def test_availability_is_that_of_the_data_and_of_what_was_left(finished: Path) -> None:
    """Every entity has a text, half of the texts of each client are hidden."""
    figures = _figures(run_page(finished))
    for name, share in (("available-before", 1.0), ("available-after", 0.5)):
        rows = [row for row in figures[name].spec["data"]["values"] if row["modality"] == "text"]
        assert [row["share"] for row in rows] == [pytest.approx(share, abs=0.03)] * 3


def test_examples_are_test_questions_with_pictures(finished: Path) -> None:
    (section,) = [section for section in run_page(finished).sections if section.name == "examples"]
    (table,) = section.blocks
    assert isinstance(table, Table)
    for question, _, expected, rank, *answers in table.rows:
        assert question.picture.startswith("data:image/png;base64,")
        marked = [place for place, answer in enumerate(answers, start=1) if answer.right]
        assert marked == ([int(float(rank.text))] if float(rank.text) <= 3 else [])
        assert all(answers[place - 1].text == expected.text for place in marked)
    assert "no pictures" not in section.text


def test_labels_of_entities_stay_texts(finished: Path, tmp_path: Path) -> None:
    html = write_run_report(finished, tmp_path / "r.html").read_text(encoding="utf-8")
    assert NASTY not in html
    assert "&lt;script&gt;alert(1)" in html, "in the table"
    assert "\\u003cscript\\u003ealert(1)" in html, "in the data of the map"


def test_a_run_that_is_not_finished_shows_what_there_is(copy: Path) -> None:
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "models")
    page = run_page(copy)
    assert "not finished: 3 of 3 rounds" in page.notice
    assert f"fedsim resume {copy}" in page.notice
    assert "map-after" in _figures(page), "the checkpoint's models are taken"
    shutil.rmtree(copy / "checkpoints")
    rows = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join(rows[:4]) + '\n{"round": 2, "cli')
    page = run_page(copy)
    assert "1 of 3 rounds" in page.notice
    assert "has no models yet" in _texts(page)["models"]
    assert {"mrr", "available-after", "timeline"} <= set(_figures(page))


def test_a_run_without_a_round_has_a_report(copy: Path) -> None:
    for name in ("models", "checkpoints"):
        shutil.rmtree(copy / name)
    for name in ("result.json", "timeline.jsonl"):
        (copy / name).unlink()
    (copy / "metrics.jsonl").write_text("")
    page = run_page(copy)
    assert "0 of 3 rounds" in page.notice
    assert _texts(page)["course"] == "No round is finished yet."
    assert "recorded no timeline" in _texts(page)["actors"]


def test_data_that_are_gone_leave_the_rest(copy: Path, tmp_path: Path) -> None:
    config = (copy / "config.yaml").read_text()
    lines = [f"  path: {tmp_path / 'gone'}" if line.startswith("  path:") else line for line in config.splitlines()]
    (copy / "config.yaml").write_text("\n".join(lines))
    page = run_page(copy)
    assert "cannot be read" in _texts(page)["modalities"]
    assert {"mrr", "seconds"} <= set(_figures(page))


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        (
            {"federation.strategy": "fede", "model.fusion": "none", "model.imputer": "zero"},
            {"map-after", "sampling-cosine"},
        ),
        ({"federation.strategy": "central"}, {"bytes", "map-after"}),
        ({"federation.strategy": "local", "data.missing_pattern": "natural"}, {"bytes", "sampling-cosine"}),
    ],
)
def test_what_a_method_does_not_have_is_left_out(
    changes: dict[str, Any], absent: set[str], finished: Path, tmp_path: Path
) -> None:
    paths = {"data.path": str(finished.parent / "data"), "output": str(tmp_path / "run"), "federation.num_rounds": 1}
    simulation.run(small_config(paths | changes))
    figures = _figures(run_page(tmp_path / "run"))
    assert not absent & set(figures)
    assert {"mrr", "seconds", "timeline"} <= set(figures)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_a_damaged_result_is_named(copy: Path) -> None:
    (copy / "result.json").write_text('{"test": ')
    with pytest.raises(RunError, match=r"result\.json cannot be read"):
        run_page(copy)


def test_the_command_writes_where_it_is_told(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(finished), "--output", str(tmp_path / "r.html")]) == 0
    assert "r.html" in capsys.readouterr().out
    assert (tmp_path / "r.html").stat().st_size < 1_600_000


def test_a_run_ends_with_its_report_and_a_defect_in_it_costs_nothing_else(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (finished / "config.yaml").read_text().replace("html: false", "html: true")
    (tmp_path / "c.yaml").write_text(config)
    written: list[Path] = []

    def write(folder: Path) -> Path:
        written.append(folder)
        if len(written) > 1:
            raise ZeroDivisionError("division by zero")
        return folder / "report.html"

    monkeypatch.setattr("fedsim.report.write_report", write)
    options = ["run", str(tmp_path / "c.yaml"), "--federation.num_rounds", "1", "--output"]
    assert cli.main([*options, str(tmp_path / "one")]) == 0
    assert "Report: " in capsys.readouterr().out
    assert cli.main([*options, str(tmp_path / "two")]) == 0
    assert "no report was written: division by zero; try again with: fedsim report" in capsys.readouterr().err
    assert written == [tmp_path / "one", tmp_path / "two"]


def test_a_resumed_run_shows_its_restart() -> None:
    """Two sessions of 10 s and 5 s, a day apart: the second begins at 10 s and 2 % of 15 s."""
    begin, day = 1000.0, 86400.0
    rows = [
        {"event": "start", "time": begin, "round": 1},
        {
            "event": "work",
            "time": begin + 10,
            "round": 1,
            "spans": [
                ["fedsim/x/server", "distilling in round 1", begin + 8, 2.0, False],
                ["fedsim/x/client-00000", "training in round 1", begin, 8.0, False],
                ["fedsim/x/client-00001", "training in round 1", begin, 9.0, True],
            ],
        },
        {"event": "start", "time": begin + day, "round": 2},
        {
            "event": "stop",
            "time": begin + day + 5,
            "round": 2,
            "error": None,
            "spans": [["fedsim/y/client-00001", "training in round 2", begin + day, 5.0, False]],
        },
    ]
    figure = timeline_figure(rows)
    assert figure is not None
    bars, marks = figure.spec["data"]["values"], figure.spec["layer"][1]["data"]["values"]
    assert [(bar["actor"], bar["start"], bar["end"], bar["failed"]) for bar in bars] == [
        ("server", 8.0, 10.0, False),
        ("client-00000", 0.0, 8.0, False),
        ("client-00001", 0.0, 9.0, True),
        ("client-00001", 10.3, 15.3, False),
    ]
    assert [(mark["start"], mark["text"]) for mark in marks] == [(10.3, "resumed with round 2")]
    assert figure.summary == (
        "3 actors over 15.0 s; client-00001 worked 14.0 s, server 2.0 s. Started 2 times: with round 1, with round 2. "
        "Session 1 ended early: killed."
    )


def test_a_killed_run_keeps_the_rows_before_and_after_the_line_that_was_cut_off(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_timeline("start", 1)
    with folder.timeline_file.open("a") as file:
        file.write('{"event": "work", "ti')
    folder.append_timeline("start", 2)
    folder.append_timeline("stop", 3, error="client 1 died")
    assert [(row["event"], row["round"], row.get("error")) for row in folder.read_timeline()] == [
        ("start", 1, None),
        ("start", 2, None),
        ("stop", 3, "client 1 died"),
    ]


def test_a_run_that_fails_says_so_in_its_timeline(finished: Path, tmp_path: Path) -> None:
    class Failing(simulation.SilentObserver):
        def round_started(self, round_num: int) -> None:
            if round_num == 2:
                raise RunError("client 1 died")

    paths = {"data.path": str(finished.parent / "data"), "output": str(tmp_path / "run")}
    with pytest.raises(RunError):
        simulation.run(small_config(paths), observer=Failing())
    rows = RunFolder(tmp_path / "run").read_timeline()
    assert [(row["event"], row["round"], row.get("error")) for row in rows] == [
        ("start", 1, None),
        ("work", 1, None),
        ("stop", 1, "client 1 died"),
    ]
    spans = [span for row in rows for span in row.get("spans", ())]
    assert [what for _, what, *_ in spans][:2] == ["training in round 1"] * 2
    assert "It ended early: client 1 died." in _figures(run_page(tmp_path / "run"))["timeline"].summary


@pytest.mark.parametrize(
    ("content", "start"),
    [
        (PIXEL, "data:image/png;base64,iVBOR"),
        (b"\xff\xd8\xff\xe0", "data:image/jpeg;base64,"),
        (b"<svg onload='alert(1)'/>", ""),
        (b"RIFF0000WAVE", ""),
        (PIXEL + b"0" * MAX_PICTURE_BYTES, ""),
    ],
)
def test_a_picture_is_embedded_by_what_it_is(content: bytes, start: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    uri = data_uri(tmp_path / "a.png")
    assert uri.startswith(start)
    assert bool(uri) == bool(start)
    assert data_uri(tmp_path / "absent.png") == ""
