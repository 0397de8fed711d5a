"""A small part of `benchmarks/fuzz.py`: readers work, or raise fedsim's own error, whatever they are given."""

import random
from pathlib import Path

import pytest
import yaml

from fedsim.errors import DataError, FedSimError
from fedsim.federated.message_checks import find_fault
from fedsim.parsing import MAX_YAML_DEPTH, parse_json, parse_yaml
from fuzzing import messages
from fuzzing.engine import Target, attempt, fuzz
from fuzzing.mutation import change
from fuzzing.targets import all_targets

NUM_INPUTS = 25
# Rendered pages and whole texts of configs take longer.
FEW_INPUTS = {"report-run": 4, "report-benchmark": 4, "report-sweep": 4, "config": 6, "tuned": 8, "recipes": 8}


@pytest.mark.parametrize("name", all_targets())
def test_broken_inputs_are_refused_in_fedsims_own_words(name: str, tmp_path: Path) -> None:
    outcome = fuzz(all_targets()[name], FEW_INPUTS.get(name, NUM_INPUTS), 7, tmp_path)
    assert not outcome.crashes, next(iter(outcome.crashes.values())).text


def _explode(folder: Path) -> None:
    if b"valid" not in (folder / "a.txt").read_bytes():
        raise KeyError("missing")


def _linger(folder: Path) -> None:
    wrong = b"valid" not in (folder / "a.txt").read_bytes()
    while wrong:
        pass


def _litter(folder: Path) -> None:
    if b"valid" not in (folder / "a.txt").read_bytes():
        (folder / "out").mkdir()
        (folder / "out" / "half").touch()
        raise DataError("refused")


def test_the_engine_sees_crashes(tmp_path: Path) -> None:
    """A reader that breaks on anything but one text is found out, and the crash names the place."""
    found = fuzz(Target("t", [{"a.txt": b"valid"}], _explode), 50, 0, tmp_path)
    assert found.num_crashes > 0
    assert all(key.startswith("KeyError at test_fuzzing.py") for key in found.crashes)


def test_the_engine_sees_hangs_and_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzzing.engine.SECONDS", 0.05)
    crash, _ = attempt(Target("t", [], _linger), {"a.txt": b"x"}, tmp_path, 0)
    assert crash is not None
    assert "TooSlow" in crash.key
    crash, _ = attempt(Target("t", [], _litter), {"a.txt": b"x"}, tmp_path, 0)
    assert crash is not None
    assert "left" in crash.text


def test_inputs_follow_from_the_seed() -> None:
    given = next(iter(all_targets().values())).seeds[0]
    first, again, other = (change(random.Random(seed), given, [given]) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    "text",
    [
        "date: 2001-99-99",
        "number: 0b_",
        "[" * 5000,
        "a: &a [*a]",
        "a: !!timestamp x",
        "a: !!python/object/apply:os.system [true]",
        "\n".join(["a0: &a0 [1, 1]", *(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]" for i in range(60))]),
        "[" * (MAX_YAML_DEPTH + 2) + "]" * (MAX_YAML_DEPTH + 2),
        f"a: {'9' * 5000}",
    ],
)
def test_yaml_has_one_kind_of_error(text: str) -> None:
    """Among them 9 lines that stand for 2^60 values."""
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


def test_yaml_that_is_well_is_read() -> None:
    """A shared part is read at each place."""
    assert parse_yaml("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}") == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "{", b"\xff"])
def test_json_has_one_kind_of_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


def test_a_message_that_claims_more_than_it_holds_is_refused() -> None:
    """2^40 ids by a stride of zero are 8 bytes; looking at them one by one would fill the memory."""
    import torch

    claimed = torch.zeros(1, dtype=torch.int64).expand(messages.HUGE)
    for update in (
        messages.ClientUpdate(**{**vars(messages.update()), "entity_ids": claimed}),
        messages.ClientUpdate(**{**vars(messages.update()), "entity": torch.zeros(3, 4, device="meta")}),
    ):
        fault = find_fault(update, messages.FORM, 1, messages.OWNERSHIP, (), messages.LIMIT)
        assert fault is not None


def test_ids_that_would_make_an_absurd_table_are_refused(tmp_path: Path) -> None:
    import pickle

    import numpy as np

    from fedsim.data.importers import import_dataset
    from fuzzing import seeds

    clients = seeds.fede_clients()
    clients[0]["train"]["edge_index_ori"][0, 0] = np.int64(2**40)
    (tmp_path / "fede.pkl").write_bytes(pickle.dumps(clients))
    with pytest.raises(FedSimError, match="has the id 1099511627776"):
        import_dataset(tmp_path / "fede.pkl", tmp_path / "out")


@pytest.mark.parametrize("broken", [{"features": 1}, {"features": {"image": True}}, {"checksums": [1]}])
def test_a_meta_file_of_another_shape_is_refused(tmp_path: Path, broken: dict[str, object]) -> None:
    import json

    from fedsim.data.dataset import load_dataset
    from fuzzing import engine, seeds

    files = seeds.dataset_folder()
    engine.write_input(files | {"meta.json": json.dumps({"format_version": 1} | broken).encode()}, tmp_path / "data")
    with pytest.raises(DataError, match="need an object"):
        load_dataset(tmp_path / "data")


def test_a_grid_is_counted_before_it_is_listed() -> None:
    """Four parameters of 100 values are 10^8 trials."""
    from fedsim.errors import ConfigError
    from tune.search_space import parse_space

    paths = ("diffusion.steps", "training.batch_size", "federation.num_rounds", "training.local_epochs")
    space = parse_space({"space": {path: list(range(1, 101)) for path in paths}}, "s")
    with pytest.raises(ConfigError, match="100000000 trials"):
        space.grid()
