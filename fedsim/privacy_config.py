"""The section of the config about what the server may see of a single client."""

from typing import Annotated

from pydantic import Field

from fedsim.config_types import Section


class SecureAggregationConfig(Section):
    """Secure aggregation: the server learns sums of updates alone (docs/security.md)."""

    enabled: bool = Field(False, description="clients send masked updates, of which the server learns the sum alone")
    threshold: Annotated[float, Field(gt=0.5, le=1)] = Field(
        0.6, description="share of the cohort that must take part to the end; with fewer nothing is unmasked"
    )
    hide_ownership: bool = Field(
        False, description="clients send masked rows of all entities, so that the server sees counts of owners alone"
    )
