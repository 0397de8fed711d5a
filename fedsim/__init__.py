"""fedsim: federated multimodal knowledge graph completion, simulated.

import fedsim
config = fedsim.load_config(overrides={"federation.num_rounds": 5})
result = fedsim.run(config)
print(result.test.mrr)
"""

from typing import TYPE_CHECKING, Any

from fedsim.config import Config, load_config
from fedsim.errors import FedSimError

if TYPE_CHECKING:
    from fedsim.results import RunResult
    from fedsim.simulation import evaluate, resume, run

__all__ = ["Config", "FedSimError", "RunResult", "evaluate", "load_config", "resume", "run"]


def __getattr__(name: str) -> Any:
    """Import the simulation when it is first used: torch takes seconds, and `fedsim --help` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module 'fedsim' has no attribute '{name}'")
    from fedsim import results, simulation

    return getattr(results if name == "RunResult" else simulation, name)
