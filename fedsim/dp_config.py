"""The config section of differential privacy."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedsim.config_types import Positive, Section


class DifferentialPrivacyConfig(Section):
    """Differential privacy of what clients send (docs/privacy.md); off by default."""

    noise: Literal["none", "client", "server"] = Field(
        "none", description="who adds it: each client, against the server too; a trusted server, against all others"
    )
    unit: Literal["client", "entity"] = Field(
        "client", description="what epsilon is about: all that a client sends in a round, or one item of it"
    )
    noise_multiplier: Positive = Field(1.0, description="z, standard deviation of the noise over the clip norm")
    clip_norm: Positive = Field(1.0, description="bound on the change of a unit's rows, L2")
    module_clip_norm: Positive = Field(1.0, description="bound on the change of the shared modules, L2")
    query_clip_norm: Positive = Field(1.0, description="bound on a soft query's vector, L2")
    delta: Annotated[float, Field(gt=0, lt=0.1)] = Field(1e-5, description="delta; below one over the number of units")
    max_epsilon: Positive | None = Field(
        None, description="the run stops before a round that would exceed it; null only counts"
    )

    @model_validator(mode="after")
    def _budget_needs_noise(self) -> "DifferentialPrivacyConfig":
        if self.max_epsilon is not None and self.noise == "none":
            raise ValueError("privacy.max_epsilon is a bound on noise: set privacy.noise to client or server")
        return self

    @property
    def enabled(self) -> bool:
        """Whether anything is clipped and noised."""
        return self.noise != "none"
