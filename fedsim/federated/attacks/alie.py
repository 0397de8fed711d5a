"""ALIE, "a little is enough": attackers stay within the spread of honest updates, x' = m - z s.

Source: Baruch, Baruch and Goldberg, "A Little Is Enough: Circumventing Defenses For Distributed Learning", NeurIPS
2019. m and s are mean and standard deviation of the attackers' honest updates, number by number. By default z is the
largest with which enough honest clients look further away than the attackers: with n clients of which f attack,
Phi(z) = (n - f - k) / (n - f), k = n div 2 + 1 - f; not below 0. `adversary.strength` gives another z.

Symbols: n `num_clients`, f `num_attackers`, k `supporters`.
"""

from statistics import NormalDist

from torch import Tensor

from fedsim.federated.attacks.collusion import Collusion


class Alie(Collusion):
    """Move the mean by a part of the spread."""

    def __init__(self, strength: float | None) -> None:
        super().__init__(strength)
        self.given = strength

    def value(self, mean: Tensor, deviation: Tensor, reference: Tensor, num_clients: int, num_attackers: int) -> Tensor:
        """Return m - z s."""
        factor = self.given if self.given is not None else little_enough(num_clients, num_attackers)
        return mean - factor * deviation


def little_enough(num_clients: int, num_attackers: int) -> float:
    """Return z of the paper, at least 0."""
    honest = num_clients - num_attackers
    supporters = num_clients // 2 + 1 - num_attackers
    share = (honest - supporters) / honest if honest else 0.0
    return max(NormalDist().inv_cdf(share), 0.0) if 0 < share < 1 else 0.0
