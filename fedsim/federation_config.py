"""The sections of the config about the federation: who takes part, what is distilled, what crosses the network."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedsim.config_types import Count, Positive, Section, Weight


class FederationConfig(Section):
    """Who takes part and how results are combined (method.md sections 5 and 6)."""

    strategy: str = Field("mmfed3", description="local, central, fede, fedprox, fedec, fedlu, fedr, pfedeg or mmfed3")
    num_rounds: Count = Field(15, description="federation rounds")
    cohort_fraction: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="share of clients sampled per round")
    cohort_size: Count | None = Field(None, description="number of clients sampled per round; null uses the fraction")
    aggregator: str = Field(
        "mean", description="mean, norm_clipping, median, trimmed_mean, krum, multi_krum or bulyan; see robustness"
    )
    max_failed_clients: Annotated[int, Field(ge=0)] = Field(
        0, description="clients of a round that may fail, or be rejected; with more the run stops and names them"
    )
    proximal_mu: Weight = Field(0.01, description="fedprox: mu of the pull to the model that the server sent")
    contrastive_weight: Weight = Field(0.1, description="fedec: weight of the contrastive term")
    contrastive_temperature: Positive = Field(0.2, description="fedec: temperature of the contrastive term")
    affinity_temperature: Positive = Field(0.2, description="pfedeg: large mixes all clients alike, small the likest")


class ParticipationConfig(Section):
    """Availability, stragglers and a virtual clock, simulated; the defaults simulate nothing (method.md section 6)."""

    availability: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of the rounds in which a client is available"
    )
    mean_outage_rounds: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = Field(
        None, description="rounds that a client stays away, on average; null draws each round on its own"
    )
    trace_file: str | None = Field(
        None, description="csv with client,round,available[,speed]; a row holds until the client's next one"
    )
    slowness_spread: Weight = Field(
        0.0, description="how unlike clients' speeds are: standard deviation of log slowness; 0 makes them alike"
    )
    slowness_jitter: Weight = Field(0.0, description="the same between the rounds of one client")
    seconds_per_step: Weight = Field(0.05, description="virtual seconds of a training step at a client of normal speed")
    bytes_per_second: Positive | None = Field(
        None, description="a client's bandwidth, per virtual second; null lets messages take no time"
    )
    deadline_seconds: Positive | None = Field(
        None, description="virtual seconds after which a round closes; later clients are left out; null waits for all"
    )
    over_selection: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        1.0, description="clients asked per cohort member; the first ones in virtual time are kept"
    )
    min_clients: Count = Field(1, description="fewest clients that make a round")
    too_few: Literal["stop", "skip"] = Field(
        "stop", description="what becomes of a round with fewer: the run is refused before it starts, or goes on"
    )

    @model_validator(mode="after")
    def _one_source_of_availability(self) -> "ParticipationConfig":
        if self.trace_file is not None and (self.availability < 1 or self.mean_outage_rounds is not None):
            raise ValueError(
                "participation.trace_file says who is available, and so do availability and mean_outage_rounds: "
                "leave these at their defaults, or trace_file out"
            )
        if self.mean_outage_rounds is not None:
            shortest = (1 - self.availability) / self.availability
            if self.availability == 1 or self.mean_outage_rounds < shortest:
                raise ValueError(
                    f"participation.mean_outage_rounds {self.mean_outage_rounds:g} does not go with availability "
                    f"{self.availability:g}: " + (f"give at least {shortest:.3g}" if shortest else "nobody is away")
                )
        return self


class WeightChange(Section):
    """Weights of eq. 9 and 10 that hold from a round on; null leaves a weight as it was."""

    from_round: Annotated[int, Field(ge=2)] = Field(description="first round with these weights")
    logit_to_client: Weight | None = Field(None, description="as distillation.logit_to_client")
    logit_to_global: Weight | None = Field(None, description="as distillation.logit_to_global")
    feature_to_client: Weight | None = Field(None, description="as distillation.feature_to_client")
    feature_to_global: Weight | None = Field(None, description="as distillation.feature_to_global")


class DistillationConfig(Section):
    """MMFeD3: dual distillation, each term switched off by weight 0 (method.md section 5)."""

    temperature: Positive = Field(2.0, description="tau of eq. 9 and 13")
    logit_to_client: Weight = Field(2.0, description="eq. 9, global copy teaches the private model")
    logit_to_global: Weight = Field(2.0, description="eq. 9, private model teaches the global copy")
    feature_to_client: Weight = Field(0.1, description="eq. 10, tokens of the private model follow the global copy")
    feature_to_global: Weight = Field(0.1, description="eq. 10, tokens of the global copy follow the private model")
    prototype: Weight = Field(0.1, description="eq. 10, imputed tokens follow the server's prototypes")
    send_prototypes: bool = Field(
        True, description="clients send projected tokens, the server sends prototypes, eq. 11"
    )
    warmup_rounds: Annotated[int, Field(ge=0)] = Field(
        2, description="rounds before the terms of eq. 9 and L_feat of eq. 10 switch on"
    )
    schedule: tuple[WeightChange, ...] = Field(
        (), description="changes of the four weights of eq. 9 and 10, as population based training finds them"
    )
    num_soft_queries: Annotated[int, Field(ge=0)] = Field(64, description="soft queries a client sends; 0 sends none")
    num_candidates: Annotated[int, Field(ge=2)] = Field(32, description="candidates per soft query")
    server_steps: Annotated[int, Field(ge=0)] = Field(20, description="server distillation steps per round")
    server_learning_rate: Positive = Field(0.001, description="learning rate of the server's steps")
    server_batch_size: Count = Field(256, description="tuples or soft queries per server step")
    proximal: Weight = Field(1.0, description="mu of eq. 13")

    @model_validator(mode="after")
    def _schedule_in_order(self) -> "DistillationConfig":
        rounds = [change.from_round for change in self.schedule]
        if rounds != sorted(set(rounds)):
            raise ValueError(f"distillation.schedule has from_round {rounds}: each must be later than the one before")
        return self

    def at(self, round_num: int) -> "DistillationConfig":
        """Return the section with the weights that hold in a round."""
        changed: dict[str, float] = {}
        for change in self.schedule:
            if change.from_round <= round_num:
                changed |= change.model_dump(exclude={"from_round"}, exclude_none=True)
        return self.model_copy(update=changed) if changed else self

    def ever_positive(self, *weights: str) -> bool:
        """Tell whether one of these weights is above 0 in any round."""
        return any((getattr(part, name) or 0) > 0 for part in (self, *self.schedule) for name in weights)


class CommunicationConfig(Section):
    """What crosses between clients and server, and how precisely (method.md section 5)."""

    dtype: Literal["float32", "float16"] = Field(
        "float32", description="precision of all numbers sent, up and down; sums and models stay float32"
    )
    top_k: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="share of a client's rows sent, up and down, those that changed most; null sends all"
    )
    full_every: Count = Field(4, description="with top_k, every so many rounds all rows are sent, from round 1 on")
