"""The config section of the imputers that HidE is compared with."""

from typing import Annotated, Literal

from pydantic import Field

from fedsim.config_types import Count, Positive, Section, Weight


class ImputerConfig(Section):
    """The imputers nearest, ridge, mlp, vae and gan; HidE has its own section (method.md section 3)."""

    num_neighbours: Count = Field(10, description="nearest: entities near in structure whose tokens are averaged")
    ridge_strength: Positive = Field(1000.0, description="ridge: weight of the squared coefficients")
    hidden: Count = Field(192, description="hidden width of the networks of mlp, vae and gan")
    latent: Count = Field(64, description="width of the vae's latent and of the gan's noise")
    num_draws: Count = Field(4, description="draws of vae and gan that are averaged; their deviation goes to the gate")
    batch_size: Count = Field(128, description="entities per step that train mlp, vae or gan")
    link_rows: Annotated[int, Field(ge=0)] = Field(
        32, description="missing entities per step whose estimate carries the link-prediction gradient (mlp, vae, gan)"
    )
    weight: Weight = Field(1.0, description="weight of the error of the recovered tokens (mlp, vae, gan)")
    kl_weight: Weight = Field(0.1, description="vae: beta, weight of the KL divergence to N(0, I)")
    adversarial_weight: Weight = Field(0.1, description="gan: weight of what the discriminator says to the generator")
    contrastive_weight: Weight = Field(0.1, description="gan: weight of the contrast of generated token and structure")
    impute_each: Literal["epoch", "round"] = Field("round", description="impute anew each local epoch, or once a round")
    hide_rate: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the available modality tokens that training hides, anew each epoch"
    )
