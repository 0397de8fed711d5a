"""The config sections about attackers: what the server does against them, and the ones that a run simulates."""

from typing import Annotated

from pydantic import Field

from fedsim.config_types import Positive, Rate, Section


class RobustnessConfig(Section):
    """What the server does against updates that are meant to harm (method.md section 5)."""

    attacker_share: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.2, description="share of a row's senders taken for attackers by trimmed_mean, krum, multi_krum and bulyan"
    )
    clip_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        1.0, description="norm_clipping: longest change of a row, in units of the median change of its senders"
    )
    max_norm_ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = Field(
        None, description="reject an update that changes so many times as much as the cohort's median; null: no bound"
    )


class AdversaryConfig(Section):
    """Clients that attack the federation, simulated; by default nobody does (method.md section 5)."""

    attack: str | None = Field(
        None, description="sign_flip, boost, noise, tail_flip, alie, inner_product or free_rider; null: nobody attacks"
    )
    share: Rate = Field(0.2, description="share of the clients that attack, drawn by the seed")
    clients: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="the clients that attack; null draws a share"
    )
    strength: Positive | None = Field(None, description="how strongly, see the attack; null takes the attack's own")
