"""The report of a run: what its folder holds, and what its saved models show."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import TypeAdapter

from fedsim.config import Config
from fedsim.errors import RunError
from fedsim.parsing import parse_json
from fedsim.report.console import format_bytes
from fedsim.report.html_model_sections import model_sections
from fedsim.report.html_page import Block, Cell, Page, Section, Table, text_cells
from fedsim.report.html_timeline import timeline_figure
from fedsim.report.plots_run import bytes_by_round, loss_terms, measure_by_round, seconds_by_phase
from fedsim.run_folder import RunFolder
from fedsim.run_records import FULL_RESULT, VERSIONS, WHOLE_ROW, check_record

Row = Mapping[str, Any]


def run_page(path: Path) -> Page:
    """Make the page of a run.

    Raises:
        RunError: if the folder is not a run.
    """
    folder, config = RunFolder.open(path)
    rows = folder.read_metrics() if folder.metrics_file.is_file() else []
    for row in rows:
        check_record(row, WHOLE_ROW, folder.metrics_file)
    result = _read_json(folder.result_file, FULL_RESULT)
    versions = _read_json(folder.path / "versions.json", VERSIONS) or {}
    done = max((row["round"] for row in rows if row["client"] is None), default=0)
    notice = "" if result is not None else _unfinished(path, config, done)
    sections = [_results(result), _course(rows), _costs(rows, result), *model_sections(folder, config, result)]
    sections.append(_actors(folder))
    facts = _facts(config, versions, rows, done, result)
    return Page(f"Run {folder.path.name}", notice, facts, [section for section in sections if _says(section)])


def _says(section: Section) -> bool:
    return bool(section.text or section.blocks)


def _unfinished(path: Path, config: Config, done: int) -> str:
    return (
        f"This run is not finished: {done} of {config.federation.num_rounds} rounds. The report shows what there is; "
        f"continue with: fedsim resume {path}"
    )


def _facts(
    config: Config, versions: Mapping[str, Any], rows: Sequence[Row], done: int, result: Mapping[str, Any] | None
) -> dict[str, str]:
    """Say what was run and how it ended, in a few words."""
    validated = {row["round"]: row["valid"]["mrr"] for row in rows if row["client"] is None and "valid" in row}
    clients = {row["client"] for row in rows if row["client"] is not None}
    facts = {
        "Method": f"{config.federation.strategy}, imputer {config.model.imputer}",
        "Model": f"fusion {config.model.fusion}, scorer {config.model.scorer}, dim {config.model.dim}",
        "Data": f"{Path(config.data.path).name}, split by {config.data.split}",
        "Hidden": f"{_missing(config)}, {config.data.missing_pattern}",
        "Clients": str(len(clients)) if clients else f"{config.data.num_clients} (none has trained yet)",
        "Rounds": f"{done} of {config.federation.num_rounds}",
        "Seed": str(config.seed),
    }
    if result is not None:
        facts["Test MRR"] = f"{result['test']['mrr']:.4f}"
        facts["Validation MRR"] = f"{result['valid_mrr']:.4f} in round {result['best_round']}"
    elif validated:
        best = max(validated, key=lambda round_num: validated[round_num])
        facts["Best validation MRR so far"] = f"{validated[best]:.4f} in round {best}"
    packages = versions.get("packages", {})
    facts["Software"] = ", ".join(f"{name} {packages[name]}" for name in ("fedsim", "torch", "ray") if name in packages)
    commit = versions.get("git_commit")
    facts["Commit"] = f"{commit[:12]}{' with changes' if commit.endswith('-dirty') else ''}" if commit else "unknown"
    return facts


def _missing(config: Config) -> str:
    rate = config.data.missing_rate
    if isinstance(rate, dict):
        return ", ".join(f"{name} {share:.0%}" for name, share in rate.items()) or "nothing"
    return f"{rate:.0%} of the features"


def _results(result: Mapping[str, Any] | None) -> Section:
    """Show the test metrics per client, imputation and consistency."""
    if result is None:
        return Section("results", "Results", "The test triples are ranked when the last round is done.")
    hits = sorted((name for name in result["test"] if name.startswith("hits_at_")), key=lambda name: int(name[8:]))
    header = ("client", "queries", "MRR", *(f"Hits@{name[8:]}" for name in hits), "valid MRR")
    named = [(str(item["client"]), item["test"], item["valid_mrr"]) for item in result["clients"]]
    rows = [_metric_row("weighted", result["test"], hits, result["valid_mrr"], bold=True)]
    rows += [_metric_row(name, test, hits, valid) for name, test, valid in named]
    blocks: list[Block] = [Table("test", "Test, filtered, realistic ranks", header, tuple(rows))]
    if result["imputation"]:
        names = list(dict.fromkeys(name for values in result["imputation"].values() for name in values))
        cells = [
            text_cells([row, *(_number(values.get(name)) for name in names)])
            for row, values in result["imputation"].items()
        ]
        note = "Cosine with the true token, and how often the true entity is among the ten nearest; mean over clients."
        title = "Imputation of the features kept aside"
        blocks.append(Table("imputation", title, ("modality/imputer", *names), tuple(cells), note))
    if result["consistency"]:
        cells = [text_cells([name, _number(value)]) for name, value in result["consistency"].items()]
        note = "Mean cosine between clients of the tokens of the entities that they share."
        blocks.append(Table("consistency", "Semantic consistency", ("view/token", "cosine"), tuple(cells), note))
    text = (
        f"Models of round {result['best_round']}, chosen on validation; 95 % of the best validation MRR was reached "
        f"after {result['num_rounds_to_95']} round(s)."
    )
    return Section("results", "Results", text, tuple(blocks))


def _metric_row(
    name: str, metrics: Mapping[str, Any], hits: Sequence[str], valid: float | None, *, bold: bool = False
) -> tuple[Cell, ...]:
    texts = [
        name,
        f"{metrics.get('num_queries', 0):,}",
        _number(metrics["mrr"]),
        *(_number(metrics.get(hit)) for hit in hits),
    ]
    return text_cells([*texts, _number(valid)], bold=bold)


def _course(rows: Sequence[Row]) -> Section:
    """Plot MRR, loss and its terms over the rounds."""
    clients = [row for row in rows if row["client"] is not None]
    totals = [row for row in rows if row["client"] is None]
    blocks: list[Block] = []
    mrr = {row["round"]: row["valid"]["mrr"] for row in totals if "valid" in row}
    if mrr:
        by_client = _by_client(clients, lambda row: row["valid"]["mrr"] if "valid" in row else None)
        blocks.append(measure_by_round("mrr", "validation MRR", by_client, mrr, best_is_high=True))
    by_client = _by_client(clients, lambda row: row["losses"]["total"] if "losses" in row else None)
    by_round: dict[int, list[float]] = {}
    terms: dict[int, dict[str, list[float]]] = {}
    for row in clients:
        for term, value in row.get("losses", {}).items():
            if term == "total":
                by_round.setdefault(row["round"], []).append(value)
            else:
                terms.setdefault(row["round"], {}).setdefault(term, []).append(value)
    if by_round:
        loss = {round_num: fmean(values) for round_num, values in by_round.items()}
        blocks.append(measure_by_round("loss", "training loss", by_client, loss, best_is_high=False))
    if terms:
        means = {
            round_num: {term: fmean(values) for term, values in found.items()} for round_num, found in terms.items()
        }
        blocks.append(loss_terms(means))
    text = "" if blocks else "No round is finished yet."
    return Section("course", "Validation and loss", text, tuple(blocks))


def _by_client(rows: Sequence[Row], value_of: Callable[[Row], float | None]) -> dict[int, dict[int, float]]:
    found: dict[int, dict[int, float]] = {}
    for row in rows:
        value = value_of(row)
        if value is not None and math.isfinite(value):
            found.setdefault(row["client"], {})[row["round"]] = value
    return found


def _costs(rows: Sequence[Row], result: Mapping[str, Any] | None) -> Section:
    """Plot seconds and bytes."""
    totals = [row for row in rows if row["client"] is None]
    blocks: list[Block] = []
    seconds = {row["round"]: row["phase_seconds"] for row in totals if row.get("phase_seconds")}
    if seconds:
        blocks.append(seconds_by_phase(seconds))
    sent = {row["round"]: (row["bytes_up"], row["bytes_down"]) for row in totals}
    if any(up or down for up, down in sent.values()):
        blocks.append(bytes_by_round(sent))
    text = ""
    if result is not None:
        spent = ", ".join(f"{phase.replace('_', ' ')} {value:.1f} s" for phase, value in result["seconds"].items())
        text = (
            f"The whole run: {spent}; {format_bytes(result['bytes_up'])} up, {format_bytes(result['bytes_down'])} down."
        )
        clock = result.get("participation")
        if clock:
            text += (
                f" Virtual clock: {clock['virtual_seconds']:,.1f} s; {clock['num_late']} late, {clock['num_dropped']} "
                f"dropped, {clock['num_skipped']} round(s) skipped."
            )
    return Section("costs", "Time and bytes", text, tuple(blocks))


def _actors(folder: RunFolder) -> Section:
    """Plot who worked when."""
    figure = timeline_figure(folder.read_timeline())
    text = "" if figure is not None else "This run recorded no timeline (timeline.jsonl)."
    return Section("actors", "Actors and restarts", text, (figure,) if figure is not None else ())


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _read_json(path: Path, kind: TypeAdapter[Any]) -> dict[str, Any] | None:
    """Read a JSON file of the run; None if it is not there.

    Raises:
        RunError: if it is damaged.
    """
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise RunError(f"{path} cannot be read ({err}); the run's folder is damaged") from err
    check_record(found, kind, path)
    return found
