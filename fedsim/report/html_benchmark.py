"""The report of a benchmark, from its manifest and the results in its run folders, finished or not."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from fedsim.benchmark.comparison import METRICS, Column, Entry, make_column
from fedsim.benchmark.execution import Outcome
from fedsim.benchmark.folder import MANIFEST
from fedsim.benchmark.methods import METHODS, Method
from fedsim.benchmark.plan import ANY, Missing, changes_task, parse_missing
from fedsim.benchmark.recipes import Recipe, TuningBudget
from fedsim.benchmark.tables import LEVEL_NOTE, Text, glance, hidden_title
from fedsim.errors import RunError
from fedsim.parsing import parse_json
from fedsim.report.html_page import Block, Cell, Page, Section, Table
from fedsim.report.plots_benchmark import methods_with_spread, seconds_of_methods
from fedsim.run_records import BENCHMARK, RESULT, check_record

NOT_RUN = "not run yet"


def benchmark_page(folder: Path, target: Path) -> Page:
    """Make the page of a benchmark or of a tuning; `target` is the page's file, from which links lead.

    Raises:
        RunError: if the folder is not a benchmark.
    """
    manifest = _read_manifest(folder / MANIFEST)
    base = target.absolute().parent
    if manifest["kind"] == "tuning":
        sections, done, expected = [_trials(manifest, folder, base)], len(_finished(folder)), _num_trials(manifest)
    else:
        columns = _columns(manifest, folder)
        entries = [entry for found in columns.values() for column in found for entry in column.entries]
        outcomes = {outcome.folder: outcome for entry in entries for outcome in entry.outcomes}
        done, expected = sum(outcome.result is not None for outcome in outcomes.values()), len(outcomes)
        sections = [_recipe(name, found) for name, found in columns.items()]
        sections.append(_runs(columns, base))
    notice = ""
    if done < expected:
        notice = (
            f"This {manifest['kind']} is not finished: {done} of {expected} runs are there. The report shows what "
            f"there is; the command that started it goes on with it."
        )
    facts = {
        "Data": ", ".join(manifest["recipes"]),
        "Methods": str(len(manifest["methods"])),
        "Runs": f"{done} of {expected}",
        "Seeds": str(len(manifest["seeds"]) or max(map(_num_tuning_seeds, manifest["recipes"].values()), default=1)),
        "Changed for all": _told(manifest["changes"]) or "nothing",
        "fedsim": str(manifest["fedsim"]),
    }
    return Page(f"{manifest['kind'].capitalize()} {folder.absolute().name}", notice, facts, sections)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        for name in ("kind", "recipes", "methods", "rates", "seeds", "changes", "fedsim", "tuned"):
            manifest[name]
    except FileNotFoundError as err:
        raise RunError(f"{path.parent} is not a benchmark (it has no {MANIFEST}); give the --output of one") from err
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise RunError(f"{path} cannot be read ({err}); the benchmark's folder is damaged") from err
    check_record(manifest, BENCHMARK, path)
    return manifest


def _columns(manifest: Mapping[str, Any], folder: Path) -> dict[str, list[Column]]:
    """Put what is there into columns, recipe -> one per missing rate."""
    found: dict[str, list[Column]] = {}
    for recipe_name, content in manifest["recipes"].items():
        budget = TuningBudget()
        recipe = Recipe(recipe_name, recipe_name, recipe_name, "", content["settings"], (), budget)
        labels = [
            label for name, _, label in (text.rpartition(" ") for text in manifest["rates"]) if name == recipe_name
        ]
        for label in labels:
            missing = replace(parse_missing(label.replace("client-", "client:")), label=label)
            entries = [
                _entry(manifest, folder, recipe, missing, name, settings)
                for name, settings in manifest["methods"].items()
            ]
            found.setdefault(recipe_name, []).append(make_column(missing, entries))
    return found


def _entry(
    manifest: Mapping[str, Any],
    folder: Path,
    recipe: Recipe,
    missing: Missing,
    name: str,
    settings: Mapping[str, Any],
) -> Entry:
    """Read the outcomes of one method at one missing rate; a method that is not registered here is taken as it is."""
    method = METHODS.get(name) or Method(name, (), settings, name, "")
    place = folder.absolute() / recipe.name / (ANY if method.fixed_rate else missing.label) / name
    outcomes = tuple(_outcome(place / f"seed{seed}") for seed in manifest["seeds"])
    chosen = manifest["tuned"].get(f"{recipe.name} {name}")
    tuned = chosen is not None and not changes_task(manifest["changes"])
    return Entry(recipe, missing, method, outcomes, tuned)


def _outcome(folder: Path) -> Outcome:
    path = folder / "result.json"
    if path.is_file():
        try:
            result = parse_json(path.read_text(encoding="utf-8"))
            check_record(result, RESULT, path)
            return Outcome(folder, result)
        except RunError as err:
            return Outcome(folder, error=str(err))
        except (OSError, ValueError) as err:
            return Outcome(folder, error=f"result.json cannot be read ({err})")
    failure = folder.with_name(f"{folder.name}.failed.txt")
    if failure.is_file():
        lines = failure.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return Outcome(folder, error=lines[-1] if lines else "failed")
    return Outcome(folder, error=NOT_RUN if not folder.is_dir() else "started, not finished")


def _recipe(name: str, columns: Sequence[Column]) -> Section:
    """Show the table and the bars of each missing rate of one recipe."""
    blocks: list[Block] = [_at_a_glance(name, columns)] if len(columns) > 1 else []
    for number, column in enumerate(columns):
        hidden = hidden_title(column.missing)
        rows = tuple(_row(column, entry) for entry in column.entries)
        header = ("method", *METRICS.values(), "p", "s/run", "seeds")
        blocks.append(Table(f"{name}-{number}", f"Test, {hidden}", header, rows, _note(column)))
        figure = methods_with_spread(f"{name}-{number}", f"Test MRR, {hidden}", column)
        if figure is not None:
            blocks.append(figure)
    figure = seconds_of_methods(f"{name}-seconds", "What the methods cost", columns)
    if figure is not None:
        blocks.append(figure)
    text = (
        "Filtered test metrics, mean ± standard deviation over the seeds, best mean bold. p: two-sided paired t-test "
        "of MRR over the seeds against the best method; at the best one against the second; not corrected for the "
        "number of methods."
    )
    return Section(f"recipe-{name}", f"Data {name}", text, tuple(blocks))


def _at_a_glance(name: str, columns: Sequence[Column]) -> Table:
    rows = []
    for entries in zip(*(column.entries for column in columns), strict=True):
        found = [
            Text("–") if entry.mean("mrr") is None else glance(column, entry)
            for column, entry in zip(columns, entries, strict=True)
        ]
        rows.append((_name(entries[0]), *(Cell(text.text, bold=text.bold) for text in found)))
    header = ("method", *(hidden_title(column.missing) for column in columns))
    has_tests = any(p is not None for column in columns for p in column.p_values.values())
    note = f"{LEVEL_NOTE if has_tests else ''} {_note(columns[0])}".strip()
    return Table(f"{name}-glance", "Test MRR at a glance", header, tuple(rows), note)


def _name(entry: Entry) -> Cell:
    return Cell(entry.method.name + ("" if entry.tuned else " †") + ("" if entry.method.ranked else " ‡"))


def _row(column: Column, entry: Entry) -> tuple[Cell, ...]:
    cells = [_name(entry)]
    for metric in METRICS:
        mean, spread = entry.mean(metric), entry.spread(metric)
        text = "–" if mean is None else f"{mean:.4f}" if spread is None else f"{mean:.4f} ± {spread:.4f}"
        cells.append(Cell(text, bold=mean is not None and column.is_best(entry, metric)))
    p = column.p_values.get(entry.method.name)
    cells.append(Cell("–" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"))
    cells.append(Cell(f"{fmean(entry.seconds):.1f}" if entry.seconds else "–"))
    done = len(entry.values("mrr"))
    cells.append(Cell(str(done) if entry.complete else f"{done} of {len(entry.outcomes)}"))
    return tuple(cells)


def _note(column: Column) -> str:
    notes = []
    if any(not entry.tuned for entry in column.entries):
        notes.append("† not tuned on this data.")
    if any(not entry.method.ranked for entry in column.entries):
        notes.append("‡ sees what is hidden from the others; neither ranked nor bold.")
    return " ".join(notes)


def _runs(columns: Mapping[str, Sequence[Column]], base: Path) -> Section:
    """List every run with a link to its folder."""
    rows: dict[Path, tuple[Cell, ...]] = {}
    for found in columns.values():
        for column in found:
            for entry in column.entries:
                for seed, outcome in enumerate(entry.outcomes):
                    result = outcome.result
                    names = [entry.recipe.name, column.missing.label, str(seed)]
                    mrr = "–" if result is None else f"{result['test']['mrr']:.4f}"
                    status = outcome.error if result is None else "done"
                    cells = [
                        Cell(entry.method.name),
                        *map(Cell, names),
                        Cell(mrr),
                        Cell(status),
                        link(outcome.folder, base),
                    ]
                    rows.setdefault(outcome.folder, tuple(cells))
    header = ("method", "data", "missing", "seed", "test MRR", "status", "run folder")
    return Section("runs", "Runs", "", (Table("runs", "Every run", header, tuple(rows.values())),))


def link(folder: Path, base: Path) -> Cell:
    """Link to a run folder, to its report if it has one, relative to the folder of the page."""
    if not folder.is_dir():
        return Cell("–")
    path = os.path.relpath(folder.absolute(), base)
    page = "/report.html" if (folder / "report.html").is_file() else ""
    return Cell(path, href=quote(Path(path).as_posix() + page))


def _finished(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/*/trial*/result.json"))


def _num_trials(manifest: Mapping[str, Any]) -> int:
    num_own = sum(map(len, manifest.get("own_trials", {}).values()))
    found = 0
    for content in manifest["recipes"].values():
        budget = content.get("tuning", {})
        shared = len(budget.get("trials", ())) * len(manifest["methods"])
        found += (shared + (num_own if budget.get("own_trials", True) else 0)) * _num_tuning_seeds(content)
    return found


def _num_tuning_seeds(recipe: Mapping[str, Any]) -> int:
    return len(recipe.get("tuning", {}).get("seeds", ())) or 1


def _trials(manifest: Mapping[str, Any], folder: Path, base: Path) -> Section:
    """List the trials of a tuning."""
    rows = []
    for path in _finished(folder):
        run = path.parent
        recipe, missing, method, trial = run.relative_to(folder).parts
        outcome = _outcome(run)
        shared = manifest["recipes"].get(recipe, {}).get("tuning", {}).get("trials", [])
        settings = [_told(trial) for trial in shared]
        settings += [f"the best of these, {_told(trial)}" for trial in manifest.get("own_trials", {}).get(method, [])]
        number, _, seed = trial.removeprefix("trial").partition("-seed")
        chosen = settings[int(number)] if number.isdecimal() and int(number) < len(settings) else ""
        mrr = "–" if outcome.result is None else f"{outcome.result['valid_mrr']:.4f}"
        texts = [method, recipe, missing, chosen, seed, mrr]
        rows.append((*map(Cell, texts), link(run, base)))
    header = ("method", "data", "missing", "settings", "seed", "valid MRR", "run folder")
    return Section("trials", "Trials", "", (Table("trials", "Finished trials", header, tuple(rows)),))


def _told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{path} = {value}" for path, value in settings.items())
