"""Small experiments in memory, for tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from builders import tiny_graph
from fedsim.config import Config, make_config
from fedsim.data.clients import build_clients, load_federated_split
from fedsim.data.dataset import KnowledgeGraph
from fedsim.federated.client import Client
from fedsim.federated.runtime import Experiment, InProcessRuntime, make_client, make_strategy
from fedsim.models.imputers import Imputation, Imputer, TokenTable
from fedsim.models.imputers.base import ImputerStep
from fedsim.models.parameters import Params

SMALL: dict[str, Any] = {
    "data.num_clients": 2,
    "model.dim": 8,
    "model.gate_hidden": 4,
    "model.dropout": 0.0,
    "diffusion.steps": 10,
    "diffusion.sampling_steps": 3,
    "diffusion.num_draws": 2,
    "diffusion.hidden": 16,
    "diffusion.num_blocks": 1,
    "diffusion.batch_size": 16,
    "diffusion.link_rows": 4,
    "training.batch_size": 32,
    "training.local_epochs": 1,
    "training.learning_rate": 0.01,
    "training.num_negatives": 4,
    "federation.num_rounds": 3,
    "distillation.warmup_rounds": 0,
    "distillation.num_soft_queries": 4,
    "distillation.num_candidates": 4,
    "distillation.server_steps": 2,
    "distillation.server_batch_size": 8,
    "runtime.kind": "in_process",
    "report.html": False,
}

COUPLINGS = ("logit_to_client", "logit_to_global", "feature_to_client", "feature_to_global")


def small_config(overrides: Mapping[str, Any] | None = None) -> Config:
    """Make a config whose runs take a moment; `overrides` are dotted paths."""
    return make_config({}, {**SMALL, **(overrides or {})})


def small_options(overrides: Mapping[str, Any] | None = None) -> list[str]:
    """Write the same config as options of the command line."""
    return [f"--{path}={value}" for path, value in {**SMALL, **(overrides or {})}.items()]


def small_experiment(overrides: Mapping[str, Any] | None = None, graph: KnowledgeGraph | None = None) -> Experiment:
    """Divide a graph among clients, as `fedsim.federated.runtime.prepare` does with one on disk."""
    config = small_config(overrides)
    graph = graph or tiny_graph()
    split = load_federated_split(graph, config)
    clients = build_clients(graph, split, config, together=make_strategy(config).together)
    feature_dims = {name: item.values.shape[1] for name, item in clients[0].features.items()}
    return Experiment(config, graph.name, graph.num_entities, feature_dims, clients, split.num_moved)


def small_runtime(overrides: Mapping[str, Any] | None = None, graph: KnowledgeGraph | None = None) -> InProcessRuntime:
    """Make clients, and a server that they have joined."""
    return InProcessRuntime(small_experiment(overrides, graph))


def small_client(overrides: Mapping[str, Any] | None = None, graph: KnowledgeGraph | None = None) -> Client:
    """Make the first client alone, not joined to a server."""
    experiment = small_experiment(overrides, graph)
    return make_client(experiment.clients[0], experiment.config, torch.device("cpu"))


def token_table(available: Sequence[Sequence[bool]] | torch.Tensor, dim: int = 8, seed: int = 0) -> TokenTable:
    """Make random tokens, zero where missing, without prototypes; `available` is [num_tokens, num_entities]."""
    mask = torch.as_tensor(available)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*mask.shape, dim, generator=generator) * mask.unsqueeze(-1)
    return TokenTable(values, mask)


def impute(imputer: Imputer, params: Params, tokens: TokenTable, draws: torch.Generator) -> Imputation:
    """Draw and impute."""
    return imputer.impute(params, tokens, imputer.draw_imputation(tokens.available, draws))


def impute_step(
    imputer: Imputer, params: Params, tokens: TokenTable, imputation: Imputation, draws: torch.Generator
) -> ImputerStep:
    """Draw and take an imputer's part of a training step, nothing hidden."""
    step_draws = imputer.draw_step(tokens.available, tokens.available, draws)
    return imputer.training_step(params, tokens, tokens, imputation, step_draws)


def generator(seed: int = 0) -> torch.Generator:
    """Make a torch generator."""
    return torch.Generator().manual_seed(seed)


def read_files(folder: Path) -> dict[str, bytes]:
    """Read all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def linear_graph(num_entities: int = 60, seed: int = 0) -> KnowledgeGraph:
    """Make a graph whose image features are a linear function of its text features, so that one tells the other."""
    graph = tiny_graph(num_entities, num_triples=300, seed=seed, modalities={"text": 6, "image": 6})
    draws = np.random.default_rng(seed)
    mix = draws.standard_normal((6, 6)).astype(np.float32)
    image = graph.features["image"]
    image.values[:] = graph.features["text"].values[image.entity] @ mix
    return graph


MIXED = {"data.split": "dirichlet", "data.dirichlet_alpha": 2.0, "data.num_clients": 3}  # relations are shared too


def strategy_runtime(strategy: str, **overrides: Any) -> InProcessRuntime:
    return small_runtime({"federation.strategy": strategy, "model.imputer": "zero", **MIXED, **overrides})


def all_values(runtime: InProcessRuntime) -> dict[str, Tensor]:
    """All state of clients and server."""
    state = {
        f"{number}/{name}": value
        for number, client in runtime.clients.items()
        for name, value in client.state().items()
    }
    assert runtime.server is not None
    return state | {f"server/{name}": value for name, value in runtime.server.state().items()}


def same_values(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def train_rounds(runtime: InProcessRuntime, num_rounds: int, start: int = 1) -> list[dict[str, float]]:
    losses = []
    for round_num in range(start, start + num_rounds):
        losses += [report.losses for report in runtime.train(round_num, list(runtime.clients)).reports]
    return losses
