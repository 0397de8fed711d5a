"""What the driver learns of a client's work: numbers only."""

from dataclasses import dataclass

from fedsim.evaluation.ranking import RankingMetrics


@dataclass(frozen=True)
class ClientReport:
    """A client's round.

    Attributes:
        client: the client's id.
        losses: mean of each loss term, and ``total``.
        bytes_down: size of what it was sent.
        bytes_up: size of what it sent.
        seconds: of its local training; of a batch, its share by training triples.
    """

    client: int
    losses: dict[str, float]
    bytes_down: int
    bytes_up: int
    seconds: float


@dataclass(frozen=True)
class ClientEvaluation:
    """Ranking metrics of one client on one split.

    Attributes:
        client: the client's id (with central training, the client whose triples were ranked).
        metrics: filtered realistic ranking metrics.
        combination: weight of the global copy's scores; None with a single view.
    """

    client: int
    metrics: RankingMetrics
    combination: float | None
