"""Targets that are folders of runs, benchmarks and sweeps: read, reported on, resumed from."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedsim.config import dump_config, make_config
from fedsim.report import write_report
from fedsim.run_folder import RunFolder
from fedsim.run_storage import RunStorage
from fuzzing import seeds
from fuzzing.engine import Target
from fuzzing.mutation import Input
from tune.plan import PLAN_FILE, Settings, make_plan, read_plan
from tune.records import Records, Trial, read_progress
from tune.search_space import load_space

METRICS = {"mrr": 0.5, "hits_at_1": 0.25, "hits_at_3": 0.5, "hits_at_10": 1.0, "num_queries": 4}


def run_folder() -> Input:
    """A finished run of two clients, without its models."""
    config = make_config({}, {"data.path": "nowhere", "data.num_clients": 2, "federation.num_rounds": 2})
    rows: list[dict[str, Any]] = []
    for round_num in (1, 2):
        own = {"losses": {"total": 1.5, "link": 1.0}, "bytes_up": 10, "bytes_down": 20, "seconds": 0.5}
        rows += [{"round": round_num, "client": client, **own, "valid": METRICS} for client in (0, 1)]
        total = {"round": round_num, "client": None, "bytes_up": 20, "bytes_down": 40, "phase_seconds": {"train": 1.0}}
        rows.append(total | {"server_losses": {}, "loss": 1.5, "num_trained": 2, "valid": METRICS})
    spans = [["server", "training 1", 1.0, 0.5, False], ["clients 0-1", "summing", 1.5, 0.5, True]]
    timeline = [
        {"event": "start", "time": 1.0, "round": 1},
        {"event": "work", "time": 2.5, "round": 1, "spans": spans},
        {"event": "stop", "time": 3.0, "round": 2, "error": "killed"},
    ]
    clients = [{"client": number, "test": METRICS, "valid_mrr": 0.5, "combination": None} for number in (0, 1)]
    result = {
        "best_round": 2,
        "num_rounds_to_95": 1,
        "valid_mrr": 0.5,
        "test": METRICS,
        "clients": clients,
        "seconds": {"train": 1.0},
        "bytes_up": 40,
        "bytes_down": 80,
        "imputation": {"image/mean": {"cosine": 0.5}},
        "consistency": {"local/total": 0.5},
        "participation": {"virtual_seconds": 1.0, "num_late": 0, "num_dropped": 0, "num_skipped": 0},
        "privacy": None,
    }
    versions = {"python": "3.11", "packages": {"fedsim": "0.1.0", "torch": "2"}, "machine": "m", "git_commit": "abc"}
    return {
        "config.yaml": dump_config(config).encode(),
        "metrics.jsonl": seeds.jsonl(rows),
        "timeline.jsonl": seeds.jsonl(timeline),
        "result.json": json.dumps(result).encode(),
        "versions.json": json.dumps(versions).encode(),
    }


def benchmark_folder() -> Input:
    """A benchmark of one recipe and one method with two seeds, one of which failed."""
    manifest = {
        "format_version": 1,
        "kind": "benchmark",
        "fedsim": "0.1.0",
        "changes": {"federation.num_rounds": 2},
        "on_gpu": False,
        "recipes": {"tiny": {"settings": {}, "tuning": {"trials": [{"training.learning_rate": 0.01}]}}},
        "methods": {"FedE": {"federation.strategy": "fede"}},
        "tuned": {"tiny FedE": None},
        "rates": ["tiny 0.3"],
        "seeds": ["0", "1"],
    }
    run = "tiny/0.3/FedE/seed0"
    return {
        "benchmark.json": json.dumps(manifest).encode(),
        f"{run}/result.json": run_folder()["result.json"],
        "tiny/0.3/FedE/seed1.failed.txt": b"RunError: it failed\n",
    }


def sweep_folder() -> Input:
    """A sweep with one trial that is finished and one that is not."""
    trial = {
        "id": "t0",
        "params": {"diffusion.steps": 10},
        "status": "finished",
        "error": None,
        "valid_mrr": 0.5,
        "rounds": 2,
        "seconds": 1.0,
        "bytes_up": 10,
        "bytes_down": 10,
        "folder": "trials/t0",
        "schedule": [{"round": 1, "params": {"diffusion.steps": 10}}],
    }
    other = trial | {"id": "t1", "status": "pending", "valid_mrr": None, "params": {"diffusion.steps": 25}}
    sweep = {"version": 1, "title": "t", "best": "t0", "scheduler": "none", "search": "grid", "trials": [trial, other]}
    return {"sweep.json": json.dumps(sweep).encode()}


def plan_folder() -> Input:
    """A sweep's plan, with what is known of its trials and one trial's run."""
    with TemporaryDirectory() as place:
        make_plan(load_space("diffusion"), Path(place), {}, {}, Settings()).write()
        plan = (Path(place) / PLAN_FILE).read_bytes()
    trials = [{"id": "t0", "params": {}, "status": "running", "error": None}]
    run = run_folder()
    return {
        PLAN_FILE: plan,
        "sweep.json": json.dumps({"version": 1, "trials": trials}).encode(),
        "run/metrics.jsonl": run["metrics.jsonl"],
        "run/result.json": run["result.json"],
    }


def _report(folder: Path) -> None:
    (folder / "out").mkdir()
    write_report(folder, folder / "out" / "report.html")


def _resume(folder: Path) -> None:
    found, _ = RunFolder.open(folder)
    found.read_timeline()
    found.rewind_metrics(1)
    found.newest_checkpoint()


def _read_plan(folder: Path) -> None:
    plan = read_plan(folder)
    Records.read(plan, [Trial("t0", {})])
    read_progress(folder / "run")


def _fetch(folder: Path) -> None:
    RunStorage(f"file://{folder}/copy").fetch(folder / "out" / "run")


def run_targets() -> list[Target]:
    """Make the targets."""
    copy = {f"copy/{name}": content for name, content in run_folder().items()}
    return [
        Target("report-run", [run_folder()], _report, 0.08),
        Target("report-benchmark", [benchmark_folder()], _report, 0.08),
        Target("report-sweep", [sweep_folder()], _report, 0.08),
        Target("resume-run", [run_folder()], _resume, 0.2),
        Target("fetch-run", [copy], _fetch, 0.15),
        Target("sweep-plan", [plan_folder()], _read_plan, 1.0),
    ]
