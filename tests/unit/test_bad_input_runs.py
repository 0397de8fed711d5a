"""Run folders, damaged checkpoints and full disks, through the command line and on real runs."""

import contextlib
import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import tiny_graph
from experiments import read_files, small_options
from fedsim import checkpoint, cli, simulation
from fedsim.checkpoint import load_tensors
from fedsim.data.dataset import save_dataset

NUM_ROUNDS = 4


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run, and the same run killed after three of its four rounds."""
    folder = tmp_path_factory.mktemp("runs")
    save_dataset(tiny_graph(), folder / "tiny")
    assert cli.main(["run", *_options(folder, "unbroken")]) == 0
    _kill_after(3, folder, "broken")
    return folder


def _options(folder: Path, name: str, **overrides: Any) -> list[str]:
    settings = {"data.path": folder / "tiny", "federation.num_rounds": NUM_ROUNDS, **overrides}
    return [*small_options(settings), f"--output={folder / name}"]


def _kill_after(round_num: int, data: Path, name: str, folder: Path | None = None) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        real = simulation.sample_cohort

        def sample(config: Any, clients: Any, number: int) -> list[int]:
            if number > round_num:
                raise Killed
            return real(config, clients, number)

        patch.setattr(simulation, "sample_cohort", sample)
        options = _options(data, name)
        options[-1] = f"--output={(folder or data) / name}"
        with pytest.raises(Killed):
            cli.main(["run", *options])
    return (folder or data) / name


@pytest.fixture
def broken(runs: Path, tmp_path: Path) -> Path:
    """A copy of the killed run."""
    return Path(shutil.copytree(runs / "broken", tmp_path / "broken"))


def _shown(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert "Logging error" not in text
    return text


def _same_end(run: Path, unbroken: Path) -> None:
    """The final models have the same bits, the results the same numbers."""
    names = sorted(path.name for path in (unbroken / "models").glob("*.safetensors"))
    assert names == sorted(path.name for path in (run / "models").glob("*.safetensors"))
    for name in names:
        ours, theirs = (load_tensors(folder / "models" / name) for folder in (run, unbroken))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    texts = [
        re.sub(r'"seconds": \{.*?\}', "", (folder / "result.json").read_text(), flags=re.S)
        for folder in (run, unbroken)
    ]
    assert texts[0] == texts[1]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(bytes(content))


def test_a_run_folder_that_exists(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_files(runs / "unbroken")
    capsys.readouterr()
    assert cli.main(["run", *_options(runs, "unbroken")]) == 2
    shown = _shown(capsys)
    assert "unbroken exists; continue it with `fedsim resume" in shown
    assert "--output" in shown
    assert read_files(runs / "unbroken") == before


@pytest.mark.parametrize("damage", [_cut, _alter, Path.unlink])
@pytest.mark.parametrize("file", ["clients-00001.safetensors", "server.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: Callable[[Path], None], file: str, broken: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(broken / "checkpoints" / "round-00003" / file)
    assert cli.main(["resume", str(broken)]) == 0
    captured = capsys.readouterr()
    assert "warning: checkpoint round-00003 is not used" in captured.err
    assert file in captured.err
    assert "continuing with round 3 of 4" in captured.out
    _same_end(broken, runs / "unbroken")


def test_no_usable_checkpoint(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (broken / "checkpoints").iterdir():
        _cut(folder / "server.safetensors")
    before = read_files(broken / "checkpoints")
    for command in ("resume", "evaluate"):
        assert cli.main([command, str(broken)]) == 2
        shown = _shown(capsys)
        assert shown.count("error:") == 1
        assert "has no usable checkpoint" in shown
        assert "start the run anew with `fedsim run`" in shown
    assert read_files(broken / "checkpoints") == before


def test_damaged_best_models_are_found_before_the_training_goes_on(
    broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With round 1 the best and damaged, resuming must not train first and fail last."""
    newest = checkpoint.newest_checkpoint(broken / "checkpoints")[0]
    manifest = (newest / "manifest.json").read_text()
    oldest = sorted((broken / "checkpoints").iterdir())[0]
    assert oldest != newest
    number = int(oldest.name.removeprefix("round-"))
    (newest / "manifest.json").write_text(re.sub(r'"best_round": \d+', f'"best_round": {number}', manifest))
    _alter(oldest / "server.safetensors")
    assert cli.main(["resume", str(broken)]) == 2
    captured = capsys.readouterr()
    assert "the run's best models are lost: start it anew" in captured.err
    assert "round " not in captured.out


@pytest.mark.parametrize("text", ["model: {dim: seven}", "modell: {}", "{"])
def test_a_run_whose_config_was_edited(text: str, broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (broken / "config.yaml").write_text(text)
    assert cli.main(["resume", str(broken)]) == 2
    assert f"config file {broken / 'config.yaml'}" in _shown(capsys)


def test_a_run_whose_data_set_is_gone(broken: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = (broken / "config.yaml").read_text()
    (broken / "config.yaml").write_text(config.replace(str(runs / "tiny"), str(runs / "gone")))
    assert cli.main(["resume", str(broken)]) == 2
    shown = _shown(capsys)
    assert "gone" in shown
    assert "not found" in shown


@pytest.mark.parametrize("where", ["client", "server", "manifest", "metrics", "models", "result"])
def test_no_space_left_at_any_file(
    where: str, broken: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever file is the one that does not fit: one message, all that was there stays, and resuming works."""
    kept = read_files(broken / "checkpoints")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where in ("client", "server"):
            real = checkpoint.save_file
            patch.setattr(
                checkpoint,
                "save_file",
                lambda tensors, path: full() if path.name.startswith(where) else real(tensors, path),
            )
        elif where in ("manifest", "result"):
            write = checkpoint.write_text
            patch.setattr(
                checkpoint,
                "write_text",
                lambda path, text: full() if f"{where}.json" in path.name else write(path, text),
            )
        elif where == "metrics":
            patch.setattr(
                Path,
                "open",
                lambda path, *args, _open=Path.open, **kwargs: (
                    full() if path.name == "metrics.jsonl" and "a" in args else _open(path, *args, **kwargs)
                ),
            )
        else:
            patch.setattr(shutil, "copytree", full)
        assert cli.main(["resume", str(broken)]) == 2
    shown = _shown(capsys)
    assert "cannot be written: no space left; free some space, then continue with `fedsim resume" in shown
    found = read_files(broken / "checkpoints")
    if where in ("client", "server", "manifest", "metrics"):
        assert found == kept
    assert not [name for name in found if ".tmp" in name]
    assert cli.main(["resume", str(broken)]) == 0
    _same_end(broken, runs / "unbroken")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that can really be filled; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=20)
    except OSError:
        pytest.skip("mount is not there")
    if done.returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)


def _fill(folder: Path, leave: int) -> Path:
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, max(ballast.stat().st_size - leave, 0))
    return ballast


@pytest.mark.parametrize("leave", [0, 8192, 65536])
def test_a_disk_that_is_really_full(
    leave: int, small_disk: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With no page, two pages or part of a checkpoint left; the checkpoints stay, and resuming works afterwards."""
    run = _kill_after(3, runs, f"run{leave}", small_disk)
    kept = read_files(run / "checkpoints")
    capsys.readouterr()
    ballast = _fill(small_disk, leave)
    assert cli.main(["resume", str(run)]) == 2
    shown = _shown(capsys)
    assert shown.count("error:") == 1
    assert "no space left; free some space, then continue with `fedsim resume" in shown
    assert read_files(run / "checkpoints") == kept
    ballast.unlink()
    assert cli.main(["resume", str(run)]) == 0
    _same_end(run, runs / "unbroken")


def test_a_new_run_on_a_full_disk_leaves_nothing(
    small_disk: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _fill(small_disk, 0)
    options = _options(runs, "new")
    options[-1] = f"--output={small_disk / 'new'}"
    assert cli.main(["run", *options]) == 2
    shown = _shown(capsys)
    assert "new cannot be written: No space left on device; nothing was kept" in shown
    assert not (small_disk / "new").exists()
