"""Vega-Lite specifications that the pages share: the theme, and the forms of plots.

A specification is a dict as Vega-Lite 6 documents it. Rows have fixed field names, never names from data: a dot or a
bracket in a name would be read as a path.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Spec = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # names the version; nothing fetches it
# Each has a contrast of 3 or more with a white and with a nearly black page.
COLOURS = (
    *("#2f7fc1", "#d97706", "#1a9070", "#c2559b", "#7c6bd6"),
    *("#a8791a", "#2a93b0", "#d1495b", "#6b8e23", "#808080"),
)
ACCENT, ALARM = COLOURS[0], "#d1495b"
INK = "currentColor"  # the page's, so that a plot is light or dark with it
MAX_TICKS = 10
MAX_LEGEND = 12  # of more clients than this a plot shows the spread instead of a line each

_TEXT = {
    "labelColor": INK,
    "titleColor": INK,
    "labelFont": "system-ui, sans-serif",
    "titleFont": "system-ui, sans-serif",
}
THEME: Spec = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        **_TEXT,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": 500,
        "gridColor": INK,
        "gridOpacity": 0.13,
        "domainColor": INK,
        "domainOpacity": 0.5,
        "tickColor": INK,
        "tickOpacity": 0.5,
        "labelOverlap": "greedy",
        "labelLimit": 130,
    },
    "legend": {
        **_TEXT,
        "orient": "bottom",
        "columns": 3,
        "labelFontSize": 12,
        "labelLimit": 150,
        "symbolStrokeWidth": 3,
        "title": None,
    },
    "range": {"category": list(COLOURS), "heatmap": {"scheme": "viridis"}, "ramp": {"scheme": "viridis"}},
    "line": {"strokeWidth": 2},
    "point": {"filled": True, "size": 45},
    "rule": {"color": INK},
    "text": {"color": INK},
}


def spec(rows: Rows, *layers: Spec, height: int = 260, **more: Any) -> Spec:
    """Make a specification as wide as its place on the page; several layers share data and axes."""
    body: Spec = layers[0] if len(layers) == 1 else {"layer": list(layers)}
    return {
        "$schema": SCHEMA,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": list(rows)},
        **body,
        **more,
    }


def number(field: str, title: str | None, **more: Any) -> Spec:
    """Encode numbers: on an axis with few ticks, or as a colour if there is a legend."""
    if "legend" not in more:
        more.setdefault("axis", {"tickCount": 6})
    return {"field": field, "type": "quantitative", "title": title, **more}


def name(field: str, title: str | None, **more: Any) -> Spec:
    """Encode names, in the order of the rows."""
    return {"field": field, "type": "nominal", "title": title, "sort": None, **more}


def rounds(num_rounds: int) -> Spec:
    """Encode the rounds of a run as the x axis."""
    step = -(-num_rounds // MAX_TICKS)
    ticks = [1, *range(step, num_rounds + 1, step)] if step > 1 else list(range(1, num_rounds + 1))
    axis = {"format": "d", "values": ticks, "grid": False}
    return number("round", "round", axis=axis, scale={"domain": [1, num_rounds], "nice": False})


def hover(**titles: str) -> list[Spec]:
    """Show fields when a mark is pointed at; field -> what it is called."""
    return [{"field": field, "title": title.replace("_", " ")} for field, title in titles.items()]


def lines(rows: Rows, x: Spec, y: Spec, color: Spec, tooltip: list[Spec]) -> Spec:
    """Draw a line with points per colour."""
    encoding: Spec = {"x": x, "y": y, "color": color, "tooltip": tooltip}
    return spec(rows, {"mark": {"type": "line", "point": True}, "encoding": encoding})


def with_spread(rows: Rows, spread: Rows, total: Rows, x: Spec, title: str) -> Spec:
    """Draw a measure over rounds: the total as a thick line, and a thin line per client, or the spread of many.

    Args:
        rows: round, client and value of each client; not used if there is a spread.
        spread: round, low, first, third and high (of the clients); empty for few clients.
        total: round and value.
        x: the encoding of the rounds.
        title: of the measure.
    """
    y = number("value", title, scale={"zero": False})
    layers: list[Spec] = []
    if spread:
        tooltip = hover(round="round", low="lowest client", high="highest client")
        for low, high, opacity in (("low", "high", 0.15), ("first", "third", 0.25)):
            encoding = {"x": x, "y": {**y, "field": low}, "y2": {"field": high}, "tooltip": tooltip}
            mark = {"type": "area", "color": ACCENT, "opacity": opacity, "line": False}
            layers.append({"data": {"values": list(spread)}, "mark": mark, "encoding": encoding})
    elif rows:
        encoding = {
            "x": x,
            "y": y,
            "color": name("client", None),
            "tooltip": hover(client="", round="round", value=title),
        }
        layers.append({"mark": {"type": "line", "point": {"size": 22}, "strokeWidth": 1.5}, "encoding": encoding})
    encoding = {"x": x, "y": y, "tooltip": hover(round="round", value=f"{title}, all clients")}
    mark = {"type": "line", "color": INK, "strokeWidth": 3, "point": {"color": INK, "size": 55}}
    layers.append({"data": {"values": list(total)}, "mark": mark, "encoding": encoding})
    return spec(rows, {"layer": layers})


def stacked_bars(rows: Rows, x: Spec, y: Spec, color: Spec, tooltip: list[Spec], *, height: int = 260) -> Spec:
    """Draw bars of parts on top of each other; the parts keep the order of the rows."""
    encoding: Spec = {"x": x, "y": {**y, "stack": "zero"}, "color": color, "tooltip": tooltip}
    encoding["order"] = {"field": "order", "type": "quantitative"}
    return spec(rows, {"mark": {"type": "bar"}, "encoding": encoding}, height=height)


def heat_map(rows: Rows, x: Spec, y: Spec, title: str, tooltip: list[Spec], *, labels: bool) -> Spec:
    """Draw shares from 0 to 1 as colours; `labels` writes them into the cells."""
    legend = {"format": ".0%", "title": title, "values": [0, 0.5, 1]}
    color = number("share", title, scale={"domain": [0, 1], "scheme": "blues"}, legend=legend)
    cells: Spec = {"mark": {"type": "rect"}, "encoding": {"color": color, "tooltip": tooltip}}
    layers = [cells]
    if labels:
        ink = {"condition": {"test": "datum.share > 0.55", "value": "#ffffff"}, "value": "#10202e"}
        layers.append(
            {"mark": {"type": "text", "fontSize": 12}, "encoding": {"text": {"field": "label"}, "color": ink}}
        )
    num_rows = len({row[y["field"]] for row in rows})
    return spec(rows, {"encoding": {"x": x, "y": y}, "layer": layers}, height=44 * num_rows)


def scatter(rows: Rows, x: Spec, y: Spec, tooltip: list[Spec], *, color: Spec | None = None, height: int = 260) -> Spec:
    """Draw a point per row."""
    encoding: Spec = {"x": x, "y": y, "tooltip": tooltip}
    encoding["color"] = color if color is not None else {"value": ACCENT}
    return spec(rows, {"mark": {"type": "point", "size": 70, "opacity": 0.85}, "encoding": encoding}, height=height)
