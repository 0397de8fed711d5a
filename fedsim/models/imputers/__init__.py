"""Imputers: what stands in for the token of a modality that a client lacks.

To add one: write a file with a class that has the methods of `Imputer`, and add a line to `IMPUTERS`.
"""

from fedsim.models.imputers.base import Draws, Imputation, Imputer, TokenTable
from fedsim.models.imputers.diffusion import DiffusionImputer
from fedsim.models.imputers.gan import GANImputer
from fedsim.models.imputers.mean import MeanImputer
from fedsim.models.imputers.mlp import MLPImputer
from fedsim.models.imputers.nearest import NearestImputer
from fedsim.models.imputers.random import RandomImputer
from fedsim.models.imputers.ridge import RidgeImputer
from fedsim.models.imputers.vae import VAEImputer
from fedsim.models.imputers.zero import ZeroImputer

IMPUTERS: dict[str, type[Imputer]] = {
    "zero": ZeroImputer,
    "mean": MeanImputer,
    "random": RandomImputer,
    "nearest": NearestImputer,
    "ridge": RidgeImputer,
    "mlp": MLPImputer,
    "vae": VAEImputer,
    "gan": GANImputer,
    "diffusion": DiffusionImputer,
}

__all__ = ["IMPUTERS", "Draws", "Imputation", "Imputer", "TokenTable"]
