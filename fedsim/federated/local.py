"""Training without federation: each client alone, or all data in one place."""

from fedsim.federated.strategy import Strategy


class Local(Strategy):
    """Every client trains its own model on its own data; nothing is exchanged."""

    views = ("local",)
    federated = False


class Central(Local):
    """One client holds all data. It is evaluated client by client, among each client's entities."""

    together = True
