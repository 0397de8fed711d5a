"""The config section about real faults: actors, nodes and clients that fail (docs/faults.md)."""

from typing import Annotated

from pydantic import Field

from fedsim.config_types import Count, Positive, Section


class FaultsConfig(Section):
    """What happens when an actor or a node dies, or a client fails; `participation` only simulates stragglers."""

    max_restarts: Annotated[int, Field(ge=0)] = Field(
        3, description="times that an actor is replaced, or the federation rolled back, between two checkpoints"
    )
    restart_seconds: Positive = Field(
        120.0, description="longest wait for a new actor to start; then the other actors take its clients"
    )
    round_deadline_seconds: Positive | None = Field(
        None, description="real seconds after which a round goes on without clients that still train; null: no limit"
    )
    min_clients: Count = Field(1, description="fewest clients whose updates make a round; with fewer the run stops")
