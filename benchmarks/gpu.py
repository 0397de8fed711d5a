"""Clients on a GPU: throughput of one actor per client, of a pool that trains one by one, and of stacked clients.

    python benchmarks/gpu.py --output runs/gpu.md
    python benchmarks/gpu.py --cpu                           # the same runs on CPUs, to try the script

TransE, 2000 entities x 128, 300 triples per client, 256 negatives, 3 local epochs. Three ways to run: `dedicated` (an
actor per client, each on its share of the GPU), `pooled` with `runtime.clients_per_batch` 1 (actors train their
clients one after the other), and `batched` (a pool, clients stacked). All ways at a number of clients run one after
the other, again and again. Without a GPU it says that it was skipped.
"""

import os
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from job_data import JobData, make_data
from process_tree import fedsim_run, watch
from tables import Sheet

import fedsim
from fedsim.config import dump_config

TRIPLES, EPOCHS = 300, 3
COSTLY: dict[str, Any] = {"training.num_negatives": 256, "training.batch_size": 256, "training.local_epochs": EPOCHS}


def ways(num_clients: int, num_actors: int, most_dedicated: int, gpu: bool) -> dict[str, Mapping[str, Any]]:
    """Return the settings of each way to run."""
    share = round(0.95 / num_actors, 3) if gpu else 0.0
    pool = {"runtime.placement": "pooled", "runtime.num_actors": num_actors, "runtime.gpus_per_client": share}
    found: dict[str, Mapping[str, Any]] = {
        "pooled, one by one": pool | {"runtime.clients_per_batch": 1},
        "pooled, batched": pool | {"runtime.clients_per_batch": None},
    }
    if num_clients <= most_dedicated:
        cpus = round(min(1.0, (os.cpu_count() or 1) / (num_clients + 1)) - 0.005, 2)
        alone = {"runtime.placement": "dedicated", "runtime.num_actors": None, "runtime.cpus_per_actor": cpus}
        found["dedicated"] = alone | {"runtime.gpus_per_client": round(0.95 / num_clients, 3) if gpu else 0.0}
    return found


def run_way(data: JobData, settings: Mapping[str, Any], num_rounds: int, folder: Path) -> list[float]:
    """Run one way; returns the seconds of its rounds but the first and the last."""
    changes = {**data.settings(), **COSTLY, **settings, "federation.num_rounds": num_rounds + 2}
    file = folder / "config.yaml"
    file.write_text(dump_config(fedsim.load_config(overrides=changes)), encoding="utf-8")
    return watch(fedsim_run(file, folder / "run"), {"OMP_NUM_THREADS": "1"}).round_seconds[:-1]


@click.command()
@click.option("--clients", "sizes", multiple=True, type=int, help="numbers of clients [default: 4 16 64 256]")
@click.option("--actors", default=1, show_default=True, help="client actors of a pool, all on the GPU")
@click.option("--most-dedicated", default=16, show_default=True, help="dedicated placement up to so many clients")
@click.option("--rounds", default=3, show_default=True)
@click.option("--repetitions", default=2, show_default=True)
@click.option("--cpu", is_flag=True, help="run on CPUs instead")
@click.option("--output", type=click.Path(path_type=Path), help="write the tables as markdown")
def main(
    sizes: tuple[int, ...],
    actors: int,
    most_dedicated: int,
    rounds: int,
    repetitions: int,
    cpu: bool,
    output: Path | None,
) -> None:
    """Measure throughput against the number of clients."""
    sheet = Sheet("Clients per GPU", output)
    if not cpu and not torch.cuda.is_available():
        sheet.say(
            "SKIPPED: torch finds no CUDA device here, so nothing was measured. Run this on a machine with a GPU and "
            "a CUDA build of torch; `--cpu` tries the script without one."
        )
        sheet.close()
        return
    sheet.say("Device: " + ("CPUs" if cpu else torch.cuda.get_device_name()) + f"; {actors} actor(s) in a pool.")
    rows = []
    for size in sizes or (4, 16, 64, 256):
        found: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory(prefix="fedsim-gpu-") as name:
            data = make_data(Path(name) / "job", size, TRIPLES)
            for _ in range(repetitions):
                for way, settings in ways(size, actors, most_dedicated, not cpu).items():
                    with tempfile.TemporaryDirectory(dir=name) as folder:
                        try:
                            seconds = run_way(data, settings, rounds, Path(folder))
                        except (click.ClickException, fedsim.FedSimError) as err:
                            sheet.say(f"{size} clients, {way}, FAILED: {getattr(err, 'message', err)}")
                            continue
                    found.setdefault(way, []).extend(seconds)
                    sheet.progress(f"{size} clients, {way}: {', '.join(f'{value:.2f}' for value in seconds)} s")
        alone = min(found.get("pooled, one by one", [float("nan")]))
        for way, seconds in found.items():
            throughput = size * TRIPLES * EPOCHS / min(seconds)
            cells = [f"{min(seconds):.3f}", f"{statistics.median(seconds):.3f}", f"{throughput:,.0f}"]
            rows.append([way, str(size), *cells, f"{alone / min(seconds):.2f}"])
    sheet.table(
        "Training triples per second", ("way", "clients", "s/round min", "median", "triples/s", "x one by one"), rows
    )
    sheet.close()


if __name__ == "__main__":
    main()
