"""Constants of a round at a client, for the terms of its strategy; see `Strategy.anchors`."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedsim.models.parameters import Params, select_view, with_prefix


class Anchors:
    """Makes the constants that a strategy asks for, and keeps what the next round needs; nothing without any.

    Args:
        kinds: ``received``, ``previous``.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self.kinds = kinds
        self.previous: Tensor | None = None  # the client's rows after its last training, [num_entities, dim]

    def begin_round(self, params: Mapping[str, Tensor]) -> Params:
        """Return the round's constants; `params` are the client's, as the server's model has just set them."""
        constants: Params = {}
        if "received" in self.kinds:
            own = select_view(params, "global")
            constants |= with_prefix({name: value.clone() for name, value in own.items()}, "received")
        if "previous" in self.kinds:
            previous = params["global/entity"].clone() if self.previous is None else self.previous
            constants["previous/entity"] = previous
        return constants

    def end_round(self, params: Mapping[str, Tensor]) -> None:
        """Keep what the next round needs of the trained parameters."""
        if "previous" in self.kinds:
            self.previous = params["global/entity"].clone()

    def state(self) -> Params:
        """Return what must be kept between rounds."""
        return {} if self.previous is None else {"previous": self.previous}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.previous = state.get("previous")
