"""Fusions: from an entity's tokens to the embeddings that the scorer takes (method.md section 3).

One file per fusion, and the registry `FUSIONS`. To add one: write a class with the members of `Fusion` and add a line
here. The property tests over the registry then hold it to the contract.
"""

from fedsim.models.fusion.adamf import AdamfFusion
from fedsim.models.fusion.base import Fusion, Pair, QueryPlan, one_scorer_each
from fedsim.models.fusion.gate import GateFusion
from fedsim.models.fusion.ikrl import IkrlFusion
from fedsim.models.fusion.imf import ImfFusion
from fedsim.models.fusion.mocme import MocmeFusion
from fedsim.models.fusion.none import NoFusion
from fedsim.models.fusion.split import SplitFusion
from fedsim.models.fusion.tbkgc import TbkgcFusion

FUSIONS: dict[str, Fusion] = {
    "gate": GateFusion(),
    "split": SplitFusion(),
    "ikrl": IkrlFusion(),
    "tbkgc": TbkgcFusion(),
    "adamf": AdamfFusion(),
    "imf": ImfFusion(),
    "mocme": MocmeFusion(),
    "none": NoFusion(),
}

__all__ = ["FUSIONS", "Fusion", "Pair", "QueryPlan", "one_scorer_each"]
