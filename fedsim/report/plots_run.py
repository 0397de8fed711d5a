"""The plots of a run, and what each says in words."""

from collections.abc import Mapping, Sequence
from statistics import quantiles
from typing import Any

from fedsim.report.html_page import Figure
from fedsim.report.plots import (
    ALARM,
    INK,
    MAX_LEGEND,
    Rows,
    Spec,
    heat_map,
    hover,
    lines,
    name,
    number,
    rounds,
    spec,
    stacked_bars,
    with_spread,
)

PHASES = ("train", "aggregate", "distil", "evaluate")


def measure_by_round(
    key: str,
    title: str,
    by_client: Mapping[int, Mapping[int, float]],
    total: Mapping[int, float],
    *,
    best_is_high: bool,
) -> Figure:
    """Plot a measure over the rounds, of all clients together and of each.

    Args:
        key: of the figure.
        title: of the measure.
        by_client: client -> round -> value.
        total: round -> value.
        best_is_high: whether high values are good.
    """
    many = len(by_client) > MAX_LEGEND
    spread = []
    if many:
        for round_num in total:
            values = sorted(values[round_num] for values in by_client.values() if round_num in values)
            if len(values) > 1:
                first, _, third = quantiles(values, n=4, method="inclusive")
                spread.append(
                    {"round": round_num, "low": values[0], "first": first, "third": third, "high": values[-1]}
                )
    rows = [
        {"round": round_num, "client": f"client {client}", "value": value}
        for client, values in ({} if many else by_client).items()
        for round_num, value in values.items()
    ]
    totals = [{"round": round_num, "value": value} for round_num, value in total.items()]
    plot = with_spread(rows, spread, totals, rounds(max(total)), title)
    note = f"Thick: all {len(by_client)} clients together. "
    note += "Bands: all clients, and the middle half of them." if many else "Thin: each client."
    heading = f"{title[0].upper()}{title[1:]}"
    return Figure(key, f"{heading} per round", plot, _course(heading, by_client, total, best_is_high), note)


def _course(
    title: str, by_client: Mapping[int, Mapping[int, float]], total: Mapping[int, float], best_is_high: bool
) -> str:
    """Say how a measure went."""
    first, last = min(total), max(total)
    best = (max if best_is_high else min)(total, key=lambda round_num: total[round_num])
    text = f"{title}: {total[first]:.4f} in round {first}"
    if last != first:
        word = "highest" if best_is_high else "lowest"
        text += f", {total[last]:.4f} in round {last}, {word} {total[best]:.4f} in round {best}"
    ends = {client: values[max(values)] for client, values in by_client.items() if values}
    if len(ends) > 1:
        low, high = min(ends, key=lambda c: ends[c]), max(ends, key=lambda c: ends[c])
        text += f"; clients end between {ends[low]:.4f} (client {low}) and {ends[high]:.4f} (client {high})"
    return text + "."


def loss_terms(terms: Mapping[int, Mapping[str, float]]) -> Figure:
    """Plot the terms of the loss over the rounds; round -> term -> mean over the clients."""
    rows = [
        {"round": round_num, "term": term, "value": value}
        for round_num, values in terms.items()
        for term, value in values.items()
    ]
    last = terms[max(terms)]
    sizes = ", ".join(f"{term} {value:.3g}" for term, value in sorted(last.items(), key=lambda item: -item[1]))
    y = number("value", "loss (logarithmic)", scale={"type": "symlog", "constant": 0.01})
    plot = lines(rows, rounds(max(terms)), y, name("term", None), hover(term="term", round="round", value="loss"))
    return Figure("loss-terms", "Terms of the loss per round", plot, f"In round {max(terms)}: {sizes}.")


def seconds_by_phase(seconds: Mapping[int, Mapping[str, float]]) -> Figure:
    """Plot the wall time of each round by phase; round -> phase -> seconds."""
    order = {
        phase: place for place, phase in enumerate(dict.fromkeys([*PHASES, *(p for s in seconds.values() for p in s)]))
    }
    rows = [
        {"round": round_num, "phase": phase, "seconds": value, "order": order[phase]}
        for round_num, values in seconds.items()
        for phase, value in values.items()
    ]
    totals: dict[str, float] = {}
    for values in seconds.values():
        for phase, value in values.items():
            totals[phase] = totals.get(phase, 0.0) + value
    together = sum(totals.values())
    shares = ", ".join(
        f"{phase} {value:.1f} s ({value / together:.0%})" if together else f"{phase} 0 s"
        for phase, value in sorted(totals.items(), key=lambda item: -item[1])
    )
    x = {"field": "round", "type": "ordinal", "title": "round", "axis": {"labelAngle": 0}}
    color = name("phase", None, scale={"domain": [phase for phase in order if phase in totals]})
    plot = stacked_bars(
        rows, x, number("seconds", "seconds"), color, hover(phase="phase", round="round", seconds="seconds")
    )
    return Figure(
        "seconds", "Seconds per phase and round", plot, f"{together:.1f} s in {len(seconds)} rounds: {shares}."
    )


def bytes_by_round(sent: Mapping[int, tuple[int, int]]) -> Figure:
    """Plot what all clients sent and were sent; round -> bytes up, bytes down."""
    rows = [
        {"round": round_num, "direction": direction, "megabytes": value / 1e6}
        for round_num, both in sent.items()
        for direction, value in zip(("up, to the server", "down, to the clients"), both, strict=True)
    ]
    up, down = (sum(both[side] for both in sent.values()) / 1e6 for side in (0, 1))
    text = (
        f"{up:.1f} MB up and {down:.1f} MB down in {len(sent)} rounds; {up / len(sent):.1f} MB up a round on average."
    )
    tooltip = hover(direction="direction", round="round", megabytes="MB")
    y = number("megabytes", "MB", scale={"zero": True})
    plot = lines(rows, rounds(max(sent)), y, name("direction", None), tooltip)
    return Figure("bytes", "Bytes sent per round", plot, text)


def availability(key: str, title: str, shares: Mapping[int, Mapping[str, float]], note: str) -> Figure:
    """Plot which share of each client's entities has a modality; client -> modality -> share."""
    rows: list[dict[str, Any]] = [
        {"client": str(client), "modality": modality, "share": share, "label": f"{share:.0%}"}
        for client, values in shares.items()
        for modality, share in values.items()
    ]
    x = name("client", "client", axis={"labelAngle": 0})
    y = name("modality", None)
    tooltip = hover(client="client", modality="modality", label="share of the entities")
    plot = heat_map(rows, x, y, "share of the client's entities", tooltip, labels=len(shares) <= MAX_LEGEND)
    parts = []
    for modality in dict.fromkeys(row["modality"] for row in rows):
        values = [row["share"] for row in rows if row["modality"] == modality]
        parts.append(
            f"{modality} at {sum(values) / len(values):.0%} (clients from {min(values):.0%} to {max(values):.0%})"
        )
    return Figure(key, title, plot, f"Mean over clients: {'; '.join(parts)}.", note)


def sampling_quality(
    metric: str,
    title: str,
    by_steps: Mapping[int, Mapping[str, float]],
    others: Mapping[str, Mapping[str, float]],
    used: int,
    note: str,
) -> Figure:
    """Plot the diffusion's imputation quality over its sampling steps, beside other imputers.

    Args:
        metric: key of the figure.
        title: of the metric.
        by_steps: sampling steps -> modality -> value.
        others: modality -> imputer -> value of those that need no steps.
        used: the steps that the run imputed with.
        note: what stands below.
    """
    rows: list[dict[str, Any]] = [
        {"steps": steps, "modality": modality, "imputer": imputer, "value": value}
        for steps, values in by_steps.items()
        for modality, own in values.items()
        for imputer, value in {"diffusion": own, **others.get(modality, {})}.items()
    ]
    axis = {"values": list(by_steps), "format": "d", "grid": False}
    x = number("steps", "sampling steps", scale={"type": "log", "base": 2, "nice": False}, axis=axis)
    tooltip = hover(modality="modality", imputer="imputer", steps="steps", value=title)
    legend = {"symbolType": "stroke", "symbolSize": 300}
    encoding: Spec = {"x": x, "y": number("value", title, scale={"zero": False}), "tooltip": tooltip}
    encoding["color"] = name("modality", None, legend=legend)
    imputers = list(dict.fromkeys(row["imputer"] for row in rows))
    dashes = [[1, 0], [6, 3], [2, 2], [9, 3, 2, 3], [4, 6]]
    scale = {"domain": imputers, "range": [dashes[number % len(dashes)] for number in range(len(imputers))]}
    encoding["strokeDash"] = name("imputer", None, legend=legend, scale=scale)
    own = "datum.imputer == 'diffusion'"
    layers: list[Spec] = [
        {"mark": {"type": "line"}, "encoding": encoding},
        {
            "mark": {"type": "point"},
            "transform": [{"filter": own}],
            "encoding": {key: value for key, value in encoding.items() if key != "strokeDash"},
        },
    ]
    plot = spec(rows, *layers)
    low, high = min(by_steps), max(by_steps)
    parts = []
    for modality in by_steps[low]:
        best = max(by_steps, key=lambda steps: by_steps[steps][modality])
        text = f"{modality}: {by_steps[low][modality]:.3f} with {low} step{'s' if low > 1 else ''}, "
        text += f"{by_steps[used][modality]:.3f} with the {used} of the run, "
        text += f"best {by_steps[best][modality]:.3f} with {best}"
        rival = max(others.get(modality, {}).items(), key=lambda item: item[1], default=None)
        parts.append(text + (f"; {rival[0]} has {rival[1]:.3f}" if rival else ""))
    assert low <= used <= high, "the run's own number of steps is among them"
    return Figure(f"sampling-{metric}", f"Imputation: {title} by sampling steps", plot, f"{'. '.join(parts)}.", note)


def embedding_map(key: str, title: str, points: Rows, summary: str) -> Figure:
    """Plot shared entities at each client; a line joins what is the same entity.

    Args:
        key: of the figure.
        title: of the figure.
        points: x, y, client, order, id, entity (its label) and tokens (which are real) of each.
        summary: in words.
    """
    axis = {"labels": False, "ticks": False, "grid": False, "domain": False}
    x = number("x", None, axis=axis, scale={"zero": False, "padding": 12})
    y = number("y", None, axis=axis, scale={"zero": False, "padding": 12})
    joined: Spec = {
        "mark": {"type": "line", "color": INK, "opacity": 0.35, "strokeWidth": 1},
        "encoding": {"x": x, "y": y, "detail": {"field": "id"}, "order": {"field": "order"}},
    }
    tooltip = hover(entity="entity", client="", tokens="tokens")
    dots: Spec = {
        "mark": {"type": "point", "size": 60, "opacity": 0.9},
        "encoding": {"x": x, "y": y, "color": name("client", None), "tooltip": tooltip},
    }
    return Figure(key, title, spec(points, joined, dots, height=360), summary)


def timeline(bars: Rows, starts: Rows, actors: Sequence[str], phases: Sequence[str], summary: str, note: str) -> Figure:
    """Plot who worked when, with the starts of the run.

    Args:
        bars: actor, phase, what, start, end (seconds), failed.
        starts: second and text of each start or end of a session.
        actors: from top to bottom.
        phases: in the order of their colours.
        summary: in words.
        note: what stands below.
    """
    x = number("start", "seconds of work", scale={"zero": True, "nice": False}, axis={"grid": True})
    y = name("actor", None) | {"sort": list(actors)}
    work: Spec = {
        "mark": {"type": "bar", "height": {"band": 0.75}},
        "encoding": {
            "x": x,
            "x2": {"field": "end"},
            "y": y,
            "color": name("phase", None, scale={"domain": list(phases)}),
            "stroke": {"condition": {"test": "datum.failed", "value": ALARM}, "value": None},
            "strokeWidth": {"condition": {"test": "datum.failed", "value": 3}, "value": 0},
            "tooltip": hover(actor="actor", what="work", seconds="seconds", end_text="ended"),
        },
    }
    marks: Spec = {
        "data": {"values": list(starts)},
        "mark": {"type": "rule", "strokeDash": [4, 3], "strokeWidth": 2, "color": ALARM},
        "encoding": {"x": number("start", "seconds of work"), "tooltip": hover(text="")},
    }
    layers = [work, marks] if starts else [work]
    plot = spec(bars, *layers, height=24 * len(actors) + 10)
    return Figure("timeline", "Timeline of the actors", plot, summary, note, wide=True)
