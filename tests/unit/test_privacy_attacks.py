"""Attacks on privacy: their formulas by hand, that they find what is there, and the audit of the mechanism."""

from typing import Any

import numpy as np
import pytest
import torch

from builders import tiny_graph
from experiments import all_values, generator, same_values, small_config, small_experiment, small_runtime
from fedsim.dp_config import DifferentialPrivacyConfig
from fedsim.errors import ConfigError, RunError
from fedsim.federated.runtime import Experiment
from fedsim.privacy.accounting import epsilon_of
from fedsim.privacy.attacks.canary import client_scores, epsilon_lower_bound, server_scores
from fedsim.privacy.attacks.membership import (
    affinity,
    fitted,
    infer_membership,
    known_triples,
    mean_estimates,
    movement,
)
from fedsim.privacy.attacks.observation import Observation, Records, watched_runtime
from fedsim.privacy.attacks.quality import attack_quality
from fedsim.privacy.attacks.relation_estimate import ESTIMATES, estimate_relation, score_pairs
from fedsim.privacy.attacks.relation_reconstruction import (
    name_relations,
    reconstruct_relations,
    told_by_client,
    told_by_triples,
    unlinked_pairs,
)
from fedsim.randomness import numpy_generator

DELTA = 1e-5
TRAINED: dict[str, Any] = {
    "federation.strategy": "fede",
    "model.imputer": "zero",
    "model.fusion": "none",
    "model.dim": 16,
    "data.modalities": [],
    "data.split": "dirichlet",
    "data.dirichlet_alpha": 10.0,
    "training.reciprocal": False,
    "training.local_epochs": 20,
    "training.learning_rate": 0.05,
}


def test_quality_by_hand() -> None:
    """Members 3 and 1 against others 2 and 0: three of four pairs are in order; 3 alone is above all others."""
    found = attack_quality(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]))
    assert (found.auc, found.tpr) == (0.75, 0.5)


def test_translation_by_hand() -> None:
    """Known triples (0, r, 1) and (1, r, 2) at 0, 1 and 4 estimate r as (1 + 3) / 2 = 2, so (0, r, 1) is off by 1."""
    rows = torch.tensor([[0.0], [1.0], [4.0]])
    known = torch.tensor([[0, 0, 1], [1, 0, 2]])
    relations = mean_estimates("transe", rows, known)
    assert relations.tolist() == [[2.0]]
    seen = [Observation(1, torch.zeros(3, 1), rows)]
    assert fitted("transe", seen, known, known[:1]).tolist() == [-1.0]


def test_affinity_and_movement_by_hand() -> None:
    """Rows (1, 0) and (0, 1) are at a right angle; they moved alike in one round, against each other in the other."""
    last = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    step = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    against = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    seen = [Observation(1, last - step - against, last - against - step + step), Observation(2, last - against, last)]
    triples = torch.tensor([[0, 0, 1]])
    assert affinity(seen, triples).tolist() == [0.0]
    assert movement(seen, triples).tolist() == pytest.approx([0.0], abs=1e-6)
    assert movement(seen[:1], triples).tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("scorer", ESTIMATES)
def test_an_estimate_is_the_relation_that_its_pair_likes_best(scorer: str) -> None:
    """No other vector of the same length scores higher; with TransE the score is 0."""
    draws = generator(1)
    head, tail = torch.randn(2, 5, 8, generator=draws)
    estimate = estimate_relation(scorer, head, tail)
    best = score_pairs(scorer, head, estimate, tail)
    for _ in range(50):
        other = torch.randn(5, 8, generator=draws)
        other *= estimate.norm(dim=1, keepdim=True) / other.norm(dim=1, keepdim=True)
        assert bool((score_pairs(scorer, head, other, tail) < best + 1e-5).all())


def test_a_scorer_without_a_formula_is_refused() -> None:
    with pytest.raises(ConfigError, match="rotate"):
        estimate_relation("rotate", torch.zeros(1, 2), torch.zeros(1, 2))


def test_relations_are_named_where_rows_are_translations() -> None:
    draws = generator(2)
    known = torch.randn(3, 8, generator=draws)
    head = torch.randn(6, 8, generator=draws)
    truth = torch.tensor([0, 1, 2, 0, 1, 2])
    rows = torch.cat([head, head + known[truth]])
    pairs = torch.stack([torch.arange(6), torch.arange(6) + 6], 1)
    name, cosine = name_relations("transe", rows, pairs, known)
    assert name.tolist() == truth.tolist()
    assert torch.allclose(cosine, torch.ones(6), atol=1e-5)


def test_unlinked_pairs_are_not_linked() -> None:
    train = torch.from_numpy(tiny_graph().train)
    pairs = unlinked_pairs(train, 40, 100, numpy_generator(0, "pairs"))
    linked = {(int(h), int(t)) for h, _, t in train.tolist()}
    assert len(pairs) == 100
    assert not linked & {(h, t) for h, t in pairs.tolist()}


def _watch(num_rounds: int = 3, **changes: Any) -> tuple[Experiment, Records, Any]:
    experiment = small_experiment({**TRAINED, **changes}, tiny_graph(60, 4, 500))
    runtime, records = watched_runtime(experiment)
    for round_num in range(1, num_rounds + 1):
        runtime.train(round_num, list(runtime.clients))
    return experiment, records, runtime


def test_a_curious_server_changes_nothing_and_sees_each_round() -> None:
    _, records, runtime = _watch()
    plain = small_runtime(TRAINED, tiny_graph(60, 4, 500))
    for round_num in (1, 2, 3):
        plain.train(round_num, list(plain.clients))
    assert same_values(all_values(plain), all_values(runtime))
    assert [seen.round_num for seen in records.by_server[0]] == [1, 2, 3]
    assert torch.equal(records.by_clients[0].after, records.by_clients[1].before)
    ids = runtime.clients[0].shared_ids
    assert torch.equal(records.by_server[0][1].before, records.by_clients[0].after[ids])


def test_members_and_relations_show_without_noise_and_not_under_much() -> None:
    """A small model that overfits random triples; under noise at z = 100 the attacks are left with a guess.

    With the target's own relation embeddings as references all but all relations are named: the most that can leak.
    """
    auc, named, own = {}, {}, {}
    for noise in ("none", "client"):
        experiment, records, runtime = _watch(**{"privacy.noise": noise, "privacy.noise_multiplier": 100.0})
        data, seen = experiment.clients[0], records.by_server[0]
        known, rest = known_triples(data, 0.3, numpy_generator(0, "known"))
        found = infer_membership("complex", seen, data, known, rest)
        assert set(found) == {"affinity", "movement", "fitted"}
        auc[noise] = found["fitted"].auc
        table = runtime.clients[0].values.params["relation"][0]
        for references, kept in (
            (told_by_triples("complex", seen[-1].after, known), named),
            (told_by_client(data, data, table), own),
        ):
            draws = numpy_generator(0, "pairs")
            kept[noise] = reconstruct_relations("complex", seen[-1].after, data, rest, references, draws)
    assert auc["none"] > 0.9
    assert abs(auc["client"] - 0.5) < 0.2
    assert named["none"].accuracy > 0.8 > 0.5 > named["client"].accuracy
    assert named["none"].links.auc > 0.8 > 0.6 > named["client"].links.auc
    assert own["none"].accuracy > 0.95
    assert named["none"].majority < 0.5


def test_a_colluding_client_with_other_relations_is_refused() -> None:
    """The split by relations gives no relation to two clients."""
    experiment, _, runtime = _watch(0, **{"data.split": "relation"})
    with pytest.raises(RunError, match="no relation in common"):
        told_by_client(*experiment.clients, runtime.clients[1].values.params["relation"][0])


def test_the_lower_bound_by_hand() -> None:
    """Of 100 judged runs each all are told apart: the limits of 97.5 % are 0.0362 and 1 - 0.0362, so e^eps >= 26.6."""
    bound = epsilon_lower_bound(np.ones(200), np.zeros(200), DELTA)
    limit = 1 - 0.025 ** (1 / 100)
    assert bound == pytest.approx(np.log((1 - limit - DELTA) / limit))
    assert epsilon_lower_bound(np.zeros(200), np.zeros(200), DELTA) == 0


def _settings(unit: str, noise_multiplier: float) -> DifferentialPrivacyConfig:
    return DifferentialPrivacyConfig(noise="client", unit=unit, noise_multiplier=noise_multiplier)  # type: ignore[arg-type]


@pytest.mark.parametrize(("unit", "num_runs"), [("client", 1000), ("entity", 20_000)])
def test_canaries_stay_below_the_stated_epsilon_and_show_a_fault(unit: str, num_runs: int) -> None:
    """At z = 1.5 epsilon is 2.7; noise of a fifth, as a forgotten factor would leave, is found out."""
    stated = epsilon_of(1.5, 1.0, 1, DELTA)
    draws = generator(5)

    def audit(noise_multiplier: float) -> float:
        chosen = _settings(unit, noise_multiplier)
        present, absent = (client_scores(chosen, num_runs, draws, present=there) for there in (True, False))
        return epsilon_lower_bound(present, absent, DELTA)

    assert 0.3 < audit(1.5) < stated
    assert audit(0.3) > stated


def test_canaries_at_a_noisy_server_stay_below_epsilon_with_and_without_sampling() -> None:
    draws = generator(6)
    for rate in (1.0, 0.5):
        config = small_config(
            {
                "privacy.noise": "server",
                "privacy.noise_multiplier": 1.0,
                "federation.strategy": "fede",
                "federation.cohort_fraction": rate,
            }
        )
        present, absent = (server_scores(config, 800, draws, present=there) for there in (True, False))
        assert 0.1 < epsilon_lower_bound(present, absent, DELTA) < epsilon_of(1.0, rate, 1, DELTA)
