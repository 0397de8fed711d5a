"""Who takes part in each round, simulated: availability, speed, a deadline and over-selection on a virtual clock.

Nothing here waits or measures. The whole schedule is a pure function of config, seed and client sizes, known before
the run starts, so every runtime and a resumed run see the same. A client that would be late is not trained: its
result would be thrown away, and its state stays as that of a client that did not take part.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fedsim.config import Config
from fedsim.errors import ConfigError, RunError
from fedsim.federated.message_sizes import MessageSizes
from fedsim.federated.runtime import Experiment, make_strategy
from fedsim.federated.trace_file import TraceRow, read_trace
from fedsim.federation_config import FederationConfig, ParticipationConfig
from fedsim.randomness import numpy_generator

Floats: TypeAlias = npt.NDArray[np.float64]
Flags: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ClientWork:
    """What a client's round costs (eq. 15).

    Attributes:
        num_steps: of local training.
        num_bytes: predicted, of its messages up and down, int64 [num_rounds].
    """

    num_steps: int
    num_bytes: npt.NDArray[np.int64]


@dataclass(frozen=True)
class RoundPlan:
    """One round as it will happen.

    Attributes:
        round_num: the round, from 1.
        cohort: clients that train, sorted; none if the round is skipped.
        num_available: clients that are up.
        num_selected: clients asked to train, `over_selection` times the cohort.
        late: selected clients that miss the deadline.
        dropped: those in time whose result is not used: the cohort was full, or the round is skipped.
        virtual_seconds: of the round.
        total_seconds: virtual seconds of the run up to the end of this round.
    """

    round_num: int
    cohort: list[int]
    num_available: int
    num_selected: int
    late: list[int]
    dropped: list[int]
    virtual_seconds: float
    total_seconds: float


class Schedule:
    """All rounds of a run.

    Args:
        config: the experiment.
        work: client -> what its round costs.

    Raises:
        ConfigError: if the trace cannot be read, or `min_clients` is more than a cohort.
        DataError: naming the line of the trace that cannot be used.
        RunError: if a round has fewer clients than `min_clients` (unless such rounds are skipped), or all rounds are
            skipped.
    """

    def __init__(self, config: Config, work: Mapping[int, ClientWork]) -> None:
        settings, num_rounds = config.participation, config.federation.num_rounds
        self.clients = sorted(work)
        self.size = cohort_size(config.federation, len(self.clients))
        if settings.min_clients > self.size:
            raise ConfigError(
                f"config field 'participation.min_clients' = {settings.min_clients}, but a cohort has {self.size} "
                f"client(s); lower it, or raise federation.cohort_size"
            )
        trace = {} if settings.trace_file is None else read_trace(Path(settings.trace_file), self.clients)
        available = draw_availability(settings, config.seed, self.clients, num_rounds)
        slowness = draw_slowness(settings, config.seed, self.clients, num_rounds)
        _apply_trace(trace, self.clients, available, slowness)
        steps = np.array([work[client].num_steps for client in self.clients], dtype=np.float64)
        seconds = settings.seconds_per_step * steps[:, None] * slowness  # [num_clients, num_rounds]
        if settings.bytes_per_second is not None:
            seconds += np.stack([work[client].num_bytes for client in self.clients]) / settings.bytes_per_second
        self.rounds: list[RoundPlan] = []
        total = 0.0
        for index in range(num_rounds):
            plan = self._plan(config, index + 1, available[:, index], seconds[:, index], total)
            total = plan.total_seconds
            self.rounds.append(plan)
        if not any(plan.cohort for plan in self.rounds):
            raise RunError(f"participation leaves no round to train: {self._shortage(config, self.rounds[0])}")

    def plan(self, round_num: int) -> RoundPlan:
        """Return a round, from 1."""
        return self.rounds[round_num - 1]

    def _plan(self, config: Config, round_num: int, available: Flags, seconds: Floats, before: float) -> RoundPlan:
        """Select among those who are up, and keep the first ones in time."""
        settings = config.participation
        pool = np.flatnonzero(available)
        wanted = math.ceil(round(settings.over_selection * self.size, 9))
        generator = numpy_generator(config.seed, "cohort", round_num=round_num)
        picked = pool[generator.choice(len(pool), min(wanted, len(pool)), replace=False)] if len(pool) else pool
        arrivals = sorted((float(seconds[index]), self.clients[index]) for index in picked)
        deadline = math.inf if settings.deadline_seconds is None else settings.deadline_seconds
        in_time = [(at, client) for at, client in arrivals if at <= deadline]
        cohort = sorted(client for _, client in in_time[: self.size])
        late = sorted(client for at, client in arrivals if at > deadline)
        dropped = sorted(client for _, client in in_time[self.size :])
        # The server goes on when the cohort is full or nobody is left to wait for, at the latest at the deadline.
        last = max((at for at, _ in in_time[: self.size]), default=0.0)
        waited = deadline if late and len(cohort) < self.size else last
        plan = RoundPlan(round_num, cohort, len(pool), len(picked), late, dropped, waited, before + waited)
        if len(cohort) >= settings.min_clients:
            return plan
        if settings.too_few == "stop":
            raise RunError(f"round {round_num}: {self._shortage(config, plan)}, or set participation.too_few to skip")
        return RoundPlan(round_num, [], len(pool), len(picked), late, sorted(cohort + dropped), waited, before + waited)

    def _shortage(self, config: Config, plan: RoundPlan) -> str:
        settings = config.participation
        missed = f", {len(plan.late)} later than participation.deadline_seconds {settings.deadline_seconds}"
        num_in_time = plan.num_selected - len(plan.late)
        return (
            f"{num_in_time} client(s) would take part ({plan.num_available} of {len(self.clients)} available, "
            f"{plan.num_selected} selected{missed if plan.late else ''}), fewer than participation.min_clients "
            f"{settings.min_clients}; raise the deadline, the availability or participation.over_selection, "
            f"or lower min_clients"
        )


def make_schedule(experiment: Experiment) -> Schedule | None:
    """Plan all rounds of an experiment; None if the config's `participation` is as by default.

    Raises:
        FedSimError: see `Schedule`; also ConfigError with central training, which has no clients to wait for.
    """
    config = experiment.config
    if config.participation == ParticipationConfig():
        return None
    strategy = make_strategy(config)
    if strategy.together:
        raise ConfigError(
            f"config section 'participation' simulates clients, and federation.strategy "
            f"'{config.federation.strategy}' puts all data at one; leave the section at its defaults"
        )
    sizes = MessageSizes(config, strategy, experiment.feature_dims)
    work = {}
    for data in experiment.clients:
        steps = config.training.local_epochs * math.ceil(len(data.train) / config.training.batch_size)
        work[data.client] = ClientWork(steps, sizes.per_round(data))
    return Schedule(config, work)


def cohort_size(federation: FederationConfig, num_clients: int) -> int:
    """Return how many clients a round trains."""
    return min(federation.cohort_size or max(1, round(federation.cohort_fraction * num_clients)), num_clients)


def draw_availability(
    settings: ParticipationConfig, seed: int, clients: list[int], num_rounds: int
) -> npt.NDArray[np.bool_]:
    """Draw who is up when, bool [num_clients, num_rounds]: a two-state Markov chain per client.

    In the long run a client is up in a share `availability` of the rounds, and an outage lasts `mean_outage_rounds` on
    average; without it each round is drawn on its own. More rounds do not change the earlier ones.
    """
    share = settings.availability
    draws = np.stack(
        [numpy_generator(seed, "availability", client=client).random(num_rounds) for client in clients]
    )  # [num_clients, num_rounds]
    if settings.mean_outage_rounds is None:
        return draws < share
    come_up = 1 / settings.mean_outage_rounds
    stay_up = 1 - (1 - share) / share * come_up
    up = np.empty(draws.shape, dtype=np.bool_)
    up[:, 0] = draws[:, 0] < share
    for index in range(1, num_rounds):
        up[:, index] = draws[:, index] < np.where(up[:, index - 1], stay_up, come_up)
    return up


def draw_slowness(settings: ParticipationConfig, seed: int, clients: list[int], num_rounds: int) -> Floats:
    """Draw the factor on each client's computation, [num_clients, num_rounds]: lognormal with median 1.

    `slowness_spread` is the standard deviation of the logarithm between clients, `slowness_jitter` that between the
    rounds of one client.
    """
    spread, jitter = settings.slowness_spread, settings.slowness_jitter
    rows = []
    for client in clients:
        own = numpy_generator(seed, "slowness", client=client).standard_normal()
        each = numpy_generator(seed, "slowness/jitter", client=client).standard_normal(num_rounds)
        rows.append(np.exp(spread * own + jitter * each))
    return np.stack(rows)


def _apply_trace(trace: Mapping[int, list[TraceRow]], clients: list[int], available: Flags, slowness: Floats) -> None:
    """Let each row of a trace hold from its round until the client's next one; [num_clients, num_rounds], in place."""
    for index, client in enumerate(clients):
        for row in trace.get(client, []):
            available[index, row.round_num - 1 :] = row.available
            if row.speed is not None:
                slowness[index, row.round_num - 1 :] = 1 / row.speed
