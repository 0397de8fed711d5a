"""What a user gets wrong in config and data, through the command line: one message, exit code 2, nothing left."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from builders import tiny_graph
from experiments import small_options
from fedsim import cli
from fedsim.data.dataset import save_dataset
from fedsim.data.splits import FederatedSplit, make_split, save_split


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data set `tiny`, in which the command runs."""
    save_dataset(tiny_graph(), tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _options(**overrides: Any) -> list[str]:
    settings = {"data.path": "tiny", "federation.num_rounds": 1} | {
        k.replace("__", "."): v for k, v in overrides.items()
    }
    return [*small_options(settings), "--output=run"]


def _fails(capsys: pytest.CaptureFixture[str], args: list[str], parts: list[str]) -> None:
    assert cli.main(args) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    assert len([line for line in shown.err.splitlines() if line.startswith("error:")]) == 1, shown.err
    for part in parts:
        assert part in shown.err, shown.err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("modell: {dim: 8}", ["conf.yaml", "unknown config key 'modell'", "'model"]),
        ("model: {dmi: 8}", ["conf.yaml", "unknown config key 'model.dmi'", "'model.dim'"]),
        ("model: {dim: 7}", ["conf.yaml", "'model.dim' = 7", "multiple of 2"]),
        ("data: {missing_rate: 1.5}", ["'data.missing_rate", "1.5", "less than or equal to 1"]),
        ("diffusion: {steps: 5, sampling_steps: 9}", ["sampling_steps 9 must not exceed steps 5"]),
        ("training: {learning_rate: .nan}", ["'training.learning_rate'", "nan"]),
        ("data: {split: given}", ["data.split_file"]),
        ("training: {corruption: tail}", ["evaluation.protocol 'both' asks for heads", "reciprocal to false"]),
        ("data: {split: random}", ["'data.split' = 'random'", "relation"]),
        ("federation: {num_rounds: many}", ["'federation.num_rounds' = 'many'"]),
        ("- a list", ["conf.yaml must hold sections"]),
        ("a: [1", ["conf.yaml is not YAML"]),
    ],
)
def test_a_config_file(text: str, parts: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "conf.yaml").write_text(text)
    _fails(capsys, ["run", "conf.yaml"], parts)


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("model.scorer", "distmult"),
        ("model.imputer", "diffusion"),
        ("model.fusion", "gate"),
        ("training.loss", "one_vs_all"),
        ("federation.strategy", "mmfed3"),
    ],
)
def test_an_unknown_method(field: str, known: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = _options(**{field: "magic"})
    _fails(capsys, ["run", *options], [f"'{field}' = 'magic': unknown name; choose from", known])


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"data__path": "nowhere"}, ["'nowhere' not found", "wn_noto"]),
        ({"data__modalities": "[audio]"}, ["'data.modalities' names 'audio', but tiny has"]),
        ({"data__num_clients": 99}, ["tiny has 6 and 99 clients", "choose 1..6"]),
        ({"data__num_clients": 99, "data__split": "cluster"}, ["tiny has 6 and 99 clients", "choose 1..6"]),
        ({"data__num_clients": 9999, "data__split": "dirichlet"}, ["9999", "train triples"]),
        ({"federation__cohort_size": 5}, ["'federation.cohort_size' = 5, but there are 2 clients"]),
    ],
)
def test_a_value_that_does_not_fit_the_data(
    overrides: dict[str, Any], parts: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _fails(capsys, ["run", *_options(**overrides)], parts)


def _rewrite(path: Path, line: int, text: str) -> None:
    """Change one line (from 1), and the checksum, so that the line itself is what is wrong."""
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")
    _forget_checksums(path.parent.parent)


def _forget_checksums(data: Path) -> None:
    meta = json.loads((data / "meta.json").read_text())
    meta["checksums"] = {}
    (data / "meta.json").write_text(json.dumps(meta))


def _features(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def damage(data: Path) -> None:
        path = data / "features" / "text.safetensors"
        tensors = {name: value.copy() for name, value in load_file(path).items()}
        change(tensors)
        path.unlink()
        save_file(tensors, path)
        _forget_checksums(data)

    return damage


def _nan(tensors: dict[str, np.ndarray]) -> None:
    tensors["values"][3, 1] = np.nan


def _fewer_rows(tensors: dict[str, np.ndarray]) -> None:
    tensors["values"] = tensors["values"][:-1]


def _no_dim(tensors: dict[str, np.ndarray]) -> None:
    tensors["values"] = tensors["values"][:, 0].copy()


def _empty_split(data: Path) -> None:
    (data / "triples" / "test.tsv").write_text("")
    _forget_checksums(data)


def _altered(data: Path) -> None:
    path = data / "triples" / "valid.tsv"
    path.write_text(path.read_text().replace("e1\t", "e2\t", 1))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (
            lambda data: _rewrite(data / "triples" / "train.tsv", 5, "e1\tr1"),
            ["train.tsv:5: 2 columns where 3", "mend"],
        ),
        (lambda data: _rewrite(data / "triples" / "valid.tsv", 2, "e1\tr1\tzz"), ["valid.tsv:2", "'zz'"]),
        (lambda data: _rewrite(data / "triples" / "test.tsv", 1, "e1\tzz\te2"), ["test.tsv:1", "'zz'"]),
        (_empty_split, ["test.tsv: empty split"]),
        (_altered, ["valid.tsv", "checksum"]),
        (_features(_nan), ["text.safetensors", "3"]),
        (_features(_fewer_rows), ["text.safetensors", "39", "40"]),
        (_features(_no_dim), ["text.safetensors"]),
        (lambda data: (data / "entities.tsv").unlink(), ["entities.tsv"]),
        (lambda data: (data / "meta.json").write_text("{"), ["meta.json"]),
    ],
)
def test_a_broken_data_set(
    damage: Callable[[Path], None], parts: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder / "tiny")
    _fails(capsys, ["run", *_options()], parts)


def _given(split: FederatedSplit) -> list[str]:
    save_split(split, Path("mine.safetensors"))
    return ["run", *_options(data__split="given", data__split_file="mine.safetensors")]


def test_a_client_without_training_triples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = make_split(tiny_graph(), "relation", 2, seed=0)
    for rows in split.rows.values():
        rows[rows[:, 0] == 1, 0] = 2
    gap = FederatedSplit(3, split.train, split.valid, split.test, 0)
    _fails(capsys, _given(gap), ["mine.safetensors", "client 1 has no train triple"])


def test_a_test_entity_that_a_client_never_saw(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = tiny_graph()
    split = make_split(graph, "relation", 2, seed=0)
    moved = split.test.copy()
    moved[:, 0] = 1 - moved[:, 0]
    order = np.argsort(moved[:, 0], kind="stable")
    other = FederatedSplit(2, split.train, split.valid, moved[order], 0)
    _fails(capsys, _given(other), ["mine.safetensors", "train"])


def test_a_split_file_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = _options(data__split="given", data__split_file="nowhere.safetensors")
    _fails(capsys, ["run", *options], ["nowhere.safetensors"])
