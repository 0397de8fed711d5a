"""Training and ranking of one client on FB15k-237, against PyKEEN and against bare matrix products.

    FEDSIM_DATA=folder python benchmarks/kernels.py
    FEDSIM_DATA=folder python benchmarks/kernels.py --quick

FB15k-237 is not bundled: import it with `fedsim data import` into the folder that FEDSIM_DATA names. PyKEEN is one of
the development dependencies. Ours is a client's whole training step (strategy `local`, structure alone), drawing of
negatives and Adam included; PyKEEN's is its sLCWA loop with the same loss, batch, negatives, numbers per entity and
Adam, timed from its first to its last batch. Both run in this process, one after the other in each repetition, with the
same threads and the same treatment of freed memory: the C library's defaults, as a user of PyKEEN has them (a client
actor of fedsim has its own setting, a little faster; `--keep-memory` gives it to both). Speeds are those of the fastest
repetition, with the median beside.

Rows marked "compiled" are with `training.compile`; what compiling takes is printed beside.

A step of `one_vs_all`, and the ranking of a bilinear scorer, are compared with the bare products of the same shapes.
"""

import logging
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from tables import Sheet

import fedsim
from fedsim.config import make_config
from fedsim.data.clients import ClientData, build_client, load_federated_split
from fedsim.data.dataset import load_dataset, resolve_dataset
from fedsim.federated.client import Client
from fedsim.federated.runtime import make_client
from fedsim.models.compiled import load_library
from fedsim.models.scorers import COMPILED_SCORERS
from fedsim.process import keep_freed_memory, pin_threads

BATCH_SIZE, NUM_NEGATIVES, RANKED_AT_ONCE = 512, 256, 512
SETTINGS: dict[str, Any] = {
    "runtime.kind": "in_process",
    "federation.strategy": "local",
    "data.num_clients": 1,
    "data.split": "relation",
    "model.fusion": "none",
    "model.dropout": 0.0,
    "training.batch_size": BATCH_SIZE,
    "training.num_negatives": NUM_NEGATIVES,
    "training.local_epochs": 1,
    "training.learning_rate": 0.001,
    "evaluation.batch_size": RANKED_AT_ONCE,
}
SAMPLED = {"training.loss": "self_adversarial", "training.corruption": "tail", "training.reciprocal": False}
ONE_VS_ALL = {"training.loss": "one_vs_all", "training.corruption": "both", "training.reciprocal": True}
TARGETS = {"transe": 3.0, "rotate": 4.0, "complex": 10.0}
PYKEEN_BATCH_RANKED = 32  # PyKEEN's own choice without a GPU

PARTS = ("training", "products", "ranking")

Clock = Callable[[], float]
Run = Callable[[Clock], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


class Contest:
    """Functions that return the seconds they took, run in turn.

    Args:
        repeats: repetitions of all of them, after one that does not count.
        clock: of the machine or of this process.
        sheet: shows the progress.
    """

    def __init__(self, repeats: int, clock: Clock, sheet: Sheet) -> None:
        self.repeats, self.clock, self.sheet = repeats, clock, sheet
        self.runs: dict[str, Run] = {}
        self.seconds: dict[str, list[float]] = {}

    def enter(self, name: str, run: Run) -> None:
        """Add a contestant."""
        self.runs[name] = run

    def hold(self) -> None:
        """Run all in turn."""
        for repeat in range(self.repeats + 1):
            for name, run in self.runs.items():
                seconds = run(self.clock)
                if repeat:
                    self.seconds.setdefault(name, []).append(seconds)
                self.sheet.progress(f"{repeat or 'warm-up'}: {name} {seconds:.3f} s")

    def best(self, name: str) -> float:
        """Return the least seconds of a contestant."""
        return min(self.seconds[name])

    def middle(self, name: str) -> float:
        """Return the median of its seconds."""
        return median(self.seconds[name])


def build_data(name: str) -> ClientData:
    """Put the whole graph at one client."""
    config = make_config({}, SETTINGS | {"data.path": name})
    graph = load_dataset(resolve_dataset(name))
    return build_client(graph, load_federated_split(graph, config), config, [0])


def cut(data: ClientData, num_train: int, num_test: int) -> ClientData:
    """Keep all entities, but only so many triples to train on and to rank; the filter still knows all train triples."""
    (group,) = data.groups
    groups = (replace(group, triples={**group.triples, "test": group.triples["test"][:num_test]}),)
    return replace(data, train=data.train[:num_train], groups=groups, features={})


def our_client(data: ClientData, settings: Mapping[str, Any]) -> Client:
    """Make a client of its own tables."""
    return make_client(data, make_config({}, SETTINGS | dict(settings)), torch.device("cpu"))


def our_training(client: Client) -> Run:
    """Train an epoch, round after round."""
    rounds = iter(range(1, 1 << 30))

    def run(clock: Clock) -> float:
        started = clock()
        client.train(next(rounds), None)
        return clock() - started

    return run


def our_ranking(client: Client) -> Run:
    """Rank the test triples, both sides."""

    def run(clock: Clock) -> float:
        started = clock()
        client.evaluate("test", 1, choose=False)
        return clock() - started

    return run


def bare_products(num_queries: int, num_entities: int, dim: int, *, backward: bool, repeats: int) -> Run:
    """Multiply queries with all entities, and for training the gradient with both, into memory kept ready."""
    query, table = torch.randn(num_queries, dim), torch.randn(num_entities, dim)
    scores = torch.empty(num_queries, num_entities)
    query_grad, table_grad = torch.empty_like(query), torch.empty_like(table)

    def run(clock: Clock) -> float:
        started = clock()
        for _ in range(repeats):
            torch.mm(query, table.mT, out=scores)
            if backward:
                torch.mm(scores, table, out=query_grad)
                torch.mm(scores.mT, query, out=table_grad)
        return clock() - started

    return run


def pykeen_model(scorer: str, data: ClientData, dim: int) -> tuple[Any, Any]:
    """Make PyKEEN's model, of as many numbers per entity and without penalties, and its triples."""
    from pykeen.models import ComplEx, RotatE, TransE
    from pykeen.triples import CoreTriplesFactory

    factory = CoreTriplesFactory(torch.from_numpy(data.train), len(data.entity_ids), len(data.relation_ids))
    if scorer in ("transe", "transe_l2"):
        norm = 2 if scorer == "transe_l2" else 1
        settings = {"embedding_dim": dim, "scoring_fct_norm": norm, "entity_constrainer": None, "random_seed": 0}
        return TransE(triples_factory=factory, **settings), factory
    if scorer == "rotate":
        return RotatE(triples_factory=factory, embedding_dim=dim // 2, random_seed=0), factory
    return ComplEx(triples_factory=factory, embedding_dim=dim // 2, regularizer=None, random_seed=0), factory


def pykeen_training(scorer: str, data: ClientData, dim: int) -> Run:
    """Train an epoch by PyKEEN's sLCWA loop; the seconds of one batch times their number, without its preparations."""
    from pykeen.losses import NSSALoss
    from pykeen.training import SLCWATrainingLoop
    from pykeen.training.callbacks import TrainingCallback

    class Ends(TrainingCallback):
        """Notes when each batch has ended."""

        def __init__(self, clock: Clock) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.clock = clock
            self.seconds: list[float] = []

        def post_batch(self, *_: Any, **__: Any) -> None:
            self.seconds.append(self.clock())

    model, factory = pykeen_model(scorer, data, dim)
    model.loss = NSSALoss(margin=10.0, adversarial_temperature=1.0)
    loop = SLCWATrainingLoop(
        model=model,
        triples_factory=factory,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.001),
        negative_sampler="basic",
        negative_sampler_kwargs={"num_negs_per_pos": NUM_NEGATIVES, "corruption_scheme": ("tail",)},
    )

    epochs = iter(range(1, 1 << 30))
    fixed = {"batch_size": BATCH_SIZE, "num_workers": 0, "pin_memory": False, "use_tqdm": False}

    def run(clock: Clock) -> float:
        ends = Ends(clock)
        epoch = next(epochs)
        loop.train(factory, num_epochs=epoch, continue_training=epoch > 1, callbacks=ends, **fixed)
        return (ends.seconds[-1] - ends.seconds[0]) / (len(ends.seconds) - 1) * len(ends.seconds)

    return run


def pykeen_ranking(scorer: str, data: ClientData, dim: int) -> Run:
    """Rank the test triples by PyKEEN's filtered evaluator, both sides."""
    from pykeen.evaluation import RankBasedEvaluator

    model, _ = pykeen_model(scorer, data, dim)
    (group,) = data.groups
    test = torch.from_numpy(group.triples["test"])
    known = [torch.from_numpy(group.triples[split]) for split in ("train", "valid")]
    evaluator = RankBasedEvaluator(filtered=True)

    def run(clock: Clock) -> float:
        started = clock()
        evaluator.evaluate(model, test, batch_size=PYKEEN_BATCH_RANKED, additional_filter_triples=known, use_tqdm=False)
        return clock() - started

    return run


@click.command()
@click.option("--data", default="FB15k-237", show_default=True, help="name or folder of the data set")
@click.option("--dim", default=128, show_default=True, help="numbers per entity")
@click.option("--threads", default=1, show_default=True, help="torch threads of both sides; fedsim's default is 1")
@click.option("--batches", default=6, show_default=True, help="batches per repetition")
@click.option("--repeats", default=5, show_default=True, help="repetitions, after one that does not count")
@click.option(
    "--keep-memory/--no-keep-memory",
    default=False,
    show_default=True,
    help="give both sides fedsim's setting, which keeps freed memory, or the C library's defaults, PyKEEN's",
)
@click.option(
    "--clock",
    type=click.Choice(list(CLOCKS)),
    default="wall",
    show_default=True,
    help="cpu counts this process's CPU time: for one thread on a machine that is busy with other work",
)
@click.option("--quick", is_flag=True, help="two repetitions of three batches")
@click.option("--part", type=click.Choice(PARTS), multiple=True, help="measure this alone; give it again for more")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="markdown file for the tables")
def main(
    data: str,
    dim: int,
    threads: int,
    batches: int,
    repeats: int,
    keep_memory: bool,
    clock: str,
    quick: bool,
    part: tuple[str, ...],
    output: Path | None,
) -> None:
    """Time training and ranking, ours, PyKEEN's and bare matrix products."""
    for name in ("pykeen", "torch_max_mem"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "'pin_memory' argument is set as true", UserWarning)
    pin_threads(threads)
    kept = keep_memory and keep_freed_memory()
    batches, repeats = (3, 2) if quick else (batches, repeats)
    sheet = Sheet("Kernels: training and ranking of one client", output)
    try:
        whole = build_data(data)
        started = time.perf_counter()
        load_library()
        compiled = time.perf_counter() - started
    except fedsim.FedSimError as err:
        raise click.ClickException(str(err)) from err
    sheet.say(
        f"{data}: {len(whole.entity_ids):,} entities, {len(whole.relation_ids)} relations; {dim} numbers per entity, "
        f"batch {BATCH_SIZE}, {NUM_NEGATIVES} negatives. {repeats} repetitions of {batches} batches, interleaved. "
        f"Seconds of {clock} time. "
        f"Both sides: torch threads {threads}, freed memory {'kept (mallopt)' if kept else 'left to the C library'}. "
        f"Compiling (training.compile) took {compiled:.2f} s, once per process."
    )
    parts: dict[str, Callable[[Contest], None]] = {
        "training": lambda contest: train_against_pykeen(whole, dim, batches, contest),
        "products": lambda contest: train_against_products(whole, dim, batches, contest),
        "ranking": lambda contest: rank(whole, dim, 1 if quick else 4, contest),
    }
    for name in part or PARTS:
        parts[name](Contest(repeats, CLOCKS[clock], sheet))
    sheet.close()


def train_against_pykeen(whole: ClientData, dim: int, batches: int, contest: Contest) -> None:
    """Compare negative sampling with PyKEEN's."""
    num_triples = batches * BATCH_SIZE
    data = cut(whole, num_triples, 0)
    own: dict[str, str] = {}  # ours -> PyKEEN's
    jobs = [("transe", dim), ("rotate", dim), ("complex", dim), ("rotate", 2 * dim), ("complex", 2 * dim)]
    for scorer, width in jobs:
        peer = f"{scorer} {width} PyKEEN"
        for name, settings in variants(f"{scorer} {width}", {"model.scorer": scorer, "model.dim": width}):
            contest.enter(name, our_training(our_client(data, settings)))
            own[name] = peer
        contest.enter(peer, pykeen_training(scorer, data, width))
    contest.enter(f"transe_l2 {dim} PyKEEN", pykeen_training("transe_l2", data, dim))
    shared: dict[str, str] = {}
    for scorer in ("transe", "transe_l2", "rotate", "complex"):
        fixed = {"model.scorer": scorer, "model.dim": dim, "training.negatives": "shared"}
        for name, settings in variants(f"{scorer} {dim} shared", fixed):
            contest.enter(name, our_training(our_client(data, settings)))
            # TransE is compared with PyKEEN's of the same norm, the others with its L1.
            shared[name] = f"transe{'_l2' * (scorer == 'transe_l2')} {dim} PyKEEN"
    contest.hold()

    def speeds(name: str) -> list[str]:
        return [f"{num_triples / seconds:,.0f}" for seconds in (contest.best(name), contest.middle(name))]

    ratios = {name: contest.best(peer) / contest.best(name) for name, peer in (own | shared).items()}
    for peers, title, peer_name in (
        (own, "negatives per triple, against PyKEEN's sLCWA", "PyKEEN"),
        (shared, "negatives shared in the batch, against PyKEEN's TransE", "PyKEEN TransE"),
    ):
        rows = [(name, *speeds(name), *speeds(peer), f"{ratios[name]:.1f}") for name, peer in peers.items()]
        columns = ("scorer, numbers per entity", "ours, best", "median", f"{peer_name}, best", "median")
        contest.sheet.table(f"Training triples per second, {title}", (*columns, "ratio of the best"), rows)
    wanted = [(f"{scorer} {dim}", least) for scorer, least in TARGETS.items()]
    wanted += [(f"transe {dim} shared, compiled", 30.0), (f"transe_l2 {dim} shared", 30.0)]
    contest.sheet.verdicts(
        [(name, f">= {least:g}x", f"{ratios[name]:.1f}x", ratios[name] >= least) for name, least in wanted]
    )


def variants(name: str, settings: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name the settings of a job, and the same compiled if its scorer can be."""
    plain = SAMPLED | dict(settings)
    compiled = [(f"{name}, compiled", plain | {"training.compile": True})]
    return [(name, plain), *(compiled if settings["model.scorer"] in COMPILED_SCORERS else [])]


def train_against_products(whole: ClientData, dim: int, batches: int, contest: Contest) -> None:
    """Compare a step of one_vs_all, both sides, with its three matrix products."""
    data = cut(whole, batches * BATCH_SIZE, 0)
    num_queries, num_entities = 2 * BATCH_SIZE, len(data.entity_ids)
    contest.enter("products", bare_products(num_queries, num_entities, dim, backward=True, repeats=batches))
    scorers = ("complex", "distmult")
    for scorer in scorers:
        settings = ONE_VS_ALL | {"model.scorer": scorer, "model.dim": dim}
        contest.enter(scorer, our_training(our_client(data, settings)))
    contest.hold()
    work = 2 * 3 * batches * num_queries * num_entities * dim
    rows = [
        (name, f"{batches * BATCH_SIZE / contest.best(name):,.0f}", f"{work / contest.best(name) / 1e9:.0f}")
        for name in ("products", *scorers)
    ]
    title = f"one_vs_all, {num_queries} queries x {num_entities:,} entities: a step, and its three products alone"
    contest.sheet.table(title, ("", "triples per second", "GFLOP/s of the products"), rows)
    shares = [(name, contest.best("products") / contest.best(name)) for name in scorers]
    contest.sheet.verdicts([(f"one_vs_all {name}", ">= 50 %", f"{value:.0%}", value >= 0.5) for name, value in shares])


def rank(whole: ClientData, dim: int, batches: int, contest: Contest) -> None:
    """Compare filtered ranking, both sides, with its matrix product and with PyKEEN's evaluator."""
    num_triples, num_peer = batches * RANKED_AT_ONCE, 2 * PYKEEN_BATCH_RANKED
    num_entities = len(whole.entity_ids)
    products = bare_products(RANKED_AT_ONCE, num_entities, dim, backward=False, repeats=2 * batches)
    contest.enter("products", products)
    scorers = ("complex", "distmult", "transe", "transe, compiled", "rotate", "rotate, compiled")
    for name in scorers:
        scorer, *compiled = name.split(", ")
        settings = ONE_VS_ALL | {"model.scorer": scorer, "model.dim": dim, "training.compile": bool(compiled)}
        contest.enter(name, our_ranking(our_client(cut(whole, len(whole.train), num_triples), settings)))
    contest.enter("PyKEEN transe", pykeen_ranking("transe", cut(whole, len(whole.train), num_peer), dim))
    contest.hold()
    triples = {name: num_triples / contest.best(name) for name in ("products", *scorers)}
    triples["PyKEEN transe"] = num_peer / contest.best("PyKEEN transe")
    rows = [(name, f"{value:,.0f}") for name, value in triples.items()]
    title = f"Filtered ranking, both sides, {num_entities:,} candidates, {RANKED_AT_ONCE} queries at once"
    contest.sheet.table(title, ("", "test triples per second"), rows)
    verdicts = []
    for name in ("complex", "distmult"):
        share = triples[name] / triples["products"]
        verdicts.append((f"ranking {name}", ">= 50 % of the product", f"{share:.0%}", share >= 0.5))
    ratio = triples["transe"] / triples["PyKEEN transe"]
    verdicts.append(("ranking transe", ">= 10x PyKEEN", f"{ratio:.1f}x", ratio >= 10))
    contest.sheet.verdicts(verdicts)


if __name__ == "__main__":
    main()
