"""Means, spreads, the best method and paired tests; and the forms of the table."""

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console
from scipy import stats

from fedsim.benchmark.comparison import Column, Entry, RecipeTable, compare, make_column, paired_p
from fedsim.benchmark.execution import Outcome
from fedsim.benchmark.methods import METHODS
from fedsim.benchmark.plan import Plan, parse_missing
from fedsim.benchmark.recipes import Recipe, TuningBudget
from fedsim.benchmark.records import as_csv, as_run_list, hardware
from fedsim.benchmark.tables import (
    LEVEL,
    Block,
    Grid,
    Text,
    as_latex,
    as_markdown,
    escape_latex,
    make_grids,
    notes,
    show,
)
from fedsim.benchmark.tuned import Tuned

RECIPE = Recipe("tiny", "tiny", "tiny", "", {"data.path": "tiny"}, ("0.5",), TuningBudget())
NAMES = ("central", "mmfede-zero", "mmfede-mean", "mmfed3-hide")


def _outcome(folder: Path, mrr: float | None) -> Outcome:
    if mrr is None:
        return Outcome(folder, error="client 1 failed in round 2")
    test = {"mrr": mrr, "hits_at_1": mrr / 2, "hits_at_3": 0.3, "hits_at_10": 0.9 - mrr, "num_queries": 10}
    result = {"test": test, "valid_mrr": mrr, "best_round": 2, "bytes_up": 10, "bytes_down": 20}
    return Outcome(folder, result | {"seconds": {"train": 2.0, "evaluate": 0.5}})


def _entry(name: str, *mrrs: float | None) -> Entry:
    outcomes = tuple(_outcome(Path(f"/runs/{name}/seed{seed}"), mrr) for seed, mrr in enumerate(mrrs))
    return Entry(RECIPE, parse_missing("0.5"), METHODS[name], outcomes, tuned=True)


def _column(*entries: Entry) -> Column:
    return make_column(parse_missing("0.5"), entries)


def test_paired_p_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, deviation 1, t = 2 / (1 / sqrt 3) = 3.4641 with 2 degrees of freedom.

    Student's distribution with 2 degrees has P(|T| > t) = 1 - t / sqrt(t^2 + 2) = 1 - 3.4641 / sqrt 14 = 0.0742.
    """
    assert paired_p([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == pytest.approx(0.074180, abs=1e-6)


def test_paired_p_is_that_of_scipy_and_symmetric() -> None:
    first, second = [0.31, 0.29, 0.35, 0.30], [0.28, 0.29, 0.33, 0.31]
    assert paired_p(first, second) == pytest.approx(stats.ttest_rel(first, second).pvalue)
    assert paired_p(second, first) == pytest.approx(paired_p(first, second))


def test_paired_p_without_a_meaning_is_none() -> None:
    assert paired_p([0.3], [0.2]) is None
    assert paired_p([0.3, 0.2], [0.3, 0.2]) is None
    assert paired_p([2.0, 3.0], [1.0, 2.0]) == 0.0


def test_mean_and_spread_by_hand() -> None:
    """0.1, 0.2 and 0.6: mean 0.3, squared deviations 0.04 + 0.01 + 0.09 = 0.14, over 2 is 0.07, root 0.264575."""
    entry = _entry("mmfede-zero", 0.1, 0.2, 0.6)
    assert entry.mean("mrr") == pytest.approx(0.3)
    assert entry.spread("mrr") == pytest.approx(0.264575, abs=1e-6)
    assert _entry("mmfede-zero", 0.1).spread("mrr") is None
    assert _entry("mmfede-zero", None).mean("mrr") is None


def test_the_best_is_tested_against_the_second_and_the_others_against_the_best() -> None:
    zero, mean, ours = (0.2, 0.22, 0.21), (0.25, 0.24, 0.28), (0.3, 0.27, 0.33)
    column = _column(_entry("mmfede-zero", *zero), _entry("mmfede-mean", *mean), _entry("mmfed3-hide", *ours))
    assert column.best == "mmfed3-hide"
    assert column.p_values == pytest.approx(
        {
            "mmfed3-hide": stats.ttest_rel(ours, mean).pvalue,
            "mmfede-mean": stats.ttest_rel(ours, mean).pvalue,
            "mmfede-zero": stats.ttest_rel(ours, zero).pvalue,
        }
    )


def test_each_metric_has_its_own_best_and_equals_share_it() -> None:
    zero, mean = _entry("mmfede-zero", 0.2, 0.3), _entry("mmfede-mean", 0.3, 0.4)
    column = _column(zero, mean)
    assert (column.is_best(mean, "mrr"), column.is_best(zero, "mrr")) == (True, False)
    assert (column.is_best(mean, "hits_at_10"), column.is_best(zero, "hits_at_10")) == (False, True)
    column = _column(zero, same := _entry("mmfede-mean", 0.2, 0.3))
    assert column.is_best(zero, "mrr")
    assert column.is_best(same, "mrr")


def test_a_ceiling_and_a_method_with_failed_runs_are_not_the_best() -> None:
    column = _column(_entry("central", 0.9, 0.8), _entry("mmfede-mean", 0.7, None), _entry("mmfede-zero", 0.2, 0.3))
    assert column.best == "mmfede-zero"
    assert not any(column.is_best(entry, "mrr") for entry in column.entries[:2])
    assert "mmfede-mean" not in column.p_values
    assert "mmfede-zero" not in column.p_values, "there is no second"
    assert column.p_values["central"] is not None
    assert _column(_entry("mmfede-mean", None)).best is None


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    methods = [METHODS[name] for name in NAMES]
    rates = {"tiny": [parse_missing("0.5"), parse_missing("client")]}
    tuned = Tuned({"tiny": {name: {} for name in NAMES if name != "mmfede-mean"}})
    return Plan(tmp_path / "out_1", [RECIPE], methods, rates, 2, tuned, {"evaluation.every": 2})


def _outcome_of(folder: Path) -> Outcome:
    """Give `mmfed3-hide` the best values; one run of `mmfede-mean` failed."""
    seed = int(folder.name.removeprefix("seed"))
    base = dict(zip(NAMES, (0.5, 0.2, 0.25, 0.3), strict=True))[folder.parent.name]
    failed = folder.parent.name == "mmfede-mean" and seed == 1 and folder.parent.parent.name == "0.5"
    return _outcome(folder, None if failed else base + 0.01 * seed * base)


def test_markdown_has_all_cells_the_best_in_bold_and_what_is_missing(plan: Plan) -> None:
    tables = compare(plan, _outcome_of)
    text = as_markdown(make_grids(tables, 2), notes(tables, plan, ["Hardware: x"]), "runs.md")
    assert text.startswith("## tiny: filtered test MRR, 2 seeds\n")
    _, glance, details = text.split("## ")
    assert "| 0.5 hidden: MRR | 0.5 of the clients blind: MRR | s/run |" in glance
    assert "| `mmfed3-hide` | **0.3015 ± 0.0021** | **0.3015 ± 0.0021** | 2 |" in glance
    assert LEVEL not in details.partition("\n- ")[0]
    assert f"{LEVEL} not told apart from the best" in text
    header, rule, *rows = [line for line in details.splitlines() if line.startswith("|")]
    assert header.split(" | ")[1:5] == [f"0.5 hidden: {name}" for name in ("MRR", "Hits@1", "Hits@10", "p")]
    assert header.split(" | ")[5] == "0.5 of the clients blind: MRR"
    assert len({line.count("|") for line in (header, rule, *rows)}) == 1
    cells = {row.split("`")[1]: [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}
    assert cells["mmfed3-hide"][0] == "**0.3015 ± 0.0021**"
    assert cells["mmfede-mean †"][0] == "0.2500 (1 of 2)"
    assert cells["mmfede-mean †"][4] == "0.2512 ± 0.0018"
    assert cells["central ‡"][0] == "0.5025 ± 0.0035"
    assert cells["mmfed3-hide"][-1] == "2"
    for part in [
        "† not tuned",
        "‡ sees what is hidden",
        "Changed for all: evaluation.every = 2.",
        "Missing: tiny/0.5/mmfede-mean/seed1: client 1 failed in round 2",
        "run once: central",
        "(runs.md)",
        "Hardware: x",
    ]:
        assert part in text


def test_the_glance_marks_what_is_level_with_the_best() -> None:
    """Differences .01, -.01, .03: mean .01, t = .87, p .48; all the others' are .1 and vary little."""
    missing = [parse_missing("0"), parse_missing("0.5")]
    methods = {"mmfed3-hide": (0.31, 0.30, 0.33), "mmfede-mean": (0.30, 0.31, 0.30), "mmfede-zero": (0.21, 0.2, 0.23)}
    entries = [_entry(name, *mrrs) for name, mrrs in methods.items()]
    grid, _ = make_grids([RecipeTable(RECIPE, tuple(make_column(rate, entries) for rate in missing))], 3)
    assert grid.title == "tiny: filtered test MRR, 3 seeds"
    assert [(block.title, block.headers) for block in grid.blocks] == [("0 hidden", ("MRR",)), ("0.5 hidden", ("MRR",))]
    ((best,), (level,), (worse,)) = grid.blocks[0].rows
    assert best == Text("0.3133 ± 0.0153", bold=True)
    assert level == Text(f"0.3033 ± 0.0058{LEVEL}")
    assert worse == Text("0.2133 ± 0.0153")
    assert len(make_grids([RecipeTable(RECIPE, (make_column(missing[0], entries),))], 3)) == 1


def test_latex_is_escaped_and_balanced(plan: Plan) -> None:
    tables = compare(plan, _outcome_of)
    text = as_latex(make_grids(tables, 2), notes(tables, plan, []))
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert "\\textbf{0.3015 $\\pm$ 0.0021}" in text
    assert "$\\dagger$ not tuned on this data" in text
    assert "<" not in "".join(body).replace("$<$", "")
    assert text.count("\\begin{") == text.count("\\end{")
    columns = [line.count(" & ") for line in body if line.endswith("\\\\") and "multicolumn" not in line]
    assert set(columns) == {3, 9}
    assert not any(char in "".join(body) for char in "±†‡–°≥")
    assert escape_latex("a_b & 5% #1 {x} \\ †") == "a\\_b \\& 5\\% \\#1 \\{x\\} \\textbackslash{} $\\dagger$"


def test_csv_and_run_list_name_run_and_command_of_every_seed(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plan.output.parent)
    tables = compare(plan, _outcome_of)
    rows = list(csv.DictReader(io.StringIO(as_csv(tables))))
    assert len(rows) == 4 * 2 * 2
    row = rows[2]
    assert (row["method"], row["missing"], row["seed"], row["status"]) == ("mmfede-zero", "0.5", "0", "done")
    assert (float(row["test_mrr"]), float(row["seconds"]), row["test_hits_at_5"]) == (0.2, 2.5, "")
    assert row["run"] == "out_1/tiny/0.5/mmfede-zero/seed0"
    assert row["command"] == f"fedsim run {row['run']}/config.yaml --output {row['run']}-again"
    failed = [row for row in rows if row["status"] == "failed"]
    assert [(row["method"], row["seed"], row["test_mrr"], row["message"]) for row in failed] == [
        ("mmfede-mean", "1", "", "client 1 failed in round 2")
    ]
    listed = as_run_list(tables, plan.output)
    assert "[tiny/0.5/mmfede-zero/seed0](tiny/0.5/mmfede-zero/seed0)" in listed
    assert all(f"`{row['command']}`" in listed for row in rows)


def test_the_terminal_puts_rates_below_each_other_if_it_is_narrow(plan: Plan) -> None:
    glance, details = make_grids(compare(plan, _outcome_of), 2)
    for grid, width, num_tables in ((details, 160, 1), (details, 100, 2), (glance, 100, 1), (glance, 60, 2)):
        with Console(width=width, record=True, file=io.StringIO()) as console:
            show(grid, console)
        text = console.export_text()
        assert "…" not in text
        assert text.count(grid.title) == num_tables
        assert text.count("mmfed3-hide") == num_tables
        assert "0.3015 ± 0.0021" in text
        assert max(map(len, text.splitlines())) <= width


def test_one_seed_has_no_spread_and_no_test(plan: Plan) -> None:
    single = Plan(plan.output, [RECIPE], plan.methods, plan.rates, 1, plan.tuned, {})
    tables = compare(single, _outcome_of)
    text = as_markdown(make_grids(tables, 1), notes(tables, single, []), "runs.md")
    assert "±" not in text
    assert ": p |" not in text
    assert "One seed" in text
    assert "**0.3000**" in text


def test_hardware_names_the_cpus() -> None:
    assert hardware().endswith(" CPUs")


@pytest.mark.parametrize("width", [80, 120, 160])
def test_rates_that_do_not_fit_side_by_side_follow_each_other_and_nothing_is_cut(width: int) -> None:
    titles = ("0 hidden", "0.3 hidden", "0.6 hidden", "0.9 hidden", "0.5 of the clients blind")
    row = (Text("0.2173", True), Text("0.1204"), Text("0.4093"))
    blocks = tuple(Block(title, ("MRR", "Hits@1", "Hits@10"), (row, row)) for title in titles)
    file = io.StringIO()
    console = Console(width=width, file=file, highlight=False)
    show(Grid("cn_visual", ("mmfede-nearest", "central ‡"), blocks, ("147", "14")), console)
    shown = file.getvalue()
    assert "…" not in shown
    assert all(title in shown for title in titles)
    assert shown.count("0.2173") == 2 * len(titles)
