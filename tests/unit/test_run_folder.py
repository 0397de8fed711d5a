"""The folder of a run."""

import errno
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import small_config
from fedsim import run_folder
from fedsim.checkpoint import save_tensors, server_file, write_checkpoint
from fedsim.errors import RunError
from fedsim.run_folder import RunFolder, default_output, git_commit, versions


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(small_config({"output": str(tmp_path / "run")}))


def test_a_new_run_says_what_it_is(folder: RunFolder) -> None:
    again, config = RunFolder.open(folder.path)
    assert config == small_config({"output": str(folder.path)})
    assert again.path == folder.path
    found = json.loads((folder.path / "versions.json").read_text())
    assert set(found) == {"python", "packages", "machine", "git_commit"}
    assert (
        found["packages"]["torch"] == torch.__version__.split("+")[0] or torch.__version__ in found["packages"]["torch"]
    )
    assert folder.read_metrics() == []


def test_a_folder_that_exists_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=r"run exists; continue it with `fedsim resume .*`, or give another --output"):
        RunFolder.create(small_config({"output": str(tmp_path / "run")}))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be made: Not a directory; give another --output"):
        RunFolder.create(small_config({"output": str(tmp_path / "file" / "run")}))


def test_something_else_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run folder"):
        RunFolder.open(tmp_path)


def test_metrics_are_rewound_to_a_round(folder: RunFolder) -> None:
    folder.append_metrics([{"round": 1, "client": 0}, {"round": 1, "client": None}])
    folder.append_metrics([{"round": 2, "client": None}])
    with folder.metrics_file.open("a") as file:
        file.write('{"round": 3, "cli')  # a kill in mid-line
    assert [row["round"] for row in folder.read_metrics()] == [1, 1, 2]
    folder.rewind_metrics(1)
    assert folder.metrics_file.read_text() == '{"round": 1, "client": 0}\n{"round": 1, "client": null}\n'


def test_metrics_on_a_full_disk(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written: no space left; free some space, then"):
        folder.append_metrics([{"round": 1}])


def test_models_are_published_whole(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_checkpoint(
        folder.checkpoints, 1, {}, lambda path: save_tensors({"a": torch.ones(1)}, server_file(path))
    )
    folder.publish_models(made)
    names = sorted(path.name for path in folder.models.iterdir())
    assert names == ["manifest.json", "server.safetensors"]
    folder.publish_models(made)

    def full(source: Path, target: Path) -> None:
        target.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder.shutil, "copytree", full)
    with pytest.raises(RunError, match="models cannot be written: no space left"):
        folder.publish_models(made)
    assert sorted(path.name for path in folder.models.iterdir()) == names
    assert not list(folder.path.glob(".*"))


def test_the_default_folder_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = small_config({"data.path": "/data/wn9"})
    name = default_output(config)
    assert re.fullmatch(r"runs/wn9-mmfed3-\d{8}-\d{6}", name)
    for second in range(3):  # the clock may tick once
        Path(f"{name[:-1]}{(int(name[-1]) + second) % 10}").mkdir(parents=True)
    assert not Path(default_output(config)).exists()


def test_versions_outside_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert git_commit() is None
    assert versions()["packages"]["numpy"] != "not installed"
