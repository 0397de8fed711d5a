"""`benchmarks/instruments.py`: the rows are the method's own imputer, then the references."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def instruments(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import instruments

    yield instruments
    sys.modules.pop("instruments")


def _run(folder: Path, imputation: dict[str, float], consistency: dict[str, float]) -> None:
    folder.mkdir(parents=True)
    scores = {name: {"cosine": value, "hits_at_10": value / 2} for name, value in imputation.items()}
    (folder / "result.json").write_text(json.dumps({"imputation": scores, "consistency": consistency}))


def test_rows_of_own_imputers_and_references(instruments, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    references = {"text/mean": 0.1, "text/ridge": 0.2, "text/mlp": 0.3}
    fitted = {"text/ridge": 0.6, "text/mean": 0.1, "text/ridge_fitted": 0.2, "text/mlp": 0.3}
    for seed, more in enumerate((0.0, 0.2)):
        _run(
            tmp_path / "hide" / f"seed{seed}",
            {"text/diffusion": 0.5 + more, **references},
            {"global/total": 0.5 + more},
        )
        _run(tmp_path / "ridge" / f"seed{seed}", fitted, {"global/total": 0.3, "global/text": 0.4})
    _run(tmp_path / "mean" / "seed0", references, {"local/total": 0.1})
    _run(tmp_path / "zero" / "seed0", {"text/zero": 0.0, **references}, {})
    (tmp_path / "broken" / "seed0").mkdir(parents=True)
    found = instruments.read_results(tmp_path, ["hide", "ridge", "mean", "zero", "broken"])
    assert list(found) == ["hide", "ridge", "mean", "zero"]
    others = ["0.100 / 0.050", "0.200 / 0.100", "0.300 / 0.150"]
    assert instruments.imputation_rows(found) == [
        ["hide", "text", "diffusion", "0.600 / 0.300", *others],
        ["ridge", "text", "ridge", "0.600 / 0.300", *others],
        ["mean", "text", "mean", "0.100 / 0.050", *others],
    ]
    header, *rows = instruments.consistency_rows(found)
    assert header == ["method", "of", "total", "text"]
    assert rows == [
        ["hide", "global copies", "0.600", ""],
        ["ridge", "global copies", "0.300", "0.400"],
        ["mean", "private models", "0.100", ""],
    ]
    shown = CliRunner().invoke(instruments.main, [str(tmp_path), "--output", str(tmp_path / "out.md")])
    assert shown.exit_code == 0, shown.output
    assert "Not finished: broken." in (tmp_path / "out.md").read_text()


def test_a_folder_without_finished_runs_is_refused(instruments, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "hide" / "seed0").mkdir(parents=True)
    shown = CliRunner().invoke(instruments.main, [str(tmp_path)])
    assert shown.exit_code == 1
    assert "no finished runs of hide" in shown.output
