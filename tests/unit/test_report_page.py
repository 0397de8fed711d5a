"""A report is one file: nothing in it asks a network for anything, and no label becomes markup."""

import base64
import hashlib
import json
from html.parser import HTMLParser

import pytest
import vl_convert

from fedsim.report.html_page import Cell, Figure, Page, Section, Table, as_script, render, text_cells
from fedsim.report.plots import THEME, hover, lines, name, number, rounds
from fedsim.report.plots_run import availability, bytes_by_round, measure_by_round, seconds_by_phase

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&\u2028"


class _Reader(HTMLParser):
    """Collects the elements of a page and the contents of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._in_script = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
        else:
            self.texts.append(data)


def _read(html: str) -> _Reader:
    reader = _Reader()
    reader.feed(html)
    return reader


def _nasty_page() -> Page:
    rows = [{"round": 1, "value": 0.5, "label": NASTY}]
    encoding = number("value", NASTY), name("label", NASTY), hover(label=NASTY)
    figure = Figure("plot", NASTY, lines(rows, rounds(1), *encoding), NASTY, NASTY)
    cells = (Cell(NASTY, detail=NASTY), Cell(NASTY, bold=True, right=True), Cell(NASTY, href="runs/a%20b"))
    table = Table("table", NASTY, (NASTY, "b", "c"), (cells,), NASTY)
    return Page(NASTY, NASTY, {NASTY: NASTY}, [Section("section", NASTY, NASTY, (figure, table))])


def test_nothing_that_is_data_becomes_markup() -> None:
    page = _read(render(_nasty_page()))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 3, "the plots, the library and the page's own script"
    assert "img" not in tags
    assert not [attrs for _, attrs in page.elements if any(key.startswith("on") for key in attrs)]
    assert sum(NASTY.replace("\u2028", "") in text.replace("\u2028", "") for text in page.texts) >= 8, "shown as it is"
    plots = json.loads(page.scripts[0])["plots"]
    assert plots["plot"]["data"]["values"][0]["label"] == NASTY


def test_the_page_may_run_its_own_scripts_and_load_nothing() -> None:
    page = _read(render(_nasty_page()))
    (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and a.get("http-equiv")]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for script in page.scripts[1:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in rules["script-src"]
    assert "unsafe-inline" not in rules["script-src"]
    loaded = [a.get("src") or a.get("href") for tag, a in page.elements if tag in ("script", "link", "img", "iframe")]
    assert not [address for address in loaded if address and not address.startswith("data:")]


def test_json_in_a_page_has_no_end_tag_and_no_number_that_json_lacks() -> None:
    text = as_script({"a": [float("nan"), float("inf"), 1.5], "b": ("</script>", "\u2029")})
    assert "<" not in text
    assert "\u2029" not in text
    assert json.loads(text) == {"a": [None, None, 1.5], "b": ["</script>", "\u2029"]}


def test_columns_of_numbers_are_aligned() -> None:
    rows = (text_cells(["1", "0.25", "–", "1,200", "3 ms", "50 %"]), text_cells(["2", "-0.5", "1", "7", "4 ms", "9 %"]))
    table = Table("t", "t", ("name", "a", "b", "c", "d", "e"), rows)
    assert table.numeric == [False, True, True, True, False, True]


def test_a_plot_is_described_by_what_it_shows() -> None:
    """All clients: 0.1, 0.4, 0.3 in rounds 1 to 3; client 0 ends with 0.2, client 1 with 0.5."""
    by_client = {0: {1: 0.1, 2: 0.3, 3: 0.2}, 1: {1: 0.1, 2: 0.5, 3: 0.5}}
    total = {1: 0.1, 2: 0.4, 3: 0.3}
    figure = measure_by_round("mrr", "validation MRR", by_client, total, best_is_high=True)
    assert figure.summary == (
        "Validation MRR: 0.1000 in round 1, 0.3000 in round 3, highest 0.4000 in round 2; clients end between 0.2000 "
        "(client 0) and 0.5000 (client 1)."
    )
    assert "lowest 0.1000 in round 1" in measure_by_round("l", "loss", by_client, total, best_is_high=False).summary
    seconds = {1: {"train": 3.0, "evaluate": 1.0}, 2: {"train": 3.0, "evaluate": 1.0}}
    assert seconds_by_phase(seconds).summary == "8.0 s in 2 rounds: train 6.0 s (75%), evaluate 2.0 s (25%)."
    sent = bytes_by_round({1: (1_000_000, 3_000_000), 2: (2_000_000, 3_000_000)})
    assert sent.summary == "3.0 MB up and 6.0 MB down in 2 rounds; 1.5 MB up a round on average."
    shares = availability("a", "a", {0: {"text": 1.0, "image": 0.5}, 1: {"text": 0.5, "image": 0.25}}, "")
    assert "text at 75% (clients from 50% to 100%)" in shares.summary


@pytest.mark.parametrize("num_clients", [3, 40])
def test_many_clients_become_a_spread(num_clients: int) -> None:
    by_client = {client: {1: client / 100, 2: client / 50} for client in range(num_clients)}
    figure = measure_by_round("mrr", "MRR", by_client, {1: 0.2, 2: 0.4}, best_is_high=True)
    spread = [layer for layer in figure.spec["layer"] if layer["mark"]["type"] == "area"]
    assert len(figure.spec["data"]["values"]) == (6 if num_clients == 3 else 0)
    assert len(spread) == (0 if num_clients == 3 else 2)
    if spread:
        assert spread[0]["data"]["values"][1] == {"round": 2, "low": 0.0, "first": 0.195, "third": 0.585, "high": 0.78}
    vl_convert.vegalite_to_vega({**figure.spec, "config": THEME})  # Vega-Lite takes it
