"""A sweep: starts or continues the trials of a plan on Ray Tune, keeps its record, and ends with tables and plots.

What a sweep has come to is in its own folder: the plan, sweep.json and the trials' run folders. Ray Tune's state is
not kept: after a kill, a new search is told what the ended trials gave, and the others go on from their run folders.
"""

import logging
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import ray
from ray import tune as ray_tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from actors.cluster import cluster_resources, connect, with_measured_memory
from actors.placement import NodeResources
from fedsim.benchmark.folder import locked
from fedsim.errors import RunError
from fedsim.report.console import make_console, show_rows, shown_path
from tune.plan import PLAN_FILE, SweepPlan, name_params, name_trial, read_plan
from tune.population import make_population
from tune.records import BEST_FILE, ENDED, FAILED, METRIC, PENDING, Records, Trial
from tune.resources import Reservation, check_room, most_at_a_time, reserve
from tune.search import make_search
from tune.trial import current_params, run_trial
from tune.watch import Watch

LOCK_FILE = ".lock"
TUNE_FOLDER = ".ray-tune"  # what Tune writes for itself; of no use afterwards
# What Tune would do beyond running trials: tables and log files of its own, another working folder, its own Ctrl-C.
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}


def start(plan: SweepPlan) -> bool:
    """Start a sweep; returns whether all its trials ended well.

    Raises:
        FedSimError: if it cannot be started.
    """
    if plan.folder.exists() and any(item.name != LOCK_FILE for item in plan.folder.iterdir()):
        known = (plan.folder / PLAN_FILE).is_file()
        mend = f"go on with `fedsim tune --resume {shown_path(plan.folder)}`, or give" if known else "give"
        raise RunError(f"{shown_path(plan.folder)} exists; {mend} another --output")
    with _locked(plan.folder), _on_ray(plan) as nodes:
        listed = plan.listed or ()
        records = Records(plan, [Trial(name_trial(number), params) for number, params in enumerate(listed)])
        reservations = _check(plan, list(records.trials.values()), nodes)
        plan.write()
        return _run(plan, records, reservations, nodes)


def go_on(folder: Path, *, retry_failed: bool = False) -> bool:
    """Continue a sweep that was stopped or killed; returns whether all its trials ended well.

    Args:
        folder: of the sweep.
        retry_failed: try failed trials again.
    """
    plan = read_plan(folder)
    with _locked(plan.folder):
        listed = [Trial(name_trial(number), params) for number, params in enumerate(plan.listed or ())]
        records = Records.read(plan, listed)
        for trial in records.trials.values():
            if retry_failed and trial.status == FAILED:
                trial.status, trial.error = PENDING, ""
            if plan.settings.scheduler == "pbt" and trial.status not in ENDED:
                trial.params = current_params(plan, trial.id) or trial.params
        waiting = [trial for trial in records.trials.values() if trial.status not in ENDED]
        if not waiting and len(records.trials) >= plan.num_trials:
            return _show(plan, records)
        with _on_ray(plan) as nodes:
            return _run(plan, records, _check(plan, waiting, nodes), nodes)


def _run(
    plan: SweepPlan, records: Records, reservations: Sequence[Reservation], nodes: Sequence[NodeResources]
) -> bool:
    """Run the trials that have not ended, then show what the sweep has come to."""
    waiting = [trial for trial in records.trials.values() if trial.status not in ENDED]
    num_ended, folder = len(records.trials) - len(waiting), shown_path(plan.folder)
    make_console().print(
        f"{plan.num_trials} trials, {num_ended} of them ended; {reservations[0].what}; folder {folder}",
        soft_wrap=True,
        markup=False,
    )
    records.write()
    random.seed(plan.seed)  # Ray's population based training draws from the global generators
    np.random.seed(plan.seed % (1 << 32))  # noqa: NPY002
    settings, share = plan.settings, _share_cpus(plan, nodes)
    at_a_time: int | None = most_at_a_time(reservations, nodes)
    if settings.concurrent is not None:
        at_a_time = min(at_a_time or 1, settings.concurrent)
    if settings.scheduler == "pbt":
        at_a_time = None  # Tune would count members that wait for others, and never begin the rest

    def resources(config: dict[str, Any]) -> ray_tune.PlacementGroupFactory:
        return reserve(plan.config(config["trial"]["params"]), share).factory

    search, space, num_samples = _search(plan, records, waiting)
    shutil.rmtree(plan.folder / TUNE_FOLDER, ignore_errors=True)
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(run_trial, resources),
        param_space=space,
        tune_config=ray_tune.TuneConfig(
            scheduler=_scheduler(plan, records),
            search_alg=search,
            num_samples=num_samples,
            max_concurrent_trials=at_a_time,
            reuse_actors=True,  # spares each trial a process that imports torch
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=ray_tune.RunConfig(
            name="trials",
            storage_path=str(plan.folder / TUNE_FOLDER),
            verbose=0,
            failure_config=ray_tune.FailureConfig(max_failures=settings.max_failures),
            callbacks=[Watch(records)],
        ),
    )
    try:
        tuner.fit()
    except KeyboardInterrupt:
        for trial in records.trials.values():
            trial.status = PENDING if trial.status not in ENDED else trial.status
        records.write()
        raise
    for name in (TUNE_FOLDER, "snapshots"):
        shutil.rmtree(plan.folder / name, ignore_errors=True)
    return _show(plan, records)


def _trial_name(trial: TuneTrial) -> str:
    return str(trial.config["trial"]["id"])


def _scheduler(plan: SweepPlan, records: Records) -> TrialScheduler:
    """Make the scheduler, and tell it of the trials that have ended."""
    settings = plan.settings
    if settings.scheduler == "none":
        return FIFOScheduler()
    if settings.scheduler == "pbt":
        return make_population(plan.space, settings.interval)
    asha = ASHAScheduler(
        time_attr="round",
        metric=METRIC,
        mode="max",
        max_t=max(plan.max_rounds + 1, settings.grace_rounds),  # a run ends by itself after its last round
        grace_period=settings.grace_rounds,
        reduction_factor=settings.reduction_factor,
    )
    controller = cast(Any, None)  # which it does not ask
    for trial in records.trials.values():
        if trial.status not in ENDED:
            continue
        known = cast(Any, SimpleNamespace(trial_id=f"ended-{trial.id}"))
        asha.on_trial_add(controller, known)
        for round_num, mrr in records.history(trial):
            asha.on_trial_result(controller, known, {"round": round_num, METRIC: mrr})
    return asha


def _search(plan: SweepPlan, records: Records, waiting: Sequence[Trial]) -> tuple[Searcher | None, dict[str, Any], int]:
    """Make what gives out the trials, a list or Optuna; returns the search, Tune's space, and how often it draws."""
    sweep = str(plan.folder)
    if plan.listed is not None:
        trials = [{"id": trial.id, "params": trial.params} for trial in waiting]
        return None, {"sweep": sweep, "trial": ray_tune.grid_search(trials)}, 1
    missing = plan.num_trials - len(records.trials)
    return make_search(plan, records, waiting), {}, len(waiting) + missing


def _check(plan: SweepPlan, waiting: Sequence[Trial], nodes: Sequence[NodeResources]) -> list[Reservation]:
    """Refuse a sweep with a trial that the cluster has no room for; returns what the trials reserve."""
    tried = [(trial.id, trial.params) for trial in waiting]
    if plan.listed is None:
        tried += [("a trial", {item.name: value}) for item, value in plan.space.corners()]
    reservations = []
    for name, params in tried:
        config = plan.config(params)
        reservations.append(reserve(config, _share_cpus(plan, nodes)))
        check_room(f"{name} ({name_params(params)})", reservations[-1], nodes)
    return reservations


def _share_cpus(plan: SweepPlan, nodes: Sequence[NodeResources]) -> float | None:
    concurrent = plan.settings.concurrent
    return None if concurrent is None else sum(node.cpus for node in nodes) / concurrent


def _show(plan: SweepPlan, records: Records) -> bool:
    """Write and show the results; returns whether all trials ended well."""
    from fedsim.report import write_sweep_report

    records.write_results()
    console = make_console()
    header, *rows = records.table()
    show_rows(plan.space.title or "Trials", header, rows, console)
    header, *rows = records.costs()
    if rows:
        show_rows("What settings give and cost", header, rows, console)
    failed = [trial for trial in records.trials.values() if trial.status == FAILED]
    lines = [f"{trial.id} failed: {trial.error}" for trial in failed]
    best = records.best
    if best is not None:
        path = shown_path(plan.folder / BEST_FILE)
        mrr = records.progress(best).valid_mrr
        lines.append(f"Best: {best.id}, validation MRR {mrr:.4f}; run it with: fedsim run {path}")
        if plan.settings.scheduler == "pbt":
            lines += [f"  from round {step['round']}: {name_params(step['params'])}" for step in records.schedule(best)]
    report = write_sweep_report(plan.folder)
    lines.append(f"Written: sweep.json, trials.csv, trials.md and {report.name} in {shown_path(plan.folder)}")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    return not failed and best is not None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    busy = f"another fedsim tune is at work in {shown_path(folder)}; wait for it, or end it"
    with locked(folder / LOCK_FILE, busy):
        yield


@contextmanager
def _on_ray(plan: SweepPlan) -> Iterator[list[NodeResources]]:
    """Join or start the cluster that the trials' config names; gives what its nodes have."""
    os.environ.update(QUIET)
    for name in ("ray.tune", "ray.air"):
        logging.getLogger(name).setLevel(logging.ERROR)
    started_here = not ray.is_initialized()
    if started_here:
        runtime = plan.base["runtime"]
        connect(runtime["address"], dashboard=runtime["dashboard"])
    try:
        nodes, _ = cluster_resources()
        yield with_measured_memory(nodes)
    finally:
        if started_here:
            ray.shutdown()
