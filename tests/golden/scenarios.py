"""The small experiments whose numbers are kept, and how they are run."""

from pathlib import Path
from typing import Any

from builders import tiny_graph
from experiments import small_config, small_experiment
from fedsim.evaluation.ranking import weighted_mean
from fedsim.federated.runtime import InProcessRuntime
from fedsim.simulation import sample_cohort

FOLDER = Path(__file__).parent
NUM_ROUNDS = 5

# Everything that decides a number is set here or in `experiments.SMALL`, so that a new default moves nothing.
WEIGHTS = {
    "distillation.temperature": 2.0,
    "distillation.logit_to_client": 0.5,
    "distillation.logit_to_global": 0.5,
    "distillation.feature_to_client": 0.1,
    "distillation.feature_to_global": 0.1,
    "distillation.prototype": 0.1,
    "distillation.warmup_rounds": 1,
    "distillation.proximal": 1.0,
    "distillation.server_learning_rate": 0.001,
    "diffusion.weight": 1.0,
    "diffusion.ema_decay": 0.995,
    "diffusion.hide_rate": 0.0,
    "training.module_learning_rate": 0.002,
    "training.reset_optimizer": "never",
    "model.init_scale": 0.1,
    "model.dropout": 0.1,
    "data.num_clients": 3,
    "data.missing_rate": 0.3,
}
SCENARIOS: dict[str, dict[str, Any]] = {
    "local": {"federation.strategy": "local", "model.imputer": "zero", "model.fusion": "none"},
    "fede-zero": {"federation.strategy": "fede", "model.imputer": "zero"},
    "mmfed3-diffusion": {"federation.strategy": "mmfed3", "model.imputer": "diffusion"},
}


def play(name: str) -> dict[str, Any]:
    """Run a scenario; returns loss and validation MRR of each round, and the last round's test MRR."""
    overrides = {**WEIGHTS, **SCENARIOS[name], "federation.num_rounds": NUM_ROUNDS}
    runtime = InProcessRuntime(small_experiment(overrides, tiny_graph(60, 6, 400)))
    config = small_config(overrides)
    rounds = []
    for round_num in range(1, NUM_ROUNDS + 1):
        result = runtime.train(round_num, sample_cohort(config, list(runtime.clients), round_num))
        found = runtime.evaluate("valid", round_num, choose=True)
        losses = [report.losses["total"] for report in result.reports]
        mrr = weighted_mean([item.metrics for item in found]).mrr
        rounds.append({"loss": sum(losses) / len(losses), "valid_mrr": mrr})
    test = weighted_mean([item.metrics for item in runtime.evaluate("test", NUM_ROUNDS, choose=False)])
    return {"rounds": rounds, "test_mrr": test.mrr}
