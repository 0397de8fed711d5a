"""Simulated attackers: who they are, and what they do to their data and their messages (method.md section 5)."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from fedsim.config import Config
from fedsim.data.clients import ClientData
from fedsim.errors import ConfigError
from fedsim.federated.attacks.alie import Alie
from fedsim.federated.attacks.base import Attack, Received
from fedsim.federated.attacks.boost import Boost
from fedsim.federated.attacks.free_rider import FreeRider
from fedsim.federated.attacks.inner_product import InnerProduct
from fedsim.federated.attacks.noise import Noise
from fedsim.federated.attacks.sign_flip import SignFlip
from fedsim.federated.attacks.tail_flip import TailFlip
from fedsim.federated.compression import decode_message
from fedsim.federated.messages import ClientUpdate
from fedsim.models.parameters import Params
from fedsim.randomness import numpy_generator

ATTACKS: dict[str, type[Attack]] = {
    "sign_flip": SignFlip,
    "boost": Boost,
    "noise": Noise,
    "tail_flip": TailFlip,
    "alie": Alie,
    "inner_product": InnerProduct,
    "free_rider": FreeRider,
}


def make_attack(config: Config) -> Attack | None:
    """Make the attack that the config names; None if nobody attacks.

    Raises:
        ConfigError: if there is none of that name, or it cannot be that strong.
    """
    name, strength = config.adversary.attack, config.adversary.strength
    if name is None:
        return None
    if name not in ATTACKS:
        raise ConfigError(
            f"config field 'adversary.attack' = '{name}': unknown name; choose from {', '.join(ATTACKS)}, or null"
        )
    attack = ATTACKS[name](strength)
    if attack.max_strength is not None and attack.strength > attack.max_strength:
        raise ConfigError(
            f"config field 'adversary.strength' = {strength:g}: {name} takes at most {attack.max_strength:g}"
        )
    return attack


def choose_attackers(config: Config, num_clients: int) -> Config:
    """Return the config with the attackers' ids in `adversary.clients`, drawn if the config gives a share of them.

    Raises:
        ConfigError: if a client is named that there is not, or the attack cannot be made.
    """
    adversary = config.adversary
    if make_attack(config) is None:
        return config
    if adversary.clients is None:
        generator = numpy_generator(config.seed, "adversary")
        drawn = generator.choice(num_clients, round(adversary.share * num_clients), replace=False)
        attackers = tuple(sorted(int(client) for client in drawn))
    else:
        attackers = tuple(sorted(set(adversary.clients)))
        if attackers and attackers[-1] >= num_clients:
            raise ConfigError(
                f"config field 'adversary.clients' names client {attackers[-1]}, but the clients are 0 to "
                f"{num_clients - 1}"
            )
    return config.model_copy(update={"adversary": adversary.model_copy(update={"clients": attackers})})


def poison_clients(clients: Sequence[ClientData], config: Config) -> list[ClientData]:
    """Return the clients' data, that of the attackers poisoned; config as `choose_attackers` returned it."""
    attack = make_attack(config)
    if attack is None:
        return list(clients)
    attackers = config.adversary.clients or ()
    return [
        attack.poison(data, numpy_generator(config.seed, "adversary/data", client=data.client))
        if data.client in attackers
        else data
        for data in clients
    ]


class Colluders:
    """Stands in for the attackers' own channel, see `fedsim.federated.attacks.collusion`; empty without collusion.

    Args:
        config: as `choose_attackers` returned it.
    """

    def __init__(self, config: Config) -> None:
        self.attack = make_attack(config)
        self.clients = frozenset(config.adversary.clients or ()) if colludes(config) else frozenset()
        self.config = config
        self.updates: dict[int, ClientUpdate] = {}

    def take(self, update: ClientUpdate) -> bool:
        """Hold an attacker's update back; returns whether it is one."""
        if not self.clients or update.client not in self.clients:
            return False
        self.updates[update.client] = update
        return True

    def forge(self, entity: Tensor, modules: Params, num_clients: int) -> list[ClientUpdate]:
        """Return what the round's colluding attackers send, and forget their updates.

        Args:
            entity: the server's rows, [num_rows, dim].
            modules: its modules.
            num_clients: of the federation.
        """
        if self.attack is None or not self.updates:
            return []
        sent = [self.updates[client] for client in sorted(self.updates)]
        self.updates = {}
        honest = [decode_message(update) for update in sent]
        forged = self.attack.forge(honest, Received(entity, modules), num_clients, len(self.clients))
        return [_as_sent(new, old) for new, old in zip(forged, sent, strict=True)]


def _as_sent(forged: ClientUpdate, sent: ClientUpdate) -> ClientUpdate:
    """Put the forged parts into the update that was sent, in its precision."""
    dtype = sent.entity.dtype
    return replace(
        sent,
        entity=forged.entity.to(dtype),
        modules={name: value.to(dtype) for name, value in forged.modules.items()},
        tokens=None if forged.tokens is None else forged.tokens.to(dtype),
    )


def colludes(config: Config) -> bool:
    """Tell whether attackers' updates are forged at the server, and so must reach it one by one."""
    attack = make_attack(config)
    return attack is not None and attack.colludes


__all__ = [
    "ATTACKS",
    "Attack",
    "Colluders",
    "Received",
    "choose_attackers",
    "colludes",
    "make_attack",
    "poison_clients",
]
