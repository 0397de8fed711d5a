"""The plots of a sweep. Parameters are rows of the data, never field names: a dotted path would be read as a path."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedsim.report.html_page import Figure
from fedsim.report.plots import INK, Spec, hover, name, number, spec

Trial = Mapping[str, Any]

_ONLY_BEST: Spec = {"transform": [{"filter": "datum.best"}]}
LOG_RANGE = 30  # largest over smallest value from which an axis is logarithmic
MAX_TEXT = 40


def is_number(value: Any) -> bool:
    """Tell whether a parameter's value is a number, and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """Write a parameter's value."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"


def _axis(values: Sequence[Any], title: str) -> tuple[Spec, bool]:
    """Encode a parameter's values as the x axis: numbers, logarithmic if they span much, or names."""
    if all(is_number(value) for value in values):
        if min(values) > 0 and max(values) / min(values) >= LOG_RANGE:
            return number("value", title, scale={"type": "log", "padding": 12}), True
        return number("value", title, scale={"zero": False, "padding": 12}), True
    return name("value", title, axis={"labelAngle": 0}), False


def against_value(key: str, parameter: str, trials: Sequence[Trial], field: str, title: str, best: str) -> Figure:
    """Plot a measure of each trial against its value of a parameter.

    Args:
        key: of the figure.
        parameter: dotted path.
        trials: those that have the measure.
        field: of the trials, for example ``valid_mrr``.
        title: of the measure.
        best: id of the best trial.
    """
    values = [trial["params"].get(parameter) for trial in trials]
    x, numeric = _axis(values, parameter)
    rows = [
        {
            "value": value if numeric else shown(value),
            "measure": trial[field],
            "trial": trial["id"],
            "text": shown(value),
            "best": trial["id"] == best,
        }
        for trial, value in zip(trials, values, strict=True)
    ]
    encoding: Spec = {
        "x": x,
        "y": number("measure", title, scale={"zero": False, "padding": 8}),
        "tooltip": hover(trial="trial", text=parameter.rpartition(".")[2], measure=title),
        "color": {"condition": {"test": "datum.best", "value": "#d97706"}, "value": "#2f7fc1"},
        "size": {"condition": {"test": "datum.best", "value": 160}, "value": 60},
    }
    plot = spec(rows, {"mark": {"type": "point", "opacity": 0.85}, "encoding": encoding}, height=220)
    means: dict[str, list[float]] = {}
    for row in rows:
        means.setdefault(row["text"], []).append(row["measure"])
    average = {text: sum(found) / len(found) for text, found in means.items()}
    high, low = max(average, key=lambda text: average[text]), min(average, key=lambda text: average[text])
    summary = f"{title[0].upper()}{title[1:]} over {len(rows)} trials: highest mean {average[high]:.4g} at {high}"
    summary += f", lowest {average[low]:.4g} at {low}." if low != high else "."
    return Figure(key, f"{title[0].upper()}{title[1:]} against {parameter}", plot, summary)


def parallel_coordinates(parameters: Sequence[str], trials: Sequence[Trial], best: str) -> Figure:
    """Plot each trial as a line over all parameters and the validation MRR, each axis from its lowest to highest."""
    columns: dict[str, list[Any]] = {path: [trial["params"].get(path) for trial in trials] for path in parameters}
    columns["validation MRR"] = [trial["valid_mrr"] for trial in trials]
    rows: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    for title, values in columns.items():
        places, low, high = _places(values)
        ends += [{"axis": title, "place": 0, "text": low}, {"axis": title, "place": 1, "text": high}]
        for trial, value, place in zip(trials, values, places, strict=True):
            row = {"axis": title, "place": place, "text": shown(value), "trial": trial["id"], "mrr": trial["valid_mrr"]}
            rows.append(row | {"best": trial["id"] == best})
    x = name(
        "axis", None, axis={"labelAngle": -20, "grid": True, "gridOpacity": 0.5, "labelLimit": 220, "orient": "bottom"}
    )
    y = number("place", None, axis=None, scale={"domain": [0, 1], "padding": 14})
    color = number("mrr", "validation MRR", legend={"title": "validation MRR"}, scale={"scheme": "viridis"})
    tooltip = hover(trial="trial", axis="parameter", text="value", mrr="validation MRR")
    encoding: Spec = {"x": x, "y": y, "detail": {"field": "trial"}, "color": color, "tooltip": tooltip}
    lines: Spec = {"mark": {"type": "line", "opacity": 0.8, "strokeWidth": 1.5, "point": {"size": 25}}}
    lines["encoding"] = encoding
    thick: Spec = {"mark": {"type": "line", "strokeWidth": 5}, "encoding": encoding, **_ONLY_BEST}
    texts: Spec = {
        "data": {"values": ends},
        "mark": {"type": "text", "color": INK, "fontSize": 11, "dx": 6, "align": "left"},
        "encoding": {"x": x, "y": y, "text": {"field": "text"}},
    }
    top = max(trials, key=lambda trial: trial["valid_mrr"])
    settings = ", ".join(f"{path} = {shown(top['params'].get(path))}" for path in parameters)
    summary = (
        f"{len(trials)} trials; the highest validation MRR, {top['valid_mrr']:.4f}, is that of {top['id']}: {settings}."
    )
    note = "Each axis goes from its lowest to its highest value; names are in their order. The best trial is thick."
    return Figure(
        "parallel", "Parallel coordinates", spec(rows, lines, thick, texts, height=320), summary, note, wide=True
    )


def _places(values: Sequence[Any]) -> tuple[list[float], str, str]:
    """Return each value's place on an axis from 0 to 1, and what stands at its ends."""
    if all(is_number(value) for value in values):
        low, high = min(values), max(values)
        scale = math.log if low > 0 and high / low >= LOG_RANGE else float
        width = scale(high) - scale(low)
        return [(scale(value) - scale(low)) / width if width else 0.5 for value in values], shown(low), shown(high)
    names = sorted({shown(value) for value in values})
    last = max(len(names) - 1, 1)
    return [names.index(shown(value)) / last if len(names) > 1 else 0.5 for value in values], names[0], names[-1]


def schedule_steps(key: str, parameter: str, trials: Sequence[Trial], best: str) -> Figure:
    """Plot how a population's value of a parameter changed over the rounds."""
    rows = []
    for trial in trials:
        changes = [(item["round"], item["params"].get(parameter)) for item in trial["schedule"]]
        if trial["rounds"] > changes[-1][0]:
            changes.append((trial["rounds"], changes[-1][1]))
        rows += [
            {"round": round_num, "value": value, "trial": trial["id"], "best": trial["id"] == best}
            for round_num, value in changes
        ]
    encoding: Spec = {
        "x": number("round", "round", axis={"format": "d", "tickMinStep": 1, "grid": False}, scale={"nice": False}),
        "y": number("value", parameter, scale={"zero": False, "padding": 8}),
        "color": name("trial", None),
        "tooltip": hover(trial="trial", round="from round", value="value"),
    }
    steps: Spec = {"mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 1.5, "point": {"size": 30}}}
    thick: Spec = {"mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 4}, **_ONLY_BEST}
    plot = spec(rows, steps, thick, encoding=encoding)
    found = next((trial for trial in trials if trial["id"] == best), trials[0])
    course = ", ".join(
        f"{shown(item['params'].get(parameter))} from round {item['round']}" for item in found["schedule"]
    )
    which = "the best trial" if found["id"] == best else found["id"]
    return Figure(key, f"Schedule of {parameter}", plot, f"{parameter} of {which}, {found['id']}: {course}.")
