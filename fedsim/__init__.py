"""fedsim: federated multimodal knowledge graph completion, simulated.

import fedsim
config = fedsim.load_config(overrides={"federation.num_rounds": 5})
result = fedsim.run(config)
print(result.test.mrr)
"""

from fedsim.config import Config, load_config
from fedsim.errors import FedSimError
from fedsim.simulation import RunResult, evaluate, resume, run

__all__ = ["Config", "FedSimError", "RunResult", "evaluate", "load_config", "resume", "run"]
