"""What does not go with secure aggregation, because the server would have to see single updates."""

from fedsim.config import Config
from fedsim.errors import ConfigError
from fedsim.federated.attacks import colludes
from fedsim.federated.strategy import Strategy


def check_secure_aggregation(config: Config, strategy: Strategy) -> None:
    """Refuse a config whose server needs more than sums.

    A strategy that sends nothing has nothing to mask, and is let pass.

    Raises:
        ConfigError: naming the field, and what to set instead.
    """
    if not config.secure_aggregation.enabled or not strategy.federated:
        return
    reasons = []
    if strategy.keeps_rows:
        reasons.append(
            f"federation.strategy '{config.federation.strategy}' keeps each client's rows at the server: choose "
            f"another strategy"
        )
    if strategy.sends_soft_queries:
        reasons.append(
            "soft queries are used one by one, not as a sum: set distillation.num_soft_queries to 0 (prototypes are "
            "means, and stay)"
        )
    if config.federation.aggregator != "mean":
        reasons.append(
            f"federation.aggregator '{config.federation.aggregator}' compares single updates: set it to mean"
        )
    if config.robustness.max_norm_ratio is not None:
        reasons.append("robustness.max_norm_ratio compares the sizes of single updates: set it to null")
    if colludes(config):
        reasons.append(
            f"the attackers of adversary.attack '{config.adversary.attack}' meet at the server, which must see what "
            f"they send: choose another attack, or null"
        )
    if config.privacy.noise == "server" and config.secure_aggregation.hide_ownership:
        reasons.append(
            "a server that adds privacy.noise scales it by who owns what: set secure_aggregation.hide_ownership to "
            "false, or privacy.noise to client"
        )
    if config.data.alignment == "psu" and config.secure_aggregation.hide_ownership:
        reasons.append(
            "the server of data.alignment psu learns who has which id: set it to given, or "
            "secure_aggregation.hide_ownership to false"
        )
    if config.communication.top_k is not None:
        reasons.append(
            "with communication.top_k clients send different rows each round, and which ones tells what they learnt: "
            "set top_k to null"
        )
    if config.federation.cohort_size == 1:
        reasons.append("the sum of one client is its update: set federation.cohort_size to 2 or more, or to null")
    if config.participation.bytes_per_second is not None:
        reasons.append(
            "participation.bytes_per_second predicts the time of plain messages: set it to null (the bytes of masked "
            "ones are in the metrics)"
        )
    if reasons:
        raise ConfigError("config field 'secure_aggregation.enabled' = True: " + "; ".join(reasons))
