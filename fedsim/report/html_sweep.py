"""The report of a sweep, from its `sweep.json`, finished or not."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.errors import RunError
from fedsim.parsing import parse_json
from fedsim.report.html_benchmark import link
from fedsim.report.html_page import Block, Cell, Page, Section, Table
from fedsim.report.plots_sweep import against_value, is_number, parallel_coordinates, schedule_steps, shown
from fedsim.run_records import SWEEP as SWEEP_RECORD
from fedsim.run_records import check_record

SWEEP = "sweep.json"
VERSION = 1
ENDED = ("finished", "stopped", "failed")

Trial = dict[str, Any]


def sweep_page(folder: Path, target: Path) -> Page:
    """Make the page of a sweep; `target` is the page's file, from which links lead.

    Raises:
        RunError: if the folder is not a sweep, or one of another version.
    """
    sweep = _read(folder / SWEEP)
    trials: list[Trial] = sweep["trials"]
    parameters = list(dict.fromkeys(path for trial in trials for path in trial["params"]))
    rated = [_with_costs(trial) for trial in trials if trial["valid_mrr"] is not None]
    best = str(sweep.get("best") or "")
    sections = [_values(parameters, rated, best), _schedules(parameters, trials, best), _costs(parameters, rated, best)]
    sections.append(_trials(folder, target.absolute().parent, parameters, trials, best))
    counts: dict[str, int] = {}
    for trial in trials:
        counts[trial["status"]] = counts.get(trial["status"], 0) + 1
    open_ones = sum(count for status, count in counts.items() if status not in ENDED)
    notice = ""
    if open_ones:
        notice = (
            f"This sweep is not finished: {open_ones} of {len(trials)} trials are still to end. The report shows what "
            f"there is; continue with: fedsim tune --resume {folder}"
        )
    facts = {
        "Trials": ", ".join(f"{count} {status}" for status, count in counts.items()) or "none",
        "Scheduler": str(sweep.get("scheduler", "unknown")),
        "Search": str(sweep.get("search", "unknown")),
        "Parameters": str(len(parameters)),
        "Best trial": best or "none has finished yet",
    }
    found = next((trial for trial in rated if trial["id"] == best), None)
    if found is not None:
        facts["Best validation MRR"] = f"{found['valid_mrr']:.4f}"
    title = str(sweep.get("title") or folder.absolute().name)
    return Page(f"Sweep {title}", notice, facts, [section for section in sections if section.text or section.blocks])


def _read(path: Path) -> dict[str, Any]:
    try:
        sweep: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        version = sweep["version"]
    except FileNotFoundError as err:
        raise RunError(
            f"{path.parent} is not a sweep (it has no {SWEEP}); give the --output of a `fedsim tune`"
        ) from err
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise RunError(f"{path} cannot be read ({err}); the sweep's folder is damaged") from err
    if version != VERSION:
        raise RunError(f"{path} has version {version!r}; this fedsim reads version {VERSION}")
    check_record(sweep, SWEEP_RECORD, path)
    return sweep


def _with_costs(trial: Trial) -> Trial:
    """Add what a round of a trial cost: trials that were stopped early have fewer rounds than others."""
    rounds = max(trial["rounds"], 1)
    megabytes = (trial["bytes_up"] + trial["bytes_down"]) / 1e6
    return trial | {"seconds_per_round": trial["seconds"] / rounds, "megabytes_per_round": megabytes / rounds}


def _values(parameters: Sequence[str], trials: Sequence[Trial], best: str) -> Section:
    """Plot the validation MRR against each parameter, and all parameters together."""
    if not trials:
        return Section("values", "Validation MRR and parameters", "No trial has been validated yet.")
    blocks: list[Block] = [parallel_coordinates(parameters, trials, best)]
    blocks += [
        against_value(f"mrr-{number}", path, trials, "valid_mrr", "validation MRR", best)
        for number, path in enumerate(parameters)
    ]
    text = "A point is a trial, with the best validation MRR of its rounds; orange is the best trial that finished."
    return Section("values", "Validation MRR and parameters", text, tuple(blocks))


def _schedules(parameters: Sequence[str], trials: Sequence[Trial], best: str) -> Section:
    """Plot the schedules that population-based training found; none if no trial changed anything."""
    changing = [trial for trial in trials if len(trial.get("schedule") or ()) > 1]
    if not changing:
        return Section("schedules", "Schedules", "")
    members = [trial for trial in trials if trial.get("schedule")]
    blocks = [
        schedule_steps(f"schedule-{number}", path, members, best)
        for number, path in enumerate(parameters)
        if _changes(path, members)
    ]
    text = (
        "What each member of the population used from which round on; a member that was replaced took over its model."
    )
    return Section("schedules", "Schedules found by population-based training", text, tuple(blocks))


def _changes(path: str, members: Sequence[Trial]) -> bool:
    """Tell whether a parameter is a number that some member changed."""
    used = [[item["params"].get(path) for item in trial["schedule"]] for trial in members]
    return all(is_number(value) for values in used for value in values) and any(len(set(values)) > 1 for values in used)


def _costs(parameters: Sequence[str], trials: Sequence[Trial], best: str) -> Section:
    """Plot seconds and bytes of a round against each parameter."""
    blocks: list[Block] = []
    for number, path in enumerate(parameters if trials else ()):
        for field, title in (("seconds_per_round", "seconds per round"), ("megabytes_per_round", "MB per round")):
            blocks.append(against_value(f"{field}-{number}", path, trials, field, title, best))
    text = "Per round, since trials that were stopped early have fewer; MB up and down together." if blocks else ""
    return Section("costs", "What the settings cost", text, tuple(blocks))


def _trials(folder: Path, base: Path, parameters: Sequence[str], trials: Sequence[Trial], best: str) -> Section:
    """List the trials, the best first."""
    header = (
        "trial",
        "status",
        "valid MRR",
        *parameters,
        "rounds",
        "seconds",
        "MB up",
        "MB down",
        "run folder",
        "error",
    )
    order = sorted(trials, key=lambda trial: -1.0 if trial["valid_mrr"] is None else trial["valid_mrr"], reverse=True)
    rows = tuple(_row(folder, base, parameters, trial, trial["id"] == best) for trial in order)
    return Section("trials", "Trials", "", (Table("trials", "All trials, the best first", header, rows),))


def _row(
    folder: Path, base: Path, parameters: Sequence[str], trial: Mapping[str, Any], is_best: bool
) -> tuple[Cell, ...]:
    mrr = "–" if trial["valid_mrr"] is None else f"{trial['valid_mrr']:.4f}"
    texts = [trial["id"], trial["status"], mrr, *(shown(trial["params"].get(path)) for path in parameters)]
    texts += [str(trial["rounds"]), f"{trial['seconds']:.1f}"]
    texts += [f"{trial['bytes_up'] / 1e6:.1f}", f"{trial['bytes_down'] / 1e6:.1f}"]
    cells = [Cell(text, bold=is_best) for text in texts]
    place = link(folder / trial["folder"], base) if trial.get("folder") else Cell("–")
    return (*cells, place, Cell(trial.get("error") or ""))
