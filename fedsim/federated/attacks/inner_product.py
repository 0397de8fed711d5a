"""Inner-product manipulation: the attackers' mean change, turned around, x' = g - s (m - g).

Source: Xie, Koyejo and Gupta, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation", UAI
2019. m is the mean of the attackers' honest updates. The mean of all clients points backwards once s exceeds
(n - f) / f, n clients of which f attack; a small s hides among the honest updates from Krum and the median.

Symbols: g `reference`, m `mean`, s `adversary.strength`.
"""

from torch import Tensor

from fedsim.federated.attacks.collusion import Collusion


class InnerProduct(Collusion):
    """Send the opposite of the attackers' mean change."""

    default_strength = 10.0

    def value(self, mean: Tensor, deviation: Tensor, reference: Tensor, num_clients: int, num_attackers: int) -> Tensor:
        """Return g - s (m - g)."""
        return reference - self.strength * (mean - reference)
