"""The timeline of a run's actors, from what `timeline.jsonl` holds of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedsim.report.html_page import Figure
from fedsim.report.plots_run import timeline

MAX_ACTORS, MAX_BARS = 24, 2500  # more would be neither readable nor quick to draw
GAP_SHARE = 0.02  # of the whole width; a run may rest for days before it is resumed
# First words of a piece of work -> how the plot calls it.
PHASES = {
    "training": "training",
    "summing": "aggregation",
    "adding": "aggregation",
    "distilling": "distillation",
    "evaluation": "evaluation",
    "measurement": "measurement",
    "saving": "checkpoint",
    "loading": "checkpoint",
}
OTHER = "start and hand-over"


@dataclass
class _Session:
    """One stretch of a run, from `fedsim run` or `resume` to its end."""

    first_round: int
    begin: float
    end: float
    spans: list[tuple[str, str, float, float, bool]] = field(default_factory=list)
    closed: bool = False
    error: str | None = None


def timeline_figure(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Plot the timeline of a run; None if nothing was recorded."""
    sessions = _sessions(rows)
    if not any(session.spans for session in sessions):
        return None
    work = sum(session.end - session.begin for session in sessions)
    bars: list[dict[str, Any]] = []
    marks: list[dict[str, Any]] = []
    offset = 0.0
    for number, session in enumerate(sessions):
        if number > 0:
            offset += GAP_SHARE * work
            marks.append({"start": offset, "text": f"resumed with round {session.first_round}"})
        for actor, what, started, seconds, failed in session.spans:
            begin = offset + max(started - session.begin, 0.0)
            bars.append(
                {
                    "actor": actor,
                    "what": what,
                    "phase": PHASES.get(what.split(" ")[0], OTHER),
                    "start": round(begin, 3),
                    "end": round(begin + seconds, 3),
                    "seconds": round(seconds, 3),
                    "failed": failed,
                    "end_text": "in an error" if failed else "well",
                }
            )
        offset += session.end - session.begin
    actors = _actors(bars)
    shown = [bar for bar in bars if bar["actor"] in actors]
    note = "Gaps between sessions are cut short. " if marks else ""
    if len(actors) < len({bar["actor"] for bar in bars}):
        note += f"The {len(actors)} busiest of {len({bar['actor'] for bar in bars})} actors. "
    if len(shown) > MAX_BARS:
        shown = sorted(shown, key=lambda bar: bar["start"])[-MAX_BARS:]
        note += f"The last {MAX_BARS} pieces of work; all are in timeline.jsonl. "
    note += (
        "As the process that drives the run saw it: a bar is from the call, or the actor's last answer, to the answer."
    )
    phases = [name for name in dict.fromkeys([*PHASES.values(), OTHER]) if any(bar["phase"] == name for bar in shown)]
    return timeline(shown, marks, actors, phases, _summary(sessions, bars), note)


def _sessions(rows: Sequence[Mapping[str, Any]]) -> list[_Session]:
    sessions: list[_Session] = []
    for row in rows:
        time, spans = float(row["time"]), [tuple(span) for span in row.get("spans", ())]
        if row["event"] == "start" or not sessions:
            begin = min([time, *(span[2] for span in spans)])
            sessions.append(_Session(int(row["round"]), begin, time))
        last = sessions[-1]
        last.spans += [(str(actor).rsplit("/", 1)[-1], *rest) for actor, *rest in spans]
        last.end = max(last.end, time)
        if row["event"] == "stop":
            last.closed, last.error = True, row.get("error")
    return sessions


def _actors(bars: Sequence[Mapping[str, Any]]) -> list[str]:
    """Choose the actors to show: the server and the busiest others, by name."""
    busy: dict[str, float] = {}
    for bar in bars:
        busy[bar["actor"]] = busy.get(bar["actor"], 0.0) + bar["seconds"]
    order = sorted(busy, key=lambda actor: (actor != "server", -busy[actor]))[:MAX_ACTORS]
    return sorted(order, key=lambda actor: (actor != "server", len(actor), actor))


def _summary(sessions: Sequence[_Session], bars: Sequence[Mapping[str, Any]]) -> str:
    actors = dict.fromkeys(bar["actor"] for bar in bars)
    total = sum(session.end - session.begin for session in sessions)
    busy: dict[str, float] = dict.fromkeys(actors, 0.0)
    for bar in bars:
        busy[bar["actor"]] += bar["seconds"]
    idlest, busiest = min(busy, key=lambda name: busy[name]), max(busy, key=lambda name: busy[name])
    text = f"{len(actors)} actor{'s' if len(actors) > 1 else ''} over {total:.1f} s; "
    text += f"{busiest} worked {busy[busiest]:.1f} s"
    text += f", {idlest} {busy[idlest]:.1f} s" if len(actors) > 1 else ""
    text += ". No restart." if len(sessions) == 1 else f". Started {len(sessions)} times: "
    if len(sessions) > 1:
        text += ", ".join(f"with round {session.first_round}" for session in sessions) + "."
    for number, session in enumerate(sessions, start=1):
        cut = number < len(sessions) and not session.closed
        if session.error is not None or cut:
            which = f"Session {number}" if len(sessions) > 1 else "It"
            text += f" {which} ended early: {session.error if session.error else 'killed'}."
    return text
