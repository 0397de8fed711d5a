"""FedE (Chen et al., IJCKG 2021), and with modalities our backbone MMFedE (method.md section 3).

Clients train the global rows of their entities and the shared modules; the server averages rows over their owners and
modules by training triples (eq. 3). Relations stay private.
"""

from fedsim.federated.strategy import Strategy


class FedE(Strategy):
    """Federated averaging on entity rows and shared modules; all defaults of `Strategy`."""
