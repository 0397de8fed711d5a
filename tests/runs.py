"""Small runs for tests: their config, and what must be equal between two runs of the same config."""

import json
from pathlib import Path
from typing import Any

from fedsim.config import Config, make_config

# MMFeD3-HidE with all its terms on, in a tenth of a second per round.
SMALL: dict[str, Any] = {
    "model.dim": 16,
    "model.gate_hidden": 8,
    "diffusion.hidden": 16,
    "diffusion.steps": 10,
    "diffusion.sampling_steps": 2,
    "diffusion.num_draws": 2,
    "training.batch_size": 64,
    "training.local_epochs": 1,
    "distillation.warmup_rounds": 1,
    "distillation.num_soft_queries": 8,
    "distillation.num_candidates": 4,
    "distillation.server_steps": 2,
    "report.html": False,
}


def small_config(dataset: Path, output: Path, num_rounds: int = 3, **changes: Any) -> Config:
    """Make the config of a small run; in `changes` a double underscore stands for the dot of a path."""
    paths = {"data.path": str(dataset), "output": str(output), "federation.num_rounds": num_rounds}
    return make_config({}, SMALL | paths | {name.replace("__", "."): value for name, value in changes.items()})


def small_options(dataset: Path, output: Path, num_rounds: int) -> list[str]:
    """Write the same config as options of the command line."""
    values = SMALL | {"data.path": dataset, "output": output, "federation.num_rounds": num_rounds}
    return [f"--{name}={value}" for name, value in values.items()]


def outcome(folder: Path) -> dict[str, Any]:
    """Return all that a run ends with, to the bit: metrics, result and models; wall times are left out."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    models = {path.name: path.read_bytes() for path in sorted((folder / "models").glob("*.safetensors"))}
    assert models, f"{folder} has no models"
    return {"metrics": _without_seconds(metrics), "result": _without_seconds(result), "models": models}


def num_rounds_done(folder: Path) -> int:
    """Count the rounds whose metrics are written."""
    path = folder / "metrics.jsonl"
    return path.read_text().count('"client": null') if path.is_file() else 0


def _without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_seconds(item) for name, item in value.items() if "seconds" not in name}
    if isinstance(value, list):
        return [_without_seconds(item) for item in value]
    return value
