"""A run: the round loop, its checkpoints and its result.

The loop sees the runtime and the run folder, no client data: `run` starts it, `resume` continues it after the last
checkpoint with the same numbers, `evaluate` ranks the test triples with the best models once more.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedsim.checkpoint import newest_checkpoint, prune_checkpoints, read_manifest, replace_text, write_checkpoint
from fedsim.config import Config
from fedsim.errors import LostActorError, RunError
from fedsim.evaluation.ranking import weighted_mean
from fedsim.federated.failures import Failure, check_failures
from fedsim.federated.message_checks import Rejection
from fedsim.federated.participation import Schedule, cohort_size, make_schedule
from fedsim.federated.runtime import (
    Experiment,
    InProcessRuntime,
    Measurements,
    RoundResult,
    Runtime,
    RuntimeFactory,
    prepare,
)
from fedsim.privacy.accounting import PrivacyLedger, check_resumed, make_ledger
from fedsim.process import return_freed_memory
from fedsim.progress import Progress
from fedsim.randomness import numpy_generator
from fedsim.results import (
    ClientResult,
    Observer,
    RoundSummary,
    RunInfo,
    RunResult,
    SilentObserver,
    imputation_table,
    metric_rows,
    participation_totals,
    result_as_json,
    round_bytes,
    rounds_to_95,
)
from fedsim.run_folder import RunFolder


@dataclass(frozen=True)
class Plan:
    """What the loop knows of an experiment, without its data.

    Attributes:
        config: the experiment.
        schedule: who takes part in which round, if that is simulated.
        client_sizes: of each client its id, entities, relations, and train, valid and test triples.
        num_moved: valid and test triples that the split moved to train.
        ledger: what the rounds cost in privacy; None without differential privacy.
    """

    config: Config
    schedule: Schedule | None
    client_sizes: list[tuple[int, int, int, int, int, int]]
    num_moved: int
    ledger: PrivacyLedger | None = None

    @property
    def num_rounds(self) -> int:
        """Rounds that are run at most: fewer than the config's if the privacy budget ends before."""
        return self.config.federation.num_rounds if self.ledger is None else self.ledger.last_round


Record = Callable[[Sequence[Mapping[str, Any]]], None]
"""Keeps the rows of a finished round, as `metric_rows` makes them."""


def in_process_runtime(experiment: Experiment) -> Runtime:
    """Make the runtime that runs everything in this process."""
    return InProcessRuntime(experiment)


def run(
    config: Config, runtime_factory: RuntimeFactory = in_process_runtime, observer: Observer | None = None
) -> RunResult:
    """Run an experiment from its start.

    Args:
        config: the experiment.
        runtime_factory: makes the runtime; `actors.runtime.ray_runtime` for Ray.
        observer: is told of progress.

    Raises:
        FedSimError: for everything that a user can mend.
    """
    RunFolder.refuse_existing(config)
    plan, runtime = _start(config, runtime_factory)
    with ExitStack() as last, closing(runtime):
        folder = RunFolder.create(config)  # not before the runtime stands: a start that fails leaves nothing behind
        last.callback(folder.remove_half_written)
        return _run(plan, runtime, folder, Progress(), None, observer or SilentObserver())


def resume(
    path: Path, runtime_factory: RuntimeFactory = in_process_runtime, observer: Observer | None = None
) -> RunResult:
    """Continue a run after its newest whole checkpoint; a run without one starts over in its folder.

    Raises:
        RunError: if the folder is not a run, or the run is finished.
    """
    folder, config = RunFolder.open(path)
    if folder.result_file.is_file():
        raise RunError(f"{path} is finished; see it with `fedsim evaluate {path}`, or start another with `fedsim run`")
    checkpoint, before = folder.newest_checkpoint()
    progress = Progress() if before is None else Progress(**before)
    if progress.best_round is not None and folder.checkpoint(progress.best_round).is_dir():
        # One that is not there was pruned after a better round, which is about to be done again.
        _verify_best(folder.checkpoint(progress.best_round))
    folder.rewind_metrics(progress.round_num)
    plan, runtime = _start(config, runtime_factory)
    with ExitStack() as last, closing(runtime):
        last.callback(folder.remove_half_written)
        if checkpoint is not None:
            check_resumed(plan.ledger, progress.round_num, progress.privacy, path)
            runtime.load(checkpoint)
        return _run(plan, runtime, folder, progress, checkpoint, observer or SilentObserver())


def evaluate(path: Path, runtime_factory: RuntimeFactory = in_process_runtime) -> RunResult:
    """Rank the test triples of a finished (or stopped) run with its best models once more."""
    folder, config = RunFolder.open(path)
    checkpoint, manifest = newest_checkpoint(folder.checkpoints)
    progress = Progress(**manifest["progress"])
    if progress.best_round is None:
        raise RunError(f"{path} has not been validated yet; finish it with `fedsim resume {path}`")
    plan, runtime = _start(config, runtime_factory)
    with closing(runtime):
        best = folder.checkpoint(progress.best_round)
        if best != checkpoint:
            _verify_best(best)
        runtime.load(best)
        return _finish(runtime, plan, folder, progress)


def _start(config: Config, runtime_factory: RuntimeFactory) -> tuple[Plan, Runtime]:
    """Read and divide the data, and start the runtime; the data is gone here once clients elsewhere have it."""
    experiment = prepare(config)
    schedule, clients = make_schedule(experiment), [data.client for data in experiment.clients]
    ledger = make_ledger(config, clients, lambda round_num: cohort_of(config, schedule, clients, round_num))
    plan = Plan(config, schedule, _client_sizes(experiment), experiment.num_moved, ledger)
    return_freed_memory()  # what reading took
    runtime = runtime_factory(experiment)
    del experiment
    return_freed_memory()
    return plan, runtime


def _run(
    plan: Plan, runtime: Runtime, folder: RunFolder, progress: Progress, checkpoint: Path | None, observer: Observer
) -> RunResult:
    """Run the rounds that are left, and write the result."""
    config = plan.config
    start, num_rounds = progress.round_num + 1, plan.num_rounds
    observer.run_started(RunInfo(folder.path, config, runtime.placement, num_rounds, start, plan.client_sizes))
    if plan.num_moved:
        observer.message(
            f"{plan.num_moved} valid and test triples that their client could not learn moved to its train"
        )
    if plan.ledger is not None:
        observer.message(plan.ledger.start_message())
    folder.append_timeline("start", start, runtime.timeline.take())
    error: str | None = "interrupted"
    try:
        result = None
        while result is None:
            try:
                result = _run_to_the_end(plan, runtime, folder, progress, checkpoint, observer)
            except LostActorError as err:
                checkpoint, progress = _go_back(runtime, folder, progress, err)
        replace_text(folder.result_file, json.dumps(result_as_json(result), indent=1) + "\n")
        error = None
    except Exception as err:
        error = str(err) or type(err).__name__
        raise
    finally:
        folder.append_timeline("stop", progress.round_num, runtime.timeline.take(), error)
    folder.store()
    return result


def _run_to_the_end(
    plan: Plan, runtime: Runtime, folder: RunFolder, progress: Progress, checkpoint: Path | None, observer: Observer
) -> RunResult:
    """Run the rounds that are left, and rank the test triples."""
    with _recorder(plan, runtime, folder) as record:
        newest = run_rounds(plan, runtime, folder, progress, observer, record) or checkpoint
    assert newest is not None, "there is at least one round"
    assert progress.best_round is not None, "the last round is validated"
    best = folder.checkpoint(progress.best_round)
    if best != newest:  # the runtime holds the newest
        _verify_best(best)
        runtime.load(best)
    return _finish(runtime, plan, folder, progress)


def _go_back(
    runtime: Runtime, folder: RunFolder, progress: Progress, error: LostActorError
) -> tuple[Path | None, Progress]:
    """Bring the runtime to the newest whole checkpoint, or to the start; returns where the loop stands then."""
    started = time.perf_counter()
    checkpoint, before = folder.newest_checkpoint()
    again = Progress() if before is None else Progress(**before)
    runtime.recover(error, checkpoint, again.round_num)
    folder.rewind_metrics(again.round_num)
    took = progress.seconds.get("recovery", 0.0) + time.perf_counter() - started
    again.seconds["recovery"] = took
    return checkpoint, again


@contextmanager
def _recorder(plan: Plan, runtime: Runtime, folder: RunFolder) -> Iterator[Record]:
    """Record rounds in metrics.jsonl, where the runtime's processes are watched, and for TensorBoard."""
    watching = plan.config.watching
    with ExitStack() as files:
        events = None
        if watching.tensorboard:
            from fedsim.report.tensorboard import EventFile  # its protocol buffers take time to import

            per_client = len(plan.client_sizes) < watching.per_client_below
            events = files.enter_context(EventFile(folder.path, folder.read_metrics(), per_client=per_client))

        def record(rows: Sequence[Mapping[str, Any]]) -> None:
            folder.append_metrics(rows)
            runtime.record(rows)
            if events is not None:
                events.add(rows)

        yield record


def run_rounds(
    plan: Plan, runtime: Runtime, folder: RunFolder, progress: Progress, observer: Observer, record: Record
) -> Path | None:
    """Run the federation's rounds; returns the newest checkpoint, or None if no round was left.

    1. sample the cohort (none if the round is skipped), 2. broadcast, train, aggregate and distil, 3. validate (with
    what was trained or aggregated) and measure if it is due, 4. record, 5. checkpoint.
    """
    config = plan.config
    clients = [size[0] for size in plan.client_sizes]
    checkpoint: Path | None = None
    num_rounds = plan.num_rounds
    for round_num in range(progress.round_num + 1, num_rounds + 1):
        if progress.out_of_patience(config):
            break
        observer.round_started(round_num)
        taking_part = plan.schedule.plan(round_num) if plan.schedule is not None else None
        cohort = cohort_of(config, plan.schedule, clients, round_num)
        takes_place = bool(cohort) or config.privacy.noise == "server"  # whose noise hides that nobody came
        if not takes_place:
            observer.message(f"round {round_num} is skipped: too few clients, see participation.min_clients")
        result = runtime.train(round_num, cohort) if takes_place else RoundResult([], None, {})
        _tell_failures(config, result, round_num, observer)
        started = time.perf_counter()
        is_last = round_num == num_rounds
        due = round_num % config.evaluation.every == 0 or is_last
        if due and config.evaluation.on_aggregated:
            runtime.deliver(round_num + 1)  # what opens the next round; a checkpoint keeps what was ranked
        evaluations = runtime.evaluate("valid", round_num, choose=True) if due else []
        seconds = result.seconds | {"evaluate": time.perf_counter() - started}
        measured = _measure_if_due(config, runtime, round_num, seconds)
        is_best = progress.advance(round_num, result, evaluations, seconds)
        progress.privacy = plan.ledger.spent(round_num).as_json() if plan.ledger is not None else None
        rows = metric_rows(round_num, result, evaluations, seconds, taking_part, measured, progress.privacy)
        record(rows)
        started = time.perf_counter()
        if is_best or is_last or round_num % config.checkpoint.every == 0 or progress.out_of_patience(config):
            checkpoint = write_checkpoint(folder.checkpoints, round_num, asdict(progress), runtime.save)
            runtime.kept(checkpoint, round_num)
            prune_checkpoints(folder.checkpoints, config.checkpoint.keep, progress.best_round)
            folder.store()
        progress.seconds["checkpoint"] = progress.seconds.get("checkpoint", 0.0) + time.perf_counter() - started
        valid_mrr = weighted_mean([item.metrics for item in evaluations]).mrr if evaluations else None
        folder.append_timeline("work", round_num, runtime.timeline.take())
        up, down = round_bytes(result)
        observer.round_finished(
            RoundSummary(round_num, rows[-1]["loss"], valid_mrr, progress.best_mrr, seconds, up, down, progress.privacy)
        )
    if plan.ledger is not None and progress.round_num == num_rounds and (reason := plan.ledger.stop_message()):
        observer.message(reason)
    return checkpoint


def _tell_failures(config: Config, result: RoundResult, round_num: int, observer: Observer) -> None:
    """Name clients that failed and updates that were rejected, and a round that came to nothing by it.

    Raises:
        RunError: if they are more than may be, or too few are left.
    """
    rejected = result.server.rejected if result.server is not None else ()
    faults: list[Failure | Rejection] = [*result.failures, *rejected]
    for failure in faults:
        kind = "rejected" if isinstance(failure, Rejection) else "left out"
        observer.message(f"{kind} ({failure.reason}): {failure.message}")
    num_updates = result.server.num_updates if result.server is not None else None
    check_failures(config, round_num, num_updates, result.failures, rejected)
    if rejected and not num_updates:
        observer.message(f"round {round_num} is not aggregated: too few updates, see participation.min_clients")


def _measure_if_due(config: Config, runtime: Runtime, round_num: int, seconds: dict[str, float]) -> Measurements | None:
    """Let the instruments measure in the rounds in which the config wants it, and note the time."""
    every = config.evaluation.measure_every
    if every is None or round_num % every:
        return None
    started = time.perf_counter()
    measured = runtime.measure(round_num)
    seconds["measure"] = time.perf_counter() - started
    return measured


def cohort_of(config: Config, schedule: Schedule | None, clients: Sequence[int], round_num: int) -> list[int]:
    """Return the clients of a round, sorted."""
    return schedule.plan(round_num).cohort if schedule is not None else sample_cohort(config, clients, round_num)


def sample_cohort(config: Config, clients: Sequence[int], round_num: int) -> list[int]:
    """Sample the clients of a round, sorted; a pure function of (seed, round).

    With differential privacy at the server each client joins on its own (Poisson sampling), as its accountant assumes.
    """
    if config.privacy.noise == "server":
        rate = config.federation.cohort_fraction
        draws = (numpy_generator(config.seed, "cohort/poisson", round_num=round_num, client=who) for who in clients)
        return sorted(who for who, draw in zip(clients, draws, strict=True) if draw.random() < rate)
    size = cohort_size(config.federation, len(clients))
    picked = numpy_generator(config.seed, "cohort", round_num=round_num).choice(len(clients), size, replace=False)
    return sorted(clients[int(index)] for index in picked)


def _finish(runtime: Runtime, plan: Plan, folder: RunFolder, progress: Progress) -> RunResult:
    """Rank the test triples with the models of the round with the best validation MRR, which the runtime holds."""
    started = time.perf_counter()
    schedule, best_round = plan.schedule, progress.best_round
    assert best_round is not None, "the last round is validated"
    assert progress.best_mrr is not None, "a best round has a metric"
    tests = runtime.evaluate("test", best_round, choose=False)
    valids = {item.client: item for item in runtime.evaluate("valid", best_round, choose=False)}
    measured = runtime.measure(best_round)
    folder.publish_models(folder.checkpoint(best_round))
    seconds = progress.seconds | {"final_evaluation": time.perf_counter() - started}
    return RunResult(
        folder=folder.path,
        best_round=best_round,
        num_rounds_to_95=rounds_to_95(folder.read_metrics(), best_round, progress.best_mrr),
        valid_mrr=progress.best_mrr,
        test=weighted_mean([item.metrics for item in tests]),
        clients=[
            ClientResult(item.client, item.metrics, valids[item.client].metrics.mrr, item.combination) for item in tests
        ],
        seconds=seconds,
        bytes_up=progress.bytes_up,
        bytes_down=progress.bytes_down,
        imputation=imputation_table(measured),
        consistency=measured.consistency,
        participation=participation_totals(schedule.rounds[: progress.round_num]) if schedule is not None else None,
        privacy=plan.ledger.spent(progress.round_num) if plan.ledger is not None else None,
    )


def _verify_best(best: Path) -> None:
    """Check the checkpoint of the best round, of which there is no other copy."""
    try:
        read_manifest(best)
    except RunError as err:
        raise RunError(f"{err}; the run's best models are lost: start it anew with `fedsim run`") from err


def _client_sizes(experiment: Experiment) -> list[tuple[int, int, int, int, int, int]]:
    sizes = []
    for data in experiment.clients:
        counts = [sum(len(group.triples[name]) for group in data.groups) for name in ("train", "valid", "test")]
        sizes.append((data.client, len(data.entity_ids), len(data.relation_ids), counts[0], counts[1], counts[2]))
    return sizes
