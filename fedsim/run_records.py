"""What the files of runs, benchmarks and sweeps hold, checked when they are read: they may come from anywhere.

The checks look at what readers rely on; what else a file holds is let through as it is.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StrictBool, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from fedsim.errors import RunError

Number = Annotated[float, Field(strict=True)]  # a loss may be infinite
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 53)]


def _scores(scores: dict[str, float]) -> dict[str, float]:
    """Hold scores to the names that reports show."""
    if "mrr" not in scores:
        raise ValueError("scores need mrr")
    strange = [name for name in scores if name.startswith("hits_at_") and not _is_rank(name[8:])]
    if strange:
        raise ValueError(f"{strange[0]!r} is no measure")
    return scores


def _is_rank(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 9


def _with_total(losses: dict[str, float]) -> dict[str, float]:
    if "total" not in losses:
        raise ValueError("losses need total")
    return losses


def _plain(value: Any) -> Any:
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise ValueError("the number is too large")
    return value


def _shown(scores: dict[str, float]) -> dict[str, float]:
    missing = [name for name in ("hits_at_1", "hits_at_10") if name not in scores]
    if missing:
        raise ValueError(f"scores need {missing[0]}")
    return scores


Scores = Annotated[dict[str, Finite], AfterValidator(_scores)]
TestScores = Annotated[Scores, AfterValidator(_shown)]  # what tables of many runs show
Params = dict[str, Annotated[Any, AfterValidator(_plain)]]


class _Row(TypedDict):
    round: Count
    client: Count | None
    bytes_up: NotRequired[Count]
    bytes_down: NotRequired[Count]
    phase_seconds: NotRequired[dict[str, Finite]]
    losses: NotRequired[Annotated[dict[str, Number], AfterValidator(_with_total)]]
    valid: NotRequired[Scores]


def _whole_row(row: _Row) -> _Row:
    for name in ("bytes_up", "bytes_down", "phase_seconds"):
        if row["client"] is None and name not in row:
            raise ValueError(f"the row of a round needs {name}")
    return row


class _TimelineRow(TypedDict):
    event: str
    time: Finite
    round: Count
    spans: NotRequired[list[tuple[str, str, Finite, Finite, StrictBool]]]
    error: NotRequired[str | None]


class _Manifest(TypedDict):
    round: Count
    progress: dict[str, Any]
    sha256: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,100}$")], str]


class _ClientResult(TypedDict):
    client: Count
    test: Scores
    valid_mrr: Finite


class _Clock(TypedDict):
    virtual_seconds: Finite
    num_late: Count
    num_dropped: Count
    num_skipped: Count


class _Costs(TypedDict):
    valid_mrr: Finite
    seconds: dict[str, Finite]


class _Result(_Costs):
    test: TestScores


class _FullResult(_Result):
    best_round: Count
    num_rounds_to_95: Count
    clients: list[_ClientResult]
    bytes_up: Count
    bytes_down: Count
    imputation: dict[str, dict[str, Number]]
    consistency: dict[str, Number]
    participation: NotRequired[_Clock | None]


class _Versions(TypedDict):
    packages: NotRequired[dict[str, str]]
    git_commit: NotRequired[str | None]


class _Step(TypedDict):
    round: Count
    params: Params


class _Trial(TypedDict):
    id: str
    params: Params
    status: str
    valid_mrr: Finite | None
    rounds: Count
    seconds: Finite
    bytes_up: Count
    bytes_down: Count
    folder: NotRequired[str | None]
    error: NotRequired[str | None]
    schedule: NotRequired[list[_Step] | None]


class _PlannedTrial(TypedDict):
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,100}$")]
    params: dict[str, Any]
    status: str
    error: str | None


class _PlannedTrials(TypedDict):
    trials: list[_PlannedTrial]


class _Plan(TypedDict):
    source: str
    title: str
    settings: dict[str, Any]
    space: dict[str, Any]
    base: dict[str, Any]
    sweep: dict[str, Any]
    trials: list[dict[str, Any]] | None


class _Sweep(TypedDict):
    trials: list[_Trial]


class _Tuning(TypedDict):
    trials: list[dict[str, Any]]
    seeds: NotRequired[list[Count]]
    own_trials: NotRequired[bool]


class _Recipe(TypedDict):
    settings: dict[str, Any]
    parts: NotRequired[dict[str, dict[str, Any]]]
    tuning: NotRequired[_Tuning]


class _Benchmark(TypedDict):
    kind: str
    recipes: dict[str, _Recipe]
    methods: dict[str, dict[str, Any]]
    rates: list[str]
    seeds: list[str]
    changes: dict[str, Any]
    own_trials: NotRequired[dict[str, list[dict[str, Any]]]]
    tuned: dict[str, dict[str, Any] | None]


METRIC_ROW: TypeAdapter[_Row] = TypeAdapter(_Row)
WHOLE_ROW: TypeAdapter[_Row] = TypeAdapter(Annotated[_Row, AfterValidator(_whole_row)])
TIMELINE_ROW: TypeAdapter[_TimelineRow] = TypeAdapter(_TimelineRow)
MANIFEST: TypeAdapter[_Manifest] = TypeAdapter(_Manifest)
COSTS: TypeAdapter[_Costs] = TypeAdapter(_Costs)  # what sweeps need of a result
RESULT: TypeAdapter[_Result] = TypeAdapter(_Result)  # what tables of many runs need
FULL_RESULT: TypeAdapter[_FullResult] = TypeAdapter(_FullResult)
VERSIONS: TypeAdapter[_Versions] = TypeAdapter(_Versions)
SWEEP: TypeAdapter[_Sweep] = TypeAdapter(_Sweep)
PLAN: TypeAdapter[_Plan] = TypeAdapter(_Plan)
PLANNED_TRIALS: TypeAdapter[_PlannedTrials] = TypeAdapter(_PlannedTrials)
BENCHMARK: TypeAdapter[_Benchmark] = TypeAdapter(_Benchmark)


def check_record(value: Any, kind: TypeAdapter[Any], place: Path | str) -> None:
    """Refuse what is not a record of its kind.

    Raises:
        RunError: naming the place and the first thing that is wrong.
    """
    try:
        kind.validate_python(value)
    except ValidationError as err:
        first = err.errors()[0]
        field = ".".join(map(str, first["loc"])) or "it"
        raise RunError(f"{place} is damaged: {field}: {first['msg']}") from err
