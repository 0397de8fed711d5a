"""Runs of benchmarks that take hours: what is finished is not run again, what was stopped goes on; and FedE's model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

import fedsim
from fedsim.config import Config

HIDDEN, GAMMA = 128, 10.0
RANGE = (GAMMA + 2) / HIDDEN  # FedE's values start uniform within it

# FedE's model and training on FB15k-237, structure alone, that the comparisons have in common.
FEDE_MODEL: dict[str, Any] = {
    "data.path": "FB15k-237",
    "data.split": "given",
    "data.modalities": [],
    "model.fusion": "none",
    "model.dropout": 0.0,
    "model.init_scale": RANGE / 3**0.5,  # a normal of the same deviation
    "training.loss": "self_adversarial",
    "training.batch_size": 512,
    "training.num_negatives": 256,
    "training.local_epochs": 3,
    "training.learning_rate": 0.001,
    "training.reciprocal": False,
    "evaluation.every": 5,
    "checkpoint.every": 5,
    "checkpoint.keep": 1,
    "runtime.kind": "in_process",
}


def run_or_go_on(settings: Mapping[str, Any], folder: Path) -> Config:
    """Run a config to its end in a folder, from where it stands there.

    Raises:
        click.ClickException: if the folder has another config's run.
        FedSimError: if the run fails.
    """
    config = fedsim.load_config(overrides={**settings, "output": str(folder)})
    if folder.exists() and fedsim.load_config(folder / "config.yaml") != config:
        raise click.ClickException(f"{folder} was run with another config; give a new --output")
    if not folder.exists():
        fedsim.run(config)
    elif not (folder / "result.json").is_file():
        fedsim.resume(folder)
    return config
