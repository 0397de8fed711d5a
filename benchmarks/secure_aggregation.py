"""What secure aggregation and private set union cost, in CPU seconds and bytes.

    python benchmarks/secure_aggregation.py
    python benchmarks/secure_aggregation.py --quick

All parties run in this process, one after the other, on updates that are made up: each client has the same number of
rows, drawn from all entities, and modules of a fixed size. A tenth of the clients drops out after sharing keys, the
expensive case. CPU seconds are of this process (they depend less than seconds on what else the machine does); those of
a client are the mean over clients, which in a deployment work at the same time. Beside the bytes of a masked update
stand those of a plain one. The sums are checked against the plain ones.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from tables import Sheet

from fedsim.federated.messages import message_bytes
from fedsim.privacy.secure_aggregation.client_party import ClientParty
from fedsim.privacy.secure_aggregation.clients import unmasking_bytes
from fedsim.privacy.secure_aggregation.messages import PlainInput
from fedsim.privacy.secure_aggregation.server_party import ServerParty
from fedsim.privacy.secure_aggregation.sums import MaskedSums
from fedsim.privacy.set_alignment import AlignmentParty, private_union
from fedsim.process import pin_threads

DIM, NUM_COMMON, SHARE, DROPPED = 128, 50_000, 0.6, 0.1


@dataclass
class Costs:
    """CPU seconds by who spent them on what, and bytes of one client."""

    seconds: dict[str, float] = field(default_factory=dict)
    bytes_up: float = 0.0
    bytes_down: float = 0.0

    def spend(self, what: str, since: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + time.process_time() - since


def play_round(num_clients: int, num_rows: int, num_entities: int, hidden: bool) -> Costs:
    """Play one round, and check its sum."""
    draws = torch.Generator().manual_seed(0)
    costs, clients = Costs(), list(range(num_clients))
    owned = {c: torch.randperm(num_entities, generator=draws)[:num_rows].sort().values for c in clients}
    width = DIM + int(hidden)
    inputs = {}
    for client in clients:
        table = torch.randint(-(2**40), 2**40, (num_entities if hidden else num_rows, width), generator=draws)
        common = torch.randint(-(2**40), 2**40, (NUM_COMMON,), generator=draws)
        inputs[client] = PlainInput(None if hidden else owned[client], table, common)
    parties = {client: ClientParty(client, 1, SHARE) for client in clients}
    sums = MaskedSums(1, num_entities, width, NUM_COMMON, None if hidden else owned)
    server = ServerParty(1, clients, SHARE, sums)
    exchange(server, parties, costs)
    senders = clients[: num_clients - round(DROPPED * num_clients)]
    for client in senders:
        since = time.process_time()
        masked = parties[client].mask(inputs[client])
        costs.spend("client, masks", since)
        costs.bytes_up += message_bytes(masked) / len(senders)
        sums.add(masked)
    since = time.process_time()
    request = server.request()
    for client in senders:
        server.receive(parties[client].reveal(request))
    server.unmask()
    costs.spend("server, unmasking", since)
    check(sums, [inputs[client] for client in senders])
    down, up = unmasking_bytes(num_clients)
    costs.bytes_up, costs.bytes_down = costs.bytes_up + up, costs.bytes_down + down
    for what in costs.seconds:
        if what.startswith("client"):
            costs.seconds[what] /= len(senders) if what == "client, masks" else num_clients
    return costs


def exchange(server: ServerParty, parties: dict[int, ClientParty], costs: Costs) -> None:
    """Play phases 0 and 1."""
    num_clients = len(parties)
    for party in parties.values():
        since = time.process_time()
        message = party.advertise()
        costs.spend("client, keys and shares", since)
        costs.bytes_up += message_bytes(message) / num_clients
        server.receive(message)
    roster = server.roster()
    for party in parties.values():
        since = time.process_time()
        shares = party.share(roster)
        costs.spend("client, keys and shares", since)
        costs.bytes_up += message_bytes(shares) / num_clients
        server.receive(shares)
    for client, party in parties.items():
        since = time.process_time()
        delivery = server.deliveries([client])[client]
        costs.spend("server, rows in common", since)
        since = time.process_time()
        party.receive(delivery)
        costs.spend("client, keys and shares", since)
        costs.bytes_down += (message_bytes(roster) + message_bytes(delivery)) / num_clients


def check(sums: MaskedSums, inputs: list[PlainInput]) -> None:
    """Hold the unmasked sum to the plain one."""
    table, common = torch.zeros_like(sums.table), torch.zeros_like(sums.common)
    for one in inputs:
        table[slice(None) if one.rows is None else one.rows] += one.table
        common += one.common
    if not (torch.equal(table, sums.table) and torch.equal(common, sums.common)):
        raise click.ClickException("the unmasked sum is not the plain one")


def align(num_clients: int, num_names: int) -> tuple[float, int]:
    """Align names of which clients have half in common; returns CPU seconds and bytes."""
    since = time.process_time()
    parties = [
        AlignmentParty(client, [f"Q{client * num_names // 2 + number}" for number in range(num_names)])
        for client in range(num_clients)
    ]
    union = private_union(parties)
    if union.num_names != num_names + (num_clients - 1) * (num_names // 2):
        raise click.ClickException("the union has another size than that of the sets")
    return time.process_time() - since, union.num_bytes


@click.command()
@click.option("--markdown", type=click.Path(path_type=Path), help="write the tables there too")
@click.option("--quick", is_flag=True, help="few and small clients, to try the script")
def main(markdown: Path | None, quick: bool) -> None:
    """Measure rounds of several sizes, and the alignment."""
    pin_threads(1)
    sheet = Sheet("Secure aggregation and alignment", markdown)
    jobs = [(3, 300, 400), (10, 300, 1000)] if quick else [(3, 3000, 4000), (10, 3000, 6000), (30, 1500, 6000)]
    if not quick:
        jobs.append((100, 500, 6000))
    rows = []
    for num_clients, num_rows, num_entities in jobs:
        for hidden in (False, True):
            if hidden and num_clients > 30:
                continue  # minutes of masks, and nothing new
            sheet.progress(f"{num_clients} clients, ownership {'hidden' if hidden else 'known'}")
            costs = play_round(num_clients, num_rows, num_entities, hidden)
            plain = 24 + 8 * num_rows + 4 * (num_rows * DIM + NUM_COMMON)
            names = ("client, keys and shares", "client, masks", "server, rows in common", "server, unmasking")
            rows.append(
                (
                    f"{num_clients} x {num_rows} rows of {num_entities}, {'hidden' if hidden else 'known'}",
                    *(f"{costs.seconds[name]:.3f}" for name in names),
                    f"{costs.bytes_up / 1e6:.2f} ({costs.bytes_up / plain:.1f}x)",
                    f"{costs.bytes_down / 1e3:.0f}",
                )
            )
    sheet.table(
        f"A round, d = {DIM}, {NUM_COMMON:,} numbers in modules, a tenth drops out after sharing; CPU s",
        (
            "clients",
            "client: keys",
            "client: masks",
            "server: overlaps",
            "server: unmask",
            "up, MB (of plain)",
            "down, kB",
        ),
        rows,
    )
    sizes = [(2, 100), (3, 100)] if quick else [(2, 1000), (3, 1000), (10, 300)]
    aligned = [(f"{n} x {names}", *align(n, names)) for n, names in sizes]
    sheet.table(
        "Private set union; of all clients together",
        ("clients x names", "CPU s", "ms per name and client", "kB sent"),
        [
            (what, f"{seconds:.2f}", f"{1e3 * seconds / (n * n * names):.3f}", f"{sent / 1e3:.0f}")
            for (what, seconds, sent), (n, names) in zip(aligned, sizes, strict=True)
        ],
    )
    sheet.close()


if __name__ == "__main__":
    main()
