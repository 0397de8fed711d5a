"""The plots of a benchmark."""

from collections.abc import Sequence
from typing import Any

from fedsim.benchmark.comparison import Column
from fedsim.report.html_page import Figure
from fedsim.report.plots import ACCENT, INK, Spec, hover, name, number, spec


def methods_with_spread(key: str, title: str, column: Column) -> Figure | None:
    """Plot the mean test MRR of each method as a bar, with a standard deviation to both sides; None without runs."""
    rows = []
    for entry in column.entries:
        mean, spread = entry.mean("mrr"), entry.spread("mrr")
        if mean is None:
            continue
        text = (
            f"{mean:.4f}, 1 seed" if spread is None else f"{mean:.4f} ± {spread:.4f}, {len(entry.values('mrr'))} seeds"
        )
        low, high = max(mean - (spread or 0.0), 0.0), mean + (spread or 0.0)
        best = entry.method.name == column.best
        row = {"method": entry.method.name, "mean": mean, "low": low, "high": high}
        rows.append(row | {"text": text, "best": best, "what": entry.method.title})
    if not rows:
        return None
    y = name("method", None, axis={"labelLimit": 190})
    tooltip = hover(method="method", what="what it is", text="test MRR")
    bars: Spec = {
        "mark": {"type": "bar", "height": {"band": 0.7}},
        "encoding": {
            "x": number("mean", "test MRR"),
            "y": y,
            "tooltip": tooltip,
            "color": {"condition": {"test": "datum.best", "value": "#d97706"}, "value": ACCENT},
        },
    }
    errors: Spec = {
        "mark": {"type": "rule", "color": INK, "strokeWidth": 2},
        "encoding": {"x": number("low", "test MRR"), "x2": {"field": "high"}, "y": y, "tooltip": tooltip},
    }
    plot = spec(rows, bars, errors, height=24 * len(rows))
    order = sorted(rows, key=lambda row: -float(str(row["mean"])))
    summary = f"Highest: {', '.join(_named(row) for row in order[:3])}"
    summary += f"; lowest: {_named(order[-1])}." if len(order) > 3 else "."
    note = (
        "Bar: mean over seeds; line: one standard deviation to both sides; orange: the best of those that are ranked."
    )
    return Figure(key, title, plot, summary, note)


def _named(row: dict[str, object]) -> str:
    return f"{row['method']} {row['text']}"


def seconds_of_methods(key: str, title: str, columns: Sequence[Column]) -> Figure | None:
    """Plot the mean seconds of a run against the mean test MRR, a point per method and missing rate."""
    rows: list[dict[str, Any]] = []
    for column in columns:
        for entry in column.entries:
            mean, seconds = entry.mean("mrr"), entry.seconds
            if mean is not None and seconds:
                spent = sum(seconds) / len(seconds)
                row = {"method": entry.method.name, "mean": mean, "seconds": spent, "missing": column.missing.label}
                rows.append(row)
    if not rows:
        return None
    encoding: Spec = {
        "x": number("seconds", "seconds per run", scale={"zero": False}),
        "y": number("mean", "test MRR", scale={"zero": False}),
        "color": name("missing", "missing", legend={"title": "missing rate"}),
        "tooltip": hover(method="method", missing="missing rate", mean="test MRR", seconds="seconds per run"),
    }
    plot = spec(rows, {"mark": {"type": "point", "size": 70}, "encoding": encoding})
    quick, slow = min(rows, key=lambda row: row["seconds"]), max(rows, key=lambda row: row["seconds"])
    summary = (
        f"A run takes from {quick['seconds']:.1f} s ({quick['method']}) to {slow['seconds']:.1f} s ({slow['method']})."
    )
    return Figure(key, title, plot, summary)
