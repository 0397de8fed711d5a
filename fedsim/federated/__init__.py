"""Federation: strategies, messages, the client and server sides, and the in-process runtime."""

from fedsim.federated.fede import FedE
from fedsim.federated.fedec import FedEC
from fedsim.federated.fedlu import FedLU
from fedsim.federated.fedprox import FedProx
from fedsim.federated.fedr import FedR
from fedsim.federated.local import Central, Local
from fedsim.federated.mmfed3 import MMFeD3
from fedsim.federated.pfedeg import PFedEG
from fedsim.federated.strategy import Strategy

STRATEGIES: dict[str, type[Strategy]] = {
    "local": Local,
    "central": Central,
    "fede": FedE,
    "fedprox": FedProx,
    "fedec": FedEC,
    "fedlu": FedLU,
    "fedr": FedR,
    "pfedeg": PFedEG,
    "mmfed3": MMFeD3,
}

__all__ = ["STRATEGIES", "Strategy"]
