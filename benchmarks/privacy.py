"""What a federation leaks, with and without differential privacy, what it costs, and an audit of the mechanism.

    python benchmarks/privacy.py
    python benchmarks/privacy.py --data path/to/cn_visual --rounds 15 --markdown privacy.md

Attacks (docs/privacy.md): an honest-but-curious server looks at the rows that each client sends (the view `server`), or
a curious client at the server's rows (the view `client`), and asks which triples a client trained on, which relation
links two of its entities, and whether any does. Every setting runs the same unimodal FedE from the same seed, in this
process. The noise is the least that keeps epsilon within the number of the row over all rounds. Clip norms are the
medians of the changes of the run without noise; that they come from the data is not accounted for.

The audit plants canaries and bounds epsilon from below; a bound above the stated epsilon would show a fault.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tables import Sheet

from fedsim.config import Config, make_config
from fedsim.dp_config import DifferentialPrivacyConfig
from fedsim.evaluation.ranking import weighted_mean
from fedsim.federated.runtime import Experiment, InProcessRuntime, prepare
from fedsim.privacy.accounting import epsilon_of
from fedsim.privacy.attacks.canary import client_scores, epsilon_lower_bound, server_scores
from fedsim.privacy.attacks.membership import infer_membership, known_triples
from fedsim.privacy.attacks.observation import Observation, Records, watched_runtime
from fedsim.privacy.attacks.relation_reconstruction import reconstruct_relations, told_by_client, told_by_triples
from fedsim.randomness import numpy_generator
from fedsim.simulation import sample_cohort

DELTA = 1e-5
KNOWN_SHARE = 0.1  # of a client's training triples, known to the attacker by membership
AUDITED = (0.5, 1.0, 3.0)  # noise multipliers
Z_RANGE = (1e-3, 1e5)


@dataclass(frozen=True)
class Setting:
    """Who adds noise about what, and the epsilon that it may cost; None for a run without noise."""

    noise: str
    unit: str
    epsilon: float | None

    @property
    def view(self) -> str:
        """Who attacks: the noise at a server protects against all but the server."""
        return "client" if self.noise in ("server", "none (client)") else "server"


def least_noise(epsilon: float, num_rounds: int) -> float:
    """Find the noise multiplier that spends an epsilon in so many rounds with everybody."""
    low, high = Z_RANGE
    for _ in range(80):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if epsilon_of(middle, 1.0, num_rounds, DELTA) <= epsilon else (middle, high)
    return high


def median_changes(records: Records) -> dict[str, float]:
    """Return the median norm of the change of all rows of a client, and of a single row."""
    changes = [seen.after - seen.before for rounds in records.by_server.values() for seen in rounds]
    return {
        "client": float(torch.stack([change.norm() for change in changes]).median()),
        "entity": float(torch.cat([change.norm(dim=1) for change in changes]).median()),
    }


def play(experiment: Experiment) -> tuple[InProcessRuntime, Records, float]:
    """Run the rounds, watched; returns the test MRR of the last one's models too."""
    runtime, records = watched_runtime(experiment)
    num_rounds = experiment.config.federation.num_rounds
    for round_num in range(1, num_rounds + 1):
        runtime.train(round_num, sample_cohort(experiment.config, list(runtime.clients), round_num))
    tests = runtime.evaluate("test", num_rounds, choose=False)
    return runtime, records, weighted_mean([item.metrics for item in tests]).mrr


def attack(experiment: Experiment, runtime: InProcessRuntime, records: Records, view: str) -> list[float]:
    """Attack every client; returns means over clients, in the order of `COLUMNS`."""
    scorer = experiment.config.model.scorer
    clients = list(runtime.clients)
    rows = []
    for place, number in enumerate(clients):
        target, colluding = runtime.clients[number], runtime.clients[clients[(place + 1) % len(clients)]]
        seen: Sequence[Observation] = records.by_server[number]
        if view == "client":
            ids = target.shared_ids
            seen = [Observation(item.round_num, item.before[ids], item.after[ids]) for item in records.by_clients]
        draws = numpy_generator(0, "attack", client=number)
        known, rest = known_triples(target.data, KNOWN_SHARE, draws)
        member = infer_membership(scorer, seen, target.data, known, rest)
        values = [value for quality in member.values() for value in (quality.auc, quality.tpr)]
        last, table = seen[-1].after, colluding.values.params["relation"][0]
        for references in (
            told_by_triples(scorer, last, known),
            told_by_client(target.data, colluding.data, table),
        ):
            found = reconstruct_relations(scorer, last, target.data, rest, references, draws)
            values += [found.links.auc, found.links.tpr, found.accuracy, found.majority]
        rows.append(values)
    return [float(value) for value in np.mean(rows, axis=0)]


SCORES = ("affinity", "movement", "fitted")
WHAT = ("AUC", "TPR")
COLUMNS = tuple(f"{score} {what}" for score in SCORES for what in WHAT)
COLUMNS += tuple(
    f"{column}, {source}" for source in ("triples", "client") for column in ("link AUC", "TPR", "named", "majority")
)


def settings_of(noises: Sequence[str], epsilons: Sequence[float]) -> Iterator[Setting]:
    """List what is run, first without noise."""
    yield Setting("none", "", None)
    yield Setting("none (client)", "", None)
    for noise in noises:
        for unit in ("entity", "client"):
            for epsilon in epsilons:
                yield Setting(noise, unit, epsilon)


def attack_tables(base: Callable[..., Config], settings: Sequence[Setting], sheet: Sheet) -> None:
    """Run all settings and print what the attacks find, and the test MRR that is left."""
    plain: tuple[Experiment, InProcessRuntime, Records, float] | None = None
    bounds: dict[str, float] = {}
    rows = []
    for setting in settings:
        if setting.epsilon is None:
            if plain is None:
                experiment = prepare(base())
                plain = (experiment, *play(experiment))
                bounds = median_changes(plain[2])
                known = ", ".join(f"{name} {value:.3g}" for name, value in bounds.items())
                sheet.say(f"Clip norms, medians of the changes of rows without noise: {known}.")
            experiment, runtime, records, mrr = plain
            cells = ["", ""]
        else:
            noise_multiplier = least_noise(setting.epsilon, base().federation.num_rounds)
            changes = {"noise": setting.noise, "unit": setting.unit, "clip_norm": bounds[setting.unit]}
            changes |= {"noise_multiplier": noise_multiplier, "delta": DELTA}
            experiment = prepare(base(**{f"privacy.{name}": value for name, value in changes.items()}))
            runtime, records, mrr = play(experiment)
            cells = [f"{setting.epsilon:g}", f"{noise_multiplier:.3g}"]
        found = attack(experiment, runtime, records, setting.view)
        name = f"{setting.noise.split()[0]} {setting.unit}".strip()
        rows.append([f"{name}, seen by a {setting.view}", *cells, f"{mrr:.4f}", *(f"{value:.3f}" for value in found)])
        sheet.progress(" | ".join(rows[-1]))
    front, split = ("noise", "epsilon", "z", "test MRR"), 4 + 2 * len(SCORES)
    scorer = base().model.scorer
    sheet.table(
        f"Membership with {scorer}: AUC, and TPR at 1 % FPR (a guess: 0.5 and 0.01), means over clients",
        (*front, *COLUMNS[: 2 * len(SCORES)]),
        [row[:split] for row in rows],
    )
    sheet.table(
        f"Relations with {scorer}, references from {KNOWN_SHARE:.0%} known triples or a colluding client",
        (*front, *COLUMNS[2 * len(SCORES) :]),
        [[*row[:4], *row[split:]] for row in rows],
    )


def audit_table(num_runs: int, sheet: Sheet) -> None:
    """Print lower bounds on epsilon of one round beside what is stated."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    for noise_multiplier in AUDITED:
        cases: dict[str, tuple[float, Callable[[bool], Any]]] = {}
        for unit, runs in (("client", num_runs), ("entity", 20 * num_runs)):
            chosen = DifferentialPrivacyConfig(noise="client", unit=unit, noise_multiplier=noise_multiplier)  # type: ignore[arg-type]
            cases[f"at the client, per {unit}"] = (
                1.0,
                lambda there, chosen=chosen, runs=runs: client_scores(chosen, runs, generator, present=there),  # type: ignore[misc]
            )
        for rate in (1.0, 0.3):
            paths = {"privacy.noise": "server", "privacy.noise_multiplier": noise_multiplier}
            config = make_config({}, {**paths, "federation.cohort_fraction": rate})
            cases[f"at the server, per client, rate {rate:g}"] = (
                rate,
                lambda there, config=config: server_scores(config, num_runs, generator, present=there),  # type: ignore[misc]
            )
        for name, (rate, scores) in cases.items():
            stated = epsilon_of(noise_multiplier, rate, 1, DELTA)
            present, absent = scores(True), scores(False)
            found = epsilon_lower_bound(present, absent, DELTA)
            verdict = "below" if found < stated else "ABOVE: A FAULT"
            rows.append([name, f"{noise_multiplier:g}", f"{len(present):,}", f"{stated:.3f}", f"{found:.3f}", verdict])
            sheet.progress(" | ".join(rows[-1]))
    columns = ("noise", "z", "runs each", "stated epsilon", "bound from below, 95 %", "")
    sheet.table(f"Canary audit of one round, delta {DELTA:g}", columns, rows)


@click.command()
@click.option("--data", default="wn_noto", show_default=True, help="data set, as data.path")
@click.option("--clients", default=5, show_default=True)
@click.option("--alpha", default=1.0, show_default=True, help="of the dirichlet split")
@click.option("--rounds", default=10, show_default=True)
@click.option("--epochs", default=3, show_default=True, help="local epochs")
@click.option("--dim", default=64, show_default=True)
@click.option("--scorer", "scorers", multiple=True, default=("complex", "transe_l2"), show_default=True)
@click.option("--epsilon", "epsilons", multiple=True, type=float, default=(1000.0, 100.0, 10.0), show_default=True)
@click.option("--noise", "noises", multiple=True, type=click.Choice(["client", "server"]), default=("client", "server"))
@click.option("--audit-runs", default=2000, show_default=True, help="with and without the canary; 0 leaves it out")
@click.option("--seed", default=0, show_default=True)
@click.option("--markdown", type=click.Path(path_type=Path), help="write the tables there too")
def main(
    data: str,
    clients: int,
    alpha: float,
    rounds: int,
    epochs: int,
    dim: int,
    scorers: tuple[str, ...],
    epsilons: tuple[float, ...],
    noises: tuple[str, ...],
    audit_runs: int,
    seed: int,
    markdown: Path | None,
) -> None:
    """Attack with and without noise, and audit the mechanism."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sheet = Sheet("Privacy", markdown)
    fixed: dict[str, Any] = {
        "seed": seed,
        "data.path": data,
        "data.num_clients": clients,
        "data.split": "dirichlet",
        "data.dirichlet_alpha": alpha,
        "data.modalities": [],
        "model.dim": dim,
        "model.fusion": "none",
        "model.imputer": "zero",
        "training.local_epochs": epochs,
        "training.reciprocal": False,
        "federation.strategy": "fede",
        "federation.num_rounds": rounds,
        "runtime.kind": "in_process",
    }
    for scorer in scorers:

        def base(scorer: str = scorer, **changes: Any) -> Config:
            return make_config({}, {**fixed, "model.scorer": scorer, **changes})

        attack_tables(base, list(settings_of(noises, epsilons)), sheet)
    if audit_runs:
        audit_table(audit_runs, sheet)
    sheet.close()


if __name__ == "__main__":
    main()
