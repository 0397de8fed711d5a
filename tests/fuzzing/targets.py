"""What is fuzzed: everything in fedsim that reads what somebody else may have written."""

import contextlib
import io
import pickle
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.benchmark.recipes import FOLDER, read_recipes
from fedsim.benchmark.tuned import BUNDLED, read_tuned
from fedsim.checkpoint import load_tensors, newest_checkpoint
from fedsim.cli import commands
from fedsim.config import dump_config, load_config, make_config
from fedsim.data.dataset import load_dataset
from fedsim.data.importers import import_dataset
from fedsim.data.importers.features import read_features
from fedsim.data.splits import load_split
from fedsim.federated.trace_file import read_trace
from fedsim.run_folder import RunFolder
from fuzzing import seeds
from fuzzing.engine import Target
from fuzzing.folders import run_targets
from fuzzing.messages import message_targets
from fuzzing.mutation import Input, any_value, change
from tune.search_space import SHIPPED, load_space

NUM_DRAWN = 3  # trials of a search space


@cache
def all_targets() -> dict[str, Target]:
    """Make the targets, by name; the seeds take a moment."""
    targets = [*_import_targets(), *_data_targets(), *_text_targets(), *run_targets(), *message_targets()]
    return {target.name: target for target in targets}


def _import(folder: Path) -> None:
    import_dataset(folder, folder / "out" / "imported", mend_valid=len(list(folder.iterdir())) % 2 == 0)


def _import_pickle(folder: Path) -> None:
    import_dataset(folder / "fede.pkl", folder / "out" / "imported")


def _read_features(folder: Path) -> None:
    for path in folder.iterdir():
        read_features(path, "image", seeds.NUM_ENTITIES)


def _load_split(folder: Path) -> None:
    for path in folder.iterdir():
        load_split(path, seeds.graph(), move_unseen=True)


def _import_targets() -> list[Target]:
    return [
        Target("import-names", [seeds.names_source(tables=False), seeds.names_source(tables=True)], _import, 0.5),
        Target("import-ids", [seeds.ids_source()], _import, 0.5),
        Target("import-openke", [seeds.openke_source()], _import, 0.5),
        Target("import-fede", seeds.fede_pickles(), _import_pickle, 0.7, _change_pickle),
    ]


def _change_pickle(generator: random.Random, given: Input, others: Sequence[Input]) -> Input:
    """Break the bytes of a pickle, or pickle something else than FedE did."""
    if generator.random() < 0.7:
        return change(generator, given, others)
    clients: Any = seeds.fede_clients()
    part = generator.choice(clients)[generator.choice(("train", "valid", "test"))]
    strange = generator.choice(
        (
            any_value(generator),
            np.full((2, 2), generator.choice((-1, 0, 5, 10**6, 2**31, 2**62))),
            np.array(["a", "b"]),
            np.array([{"a": 1}, None], dtype=object),
            np.zeros((2, 2), np.complex64),
            np.zeros((2, 0), np.int64),
            np.array(3),
            np.zeros(2, "datetime64[s]"),
            np.zeros(2, [("a", "i4")]),
            np.zeros((2, 2), np.uint64) + np.uint64(2**64 - 1),
            clients,
        )
    )
    part[generator.choice(("edge_index_ori", "edge_type_ori"))] = strange
    whole = generator.choice((clients, clients, clients, strange, [strange], {"clients": clients}))
    return {"fede.pkl": pickle.dumps(whole, generator.choice((0, 2, 4, 5)))}


def _data_targets() -> list[Target]:
    features = [
        Target(f"features-{kind}", [files], _read_features, 0.5 if kind == "pth" else 1.5)
        for kind, files in seeds.feature_files().items()
    ]
    folders = [seeds.dataset_folder(), seeds.parquet_folder()]
    return [
        *features,
        Target("data-set", folders, lambda folder: load_dataset(folder), 1.0, _change_data_set),
        Target("split-file", seeds.split_files(), _load_split, 1.5),
        Target("trace", [{"trace.csv": TRACE}], lambda folder: read_trace(folder / "trace.csv", [0, 1]), 3.0),
    ]


TRACE = b"client,round,available,speed\n0,1,1,1.0\n1,1,0,2\n0,3,0,0.5\n1,4,1,1e1\n"


def _change_data_set(generator: random.Random, given: Input, others: Sequence[Input]) -> Input:
    """Break a file, or write another table as parquet."""
    if generator.random() < 0.85:
        return change(generator, given, others)
    column: Any = generator.choice(
        (["e0", None], [1, 2], [1.5, 2.5], [b"e0", b"e1"], [["e0"], ["e1"]], [{"a": 1}, {"a": 2}], ["e0", "e1"], [])
    )
    names = generator.choice(
        (("head", "relation", "tail"), ("head", "tail"), ("a",), ("head", "relation", "tail", "x"))
    )
    return given | {"triples/train.parquet": seeds.parquet(dict.fromkeys(names, column))}


def _load_config(folder: Path) -> None:
    config = load_config(folder / "config.yaml")
    dump_config(config, comments=True)
    options = folder / "options.args"
    text = options.read_text(encoding="utf-8", errors="replace") if options.is_file() else ""
    arguments = text.replace("\x00", "").split("\n")
    with contextlib.redirect_stdout(io.StringIO()):
        commands.main(["config", *arguments], prog_name="fedsim", standalone_mode=False)


def _load_space(folder: Path) -> None:
    space = load_space(str(folder / "space.yaml"))
    space.draws(NUM_DRAWN, seed=1)
    list(space.corners())
    if all(item.kind == "choice" for item in space.parameters):
        space.grid()


def _text_targets() -> list[Target]:
    plain = dump_config(make_config()).encode()
    short = seeds.as_yaml({"seed": 1, "data": {"missing_rate": {"image": 0.5}}, "federation": {"num_rounds": 3}})
    options = b"--federation.num_rounds=3\n--data.missing_rate={image: 0.5}\n--model.imputer=mean\n--seed=1"
    recipes = [{"recipe.yaml": path.read_bytes()} for path in sorted(FOLDER.glob("*.yaml"))]
    spaces = [{"space.yaml": path.read_bytes()} for path in sorted(SHIPPED.glob("*.yaml"))]
    configs = [{"config.yaml": text, "options.args": options} for text in (plain, short)]
    return [
        Target("config", configs, _load_config, 0.1),
        Target("tuned", [{"tuned.yaml": BUNDLED.read_bytes()}], lambda folder: read_tuned(folder / "tuned.yaml"), 0.3),
        Target("recipes", recipes, lambda folder: read_recipes(folder / "recipe.yaml"), 0.3),
        Target("search-space", spaces, _load_space, 0.15),
        Target("checkpoint", [_checkpoint()], _read_checkpoint, 1.5),
    ]


def _checkpoint() -> Input:
    from tempfile import TemporaryDirectory

    import torch

    from fedsim.checkpoint import save_clients, save_tensors, server_file, write_checkpoint

    def save(folder: Path) -> None:
        save_tensors({"entity": torch.zeros(2, 2)}, server_file(folder))
        save_clients({0: {"params/relation": torch.zeros(2)}}, folder)

    with TemporaryDirectory() as place:
        for round_num in (1, 2):
            write_checkpoint(Path(place) / "checkpoints", round_num, {"best_round": 1}, save)
        return seeds.folder_of(Path(place))


def _read_checkpoint(folder: Path) -> None:
    found, manifest = newest_checkpoint(folder / "checkpoints")
    for path in (found / name for name in manifest["sha256"]):
        load_tensors(path)
    RunFolder(folder).newest_checkpoint()
