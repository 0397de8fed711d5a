"""Robust aggregation over partial ownership (method.md section 5).

Instead of the mean of eq. 3, each entity row is combined over the clients that sent it, the shared modules over all
clients, and the projected tokens behind the prototypes like rows. ``mean`` is eq. 3 itself, in exact sums.
"""

from fedsim.config import Config
from fedsim.errors import ConfigError
from fedsim.federated.attacks import colludes
from fedsim.federated.robust.base import Aggregator
from fedsim.federated.robust.bulyan import Bulyan
from fedsim.federated.robust.collected import CollectedModules, CollectedRows
from fedsim.federated.robust.krum import Krum, MultiKrum
from fedsim.federated.robust.median import Median
from fedsim.federated.robust.norm_clipping import NormClipping
from fedsim.federated.robust.trimmed_mean import TrimmedMean
from fedsim.federated.strategy import Strategy
from fedsim.robustness_config import RobustnessConfig

AGGREGATORS: dict[str, type[Aggregator] | None] = {
    "mean": None,
    "norm_clipping": NormClipping,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "krum": Krum,
    "multi_krum": MultiKrum,
    "bulyan": Bulyan,
}


def make_aggregator(name: str, config: RobustnessConfig) -> Aggregator | None:
    """Make the aggregator of that name; None for the plain mean.

    Raises:
        ConfigError: if there is none of that name.
    """
    if name not in AGGREGATORS:
        known = ", ".join(AGGREGATORS)
        raise ConfigError(f"config field 'federation.aggregator' = '{name}': unknown name; choose from {known}")
    chosen = AGGREGATORS[name]
    return None if chosen is None else chosen(config)


def check_robustness(config: Config, strategy: Strategy) -> None:
    """Refuse aggregators and attackers that a strategy has no place for.

    Raises:
        ConfigError: naming the field.
    """
    robust = make_aggregator(config.federation.aggregator, config.robustness) is not None
    name = config.federation.strategy
    if robust and strategy.keeps_rows:
        raise ConfigError(
            f"config field 'federation.aggregator' = '{config.federation.aggregator}': strategy '{name}' mixes each "
            f"client's rows anew instead of aggregating them; set the aggregator to mean"
        )
    for field, used in (("federation.aggregator", robust), ("adversary.attack", config.adversary.attack is not None)):
        if used and not strategy.federated:
            raise ConfigError(
                f"config field '{field}' has no use with federation.strategy '{name}', which exchanges nothing; "
                f"leave it at its default"
            )


def holds_updates(config: Config) -> bool:
    """Tell whether the server compares the updates of a round before it combines them, and so must hold them all."""
    return config.federation.aggregator != "mean" or config.robustness.max_norm_ratio is not None


def sends_singly(config: Config) -> bool:
    """Tell whether updates must reach the server one by one, not as sums of several clients."""
    return holds_updates(config) or colludes(config)


def placement_lines(config: Config) -> list[str]:
    """Say what holding updates costs, for the lines that tell where a run's parts are."""
    if not holds_updates(config):
        return []
    field = "robustness.max_norm_ratio" if config.federation.aggregator == "mean" else "federation.aggregator"
    return [f"the server holds all updates of a round for {field}: its memory grows with the cohort"]


__all__ = [
    "AGGREGATORS",
    "Aggregator",
    "CollectedModules",
    "CollectedRows",
    "check_robustness",
    "holds_updates",
    "make_aggregator",
    "placement_lines",
    "sends_singly",
]
