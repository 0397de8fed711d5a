"""MMFeD3-HidE taken apart: the imputer, what is distilled and which way, and the steps of the diffusion.

*Levels*: nothing is distilled (`none`), answers to queries alone (`logits`: eq. 9 and the soft queries), tokens alone
(`features`: eq. 10 and the prototypes), or both. *Direction*: both ways, or `oneway`: the private model learns from the
global copy and teaches nobody; the server gets the trained copies, and with features their tokens, of which it makes
prototypes. A variant runs with the values that were tuned for the method that it is a variant of.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

NO_LOGITS = {
    "distillation.logit_to_client": 0.0,
    "distillation.logit_to_global": 0.0,
    "distillation.num_soft_queries": 0,
}
NO_FEATURES = {
    "distillation.feature_to_client": 0.0,
    "distillation.feature_to_global": 0.0,
    "distillation.prototype": 0.0,
    "distillation.send_prototypes": False,
}
# What the server learns of clients by, and what the global copy learns of the private model by.
NOTHING_BACK = {
    "distillation.logit_to_global": 0.0,
    "distillation.num_soft_queries": 0,
    "distillation.feature_to_global": 0.0,
}
LEVELS: dict[str, Mapping[str, Any]] = {
    "none": NO_LOGITS | NO_FEATURES,
    "logits": NO_FEATURES,
    "features": NO_LOGITS,
    "both": {},
}
IMPUTERS = {"zero": "zero", "mean": "mean", "hide": "diffusion"}
STEPS = (1, 2, 5, 10, 25, 100)  # K; 50 is the default
SAMPLING_STEPS = (1, 2, 10, 50)  # S; 4 is the default


@dataclass(frozen=True)
class Variant:
    """A method with a few settings changed; `base` is its name."""

    name: str
    base: str
    settings: Mapping[str, Any]
    title: str


def distillation_variants() -> Iterator[Variant]:
    """Yield imputer x level x direction, without the whole methods."""
    for imputer in IMPUTERS:
        base = f"mmfed3-{imputer}"
        for level, settings in LEVELS.items():
            if level != "both":
                yield Variant(f"{base}-{level}", base, settings, f"distils {_told(level)}")
            if level != "none":
                back = {**settings, **NOTHING_BACK}
                yield Variant(
                    f"{base}-{level}-oneway", base, back, f"distils {_told(level)}, to the private model only"
                )


def step_variants() -> Iterator[Variant]:
    """Yield MMFeD3-HidE with other K, and with other S."""
    base = "mmfed3-hide"
    for steps in STEPS:
        settings = {"diffusion.steps": steps, "diffusion.sampling_steps": min(steps, 4)}
        yield Variant(f"{base}-k{steps}", base, settings, f"{steps} diffusion steps")
    for steps in SAMPLING_STEPS:
        yield Variant(f"{base}-s{steps}", base, {"diffusion.sampling_steps": steps}, f"{steps} sampling steps")


def _told(level: str) -> str:
    return {"none": "nothing", "logits": "logits", "features": "features", "both": "logits and features"}[level]
