"""An audit of the mechanism by canaries: a lower bound on epsilon from what an attacker can tell apart.

Method: Jagielski et al., "Auditing Differentially Private Machine Learning", NeurIPS 2020. The mechanism runs many
times, in half of them with a canary: a unit whose change has the full norm in a direction that the attacker knows.
The attacker guesses by the likelihood ratio of what it sees. An (epsilon, delta)-private mechanism allows no attack
with

    TPR > e^epsilon FPR + delta,   and none with   TNR > e^epsilon FNR + delta,

so measured rates bound epsilon from below; with Clopper-Pearson limits for both rates the bound holds with the given
confidence. The threshold is chosen on one half of the runs and judged on the other. A bound above the epsilon that is
stated shows a fault; one below it proves nothing but is what a sound mechanism gives.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import beta
from torch import Tensor

from fedsim.config import Config
from fedsim.dp_config import DifferentialPrivacyConfig
from fedsim.federated.aggregation import ModuleMean, RowMean
from fedsim.federated.messages import Broadcast, ClientUpdate
from fedsim.federated.strategy import GlobalModel
from fedsim.privacy.differential_privacy import noise_scales, noised_model, privatise

NUM_ROWS, DIM = 4, 4  # of a canary's message
LARGE = 1e3  # the size of a canary's change before it is clipped
NUM_THRESHOLDS = 200  # tried by the attacker

Floats = npt.NDArray[np.float64]


def epsilon_lower_bound(present: Floats, absent: Floats, delta: float, confidence: float = 0.95) -> float:
    """Return epsilon that the mechanism has at least, with that confidence, from the attacker's scores.

    Args:
        present: scores of runs with the canary, [num_runs].
        absent: scores of runs without it, [num_runs].
        delta: of the guarantee.
        confidence: that the bound is true.
    """
    tuning, judging = (present[::2], absent[::2]), (present[1::2], absent[1::2])
    thresholds = np.unique(np.quantile(np.concatenate(tuning), np.linspace(0, 1, NUM_THRESHOLDS)))
    candidates = [(float(threshold), flipped) for threshold in thresholds for flipped in (False, True)]
    # Chosen by the limits too, on the other half: point estimates would go for rates of zero.
    threshold, flipped = max(candidates, key=lambda item: _bound(*tuning, item[0], item[1], delta, confidence))
    return max(_bound(*judging, threshold, flipped, delta, confidence), 0.0)


def _bound(present: Floats, absent: Floats, threshold: float, flipped: bool, delta: float, confidence: float) -> float:
    """Bound epsilon from the guesses by one threshold; flipped counts what is below it."""
    right, wrong = (absent < threshold, present < threshold) if flipped else (present >= threshold, absent >= threshold)
    tail = (1 - confidence) / 2  # for each of the two rates
    hits, misses = int(right.sum()), int(wrong.sum())
    lower = beta.ppf(tail, hits, len(right) - hits + 1) if hits else 0.0
    upper = beta.ppf(1 - tail, misses + 1, len(wrong) - misses) if misses < len(wrong) else 1.0
    return float(np.log((lower - delta) / upper)) if lower > delta else -np.inf


def client_scores(
    settings: DifferentialPrivacyConfig, num_runs: int, generator: torch.Generator, *, present: bool
) -> Floats:
    """Score runs of the noise at a client; one run is one message, or one row of it if that is the unit."""
    scores: list[Tensor] = []
    while sum(map(len, scores)) < num_runs:
        num_rows = NUM_ROWS if settings.unit == "client" else num_runs
        update, received = _canary(num_rows, present)
        sent = privatise(update, received, settings, generator)
        row_scale, module_scale = noise_scales(settings, update)
        seen = (sent.entity - received.entity).sum(1) / DIM**0.5 * settings.clip_norm / row_scale**2
        if settings.unit == "client":
            module = (sent.modules["weight"] - received.modules["weight"]).sum() / DIM**0.5
            of_module = module * settings.module_clip_norm / module_scale**2
            # The canary's rows share the bound: each moves by clip_norm / sqrt(num_rows).
            seen = (seen.sum() / num_rows**0.5 + of_module).unsqueeze(0)
        scores.append(seen)
    return torch.cat(scores)[:num_runs].double().numpy()


def server_scores(config: Config, num_runs: int, generator: torch.Generator, *, present: bool) -> Floats:
    """Score runs of the noise at the server, where the canary takes part by Poisson sampling."""
    settings, rate = config.privacy, config.federation.cohort_fraction
    scores = []
    for _ in range(num_runs):
        update, received = _canary(NUM_ROWS, present=True)
        rows, modules = RowMean(NUM_ROWS, DIM), ModuleMean()
        if present and float(torch.rand((), generator=generator)) < rate:
            clipped = privatise(update, received, settings, generator)
            rows.add(clipped.entity_ids, clipped.entity)
            modules.add(clipped.modules, 1.0)
        old = GlobalModel(received.entity, received.modules, None)
        entity, moved = noised_model(config, rows, modules, old, {0: update.entity_ids}, generator)
        row_scale, module_scale = noise_scales(settings, old)
        seen = (entity - received.entity).sum() / (NUM_ROWS * DIM) ** 0.5 * settings.clip_norm / row_scale**2
        module = (moved["weight"] - received.modules["weight"]).sum() / DIM**0.5
        scores.append(float(seen + module * settings.module_clip_norm / module_scale**2))
    return np.array(scores)


def _canary(num_rows: int, present: bool) -> tuple[ClientUpdate, Broadcast]:
    """Make a message whose change has one direction and is clipped to the full norm, or is none at all."""
    entity, weight = torch.zeros(num_rows, DIM), torch.zeros(DIM)
    received = Broadcast(1, entity, {"weight": weight}, None)
    update = ClientUpdate(0, 1, 1, torch.arange(num_rows), entity, {"weight": weight}, None, None, None)
    if not present:
        return update, received
    return replace(update, entity=entity + LARGE, modules={"weight": weight + LARGE}), received
