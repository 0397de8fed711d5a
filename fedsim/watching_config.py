"""The config section of what is shown of a run while it goes on."""

from typing import Annotated

from pydantic import Field

from fedsim.config_types import Section


class WatchingConfig(Section):
    """What is shown of a run while it goes on (docs/watching.md)."""

    tensorboard: bool = Field(True, description="write event files for TensorBoard, in the run folder's tensorboard/")
    per_client_below: Annotated[int, Field(ge=0)] = Field(
        20, description="with fewer clients than this each has series of its own, in Ray's metrics and TensorBoard"
    )
