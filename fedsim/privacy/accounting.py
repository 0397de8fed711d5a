"""The privacy budget: epsilon after each round, and the last round that a budget allows (docs/privacy.md).

The mechanism of a round is a Gaussian one with the config's noise multiplier z (`fedsim.privacy.differential_privacy`).

- Noise at the clients: the server sees who takes part, so sampling amplifies nothing. What counts is how often the
  busiest client took part, k times: epsilon is that of one Gaussian mechanism with z / sqrt(k), in closed form (Balle
  and Wang, ICML 2018).
- Noise at the server: nobody but the server sees who takes part. Each client takes part in a round with probability q
  of its own (Poisson sampling), which amplifies: k rounds compose the subsampled Gaussian mechanism, numerically, by
  privacy loss distributions (Koskela et al., AISTATS 2020; Doroshenko et al., PETS 2022) whose error is on the safe
  side.

Both come from Google's dp-accounting. Neighbouring federations differ in one unit, which sends nothing but noise in one
of them. Epsilon is a function of config and cohorts alone, so it can be told before a run starts, and is the same after
a resume.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from fedsim.config import Config
from fedsim.dp_config import DifferentialPrivacyConfig
from fedsim.errors import ConfigError, RunError

DISCRETISATION = 5e-4  # of the privacy loss; smaller is tighter and slower


@dataclass(frozen=True)
class PrivacySpent:
    """What the rounds so far cost.

    Attributes:
        epsilon: of the config's delta.
        delta: the probability that epsilon leaves out.
        unit: what it is about, as in the config.
        noise: whose it is, as in the config.
        noise_multiplier: z.
    """

    epsilon: float
    delta: float
    unit: str
    noise: str
    noise_multiplier: float

    def as_json(self) -> dict[str, Any]:
        """Write it as JSON."""
        return asdict(self)

    def describe(self) -> str:
        """Say it in a line, with what it does not cover."""
        whom = "the server and all others" if self.noise == "client" else "all but the server"
        what = "all that a client sends" if self.unit == "client" else "one item of what a client sends"
        return (
            f"epsilon {self.epsilon:.4g} at delta {self.delta:g} for {what}, against {whom}; losses, metrics and the "
            f"clients' own models are not covered, and a seeded generator is for simulation"
        )


class PrivacyLedger:
    """What the rounds of a run cost.

    Args:
        settings: the config's section.
        releases: how often a unit's data went into a release, at most, up to the end of each round.
        sampling_rate: q of Poisson sampling that nobody sees; 1 if there is none.

    Raises:
        ConfigError: if the first release already exceeds the budget, or the library is not installed.
    """

    def __init__(self, settings: DifferentialPrivacyConfig, releases: Sequence[int], sampling_rate: float) -> None:
        self.settings, self.releases, self.sampling_rate = settings, list(releases), sampling_rate
        _library()
        self.last_round = self._find_last_round()

    def epsilon(self, round_num: int) -> float:
        """Return epsilon at the config's delta after a round, from 1; after round 0 it is 0."""
        if round_num == 0:
            return 0.0
        settings = self.settings
        return epsilon_of(settings.noise_multiplier, self.sampling_rate, self.releases[round_num - 1], settings.delta)

    def spent(self, round_num: int) -> PrivacySpent:
        """Return what the rounds up to this one cost."""
        settings = self.settings
        return PrivacySpent(
            self.epsilon(round_num), settings.delta, settings.unit, settings.noise, settings.noise_multiplier
        )

    def start_message(self) -> str:
        """Say what the run will have spent at its end."""
        return f"privacy: after {self.last_round} round(s) {self.spent(self.last_round).describe()}"

    def stop_message(self) -> str | None:
        """Say why the run ends early; None if it does not."""
        if self.last_round == len(self.releases):
            return None
        return (
            f"stopped after round {self.last_round} of {len(self.releases)}: one more would spend epsilon "
            f"{self.epsilon(self.last_round + 1):.4g}, beyond privacy.max_epsilon {self.settings.max_epsilon:g}"
        )

    def _find_last_round(self) -> int:
        """Find the last round within the budget by bisection: epsilon never falls."""
        budget, num_rounds = self.settings.max_epsilon, len(self.releases)
        if budget is None or self.epsilon(num_rounds) <= budget:
            return num_rounds
        within, beyond = 0, num_rounds
        while beyond - within > 1:
            middle = (within + beyond) // 2
            within, beyond = (middle, beyond) if self.epsilon(middle) <= budget else (within, middle)
        if within == 0:
            raise ConfigError(
                f"config field 'privacy.max_epsilon' = {budget:g}: round 1 alone spends {self.epsilon(1):.4g}; raise "
                f"it, or privacy.noise_multiplier above {self.settings.noise_multiplier:g}"
            )
        return within


def make_ledger(
    config: Config, clients: Sequence[int], cohort_of: Callable[[int], Sequence[int]]
) -> PrivacyLedger | None:
    """Make the ledger of a run; None without differential privacy.

    Args:
        config: the experiment.
        clients: all clients.
        cohort_of: round -> the clients that take part in it.
    """
    settings, num_rounds = config.privacy, config.federation.num_rounds
    if not settings.enabled:
        return None
    if settings.noise == "server":
        return PrivacyLedger(settings, range(1, num_rounds + 1), config.federation.cohort_fraction)
    counts = dict.fromkeys(clients, 0)
    releases = []
    for round_num in range(1, num_rounds + 1):
        for client in cohort_of(round_num):
            counts[client] += 1
        releases.append(max(counts.values()))
    return PrivacyLedger(settings, releases, 1.0)


def check_resumed(ledger: PrivacyLedger | None, round_num: int, before: Mapping[str, Any] | None, path: Path) -> None:
    """Hold what the rounds of a run cost so far to what its config says of them.

    Args:
        ledger: of the config.
        round_num: the last round that is done.
        before: what `PrivacySpent.as_json` made then; None without differential privacy.
        path: the run's folder.

    Raises:
        RunError: if the section privacy was changed since.
    """
    now = None if ledger is None else ledger.spent(round_num).as_json()
    if now is None or before is None:
        same = now is before
    else:
        same = now | {"epsilon": 0} == {**before, "epsilon": 0}
        same = same and math.isclose(now["epsilon"], before["epsilon"], rel_tol=1e-6)  # another machine may round
    if not same:
        raise RunError(
            f"{path}: its {round_num} round(s) cost {before}, by its config.yaml it would be {now}; put the section "
            f"privacy back as it was, or start the run anew"
        )


@cache
def epsilon_of(noise_multiplier: float, sampling_rate: float, num_releases: int, delta: float) -> float:
    """Return epsilon of a Gaussian mechanism that is used several times.

    Args:
        noise_multiplier: z, standard deviation over sensitivity.
        sampling_rate: q of Poisson sampling; 1 without.
        num_releases: how often.
        delta: the probability that epsilon leaves out.
    """
    library = _library()
    if num_releases == 0:
        return 0.0
    if sampling_rate == 1:
        return float(library.get_epsilon_gaussian(noise_multiplier / math.sqrt(num_releases), delta))
    accountant = library.pld.PLDAccountant(value_discretization_interval=DISCRETISATION)
    event = library.PoissonSampledDpEvent(sampling_rate, library.GaussianDpEvent(noise_multiplier))
    accountant.compose(event, num_releases)
    return float(accountant.get_epsilon(delta))


def _library() -> ModuleType:
    """Import the accountant, which takes a moment and is an extra."""
    try:
        import dp_accounting
    except ImportError as err:
        raise ConfigError(
            "config field 'privacy.noise' needs dp-accounting, which is not installed: pip install 'fedsim[privacy]', "
            "or set it to none"
        ) from err
    module: ModuleType = dp_accounting
    return module
