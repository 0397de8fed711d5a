"""Checkpoints: whole or absent, verified, pruned."""

import errno
import json
import logging
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedsim import checkpoint
from fedsim.checkpoint import (
    clients_file,
    list_checkpoints,
    load_tensors,
    newest_checkpoint,
    prune_checkpoints,
    read_manifest,
    replace_text,
    save_tensors,
    server_file,
    write_checkpoint,
)
from fedsim.errors import RunError


def _save(folder: Path) -> None:
    save_tensors({"entity": torch.arange(6.0).view(2, 3)}, server_file(folder))
    save_tensors({"params/relation": torch.ones(2)}, clients_file(folder, [3, 5]))


def _write(run: Path, *rounds: int) -> Path:
    checkpoints = run / "checkpoints"
    for round_num in rounds:
        write_checkpoint(checkpoints, round_num, {"round_num": round_num}, _save)
    return checkpoints


def test_a_checkpoint_is_read_back(tmp_path: Path) -> None:
    checkpoints = _write(tmp_path, 7)
    folder, manifest = newest_checkpoint(checkpoints)
    assert folder.name == "round-00007"
    assert sorted(path.name for path in folder.iterdir()) == [
        "clients-00003.safetensors",
        "manifest.json",
        "server.safetensors",
    ]
    assert (manifest["round"], manifest["progress"]) == (7, {"round_num": 7})
    assert torch.equal(load_tensors(server_file(folder))["entity"], torch.arange(6.0).view(2, 3))
    assert not list(checkpoints.glob(".*"))


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = _write(tmp_path, 1, 2, 3, 4, 5)
    prune_checkpoints(checkpoints, 2, 2)
    assert [folder.name for folder in list_checkpoints(checkpoints)] == ["round-00005", "round-00004", "round-00002"]
    prune_checkpoints(checkpoints, 1, None)
    assert [folder.name for folder in list_checkpoints(checkpoints)] == ["round-00005"]


def test_a_round_that_is_done_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    checkpoints = _write(tmp_path, 1)
    write_checkpoint(checkpoints, 1, {"round_num": 1, "again": True}, _save)
    assert newest_checkpoint(checkpoints)[1]["progress"]["again"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut short": ("server.safetensors", _cut, "was cut short or altered"),
    "one bit": ("clients-00003.safetensors", _flip, "was cut short or altered"),
    "empty": ("server.safetensors", lambda path: path.write_bytes(b""), "was cut short or altered"),
    "missing file": ("clients-00003.safetensors", Path.unlink, "is missing"),
    "missing manifest": ("manifest.json", Path.unlink, "missing or damaged"),
    "half a manifest": ("manifest.json", _cut, "missing or damaged"),
    "a manifest of something else": ("manifest.json", lambda path: path.write_text("[1]"), "missing or damaged"),
    "another version": (
        "manifest.json",
        lambda path: path.write_text(json.dumps({"format_version": 99, "sha256": {}})),
        "has format version 99; this fedsim reads version 2",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, damage, message = DAMAGE[kind]
    checkpoints = _write(tmp_path, 1, 2)
    damage(checkpoints / "round-00002" / file)
    with pytest.raises(RunError, match=message) as caught:
        read_manifest(checkpoints / "round-00002")
    assert str(checkpoints / "round-00002" / file) in str(caught.value)
    with caplog.at_level(logging.WARNING):
        folder, _ = newest_checkpoint(checkpoints)
    assert folder.name == "round-00001"
    assert "round-00002 is not used" in caplog.text
    assert message in caplog.text


def test_no_whole_checkpoint_is_an_error_that_lists_the_damage(tmp_path: Path) -> None:
    checkpoints = _write(tmp_path, 1, 2)
    _cut(checkpoints / "round-00001" / "server.safetensors")
    (checkpoints / "round-00002" / "manifest.json").unlink()
    with pytest.raises(RunError, match="has no usable checkpoint") as caught:
        newest_checkpoint(checkpoints)
    text = str(caught.value)
    assert "round-00001" in text
    assert "round-00002" in text
    assert "start the run anew" in text
    with pytest.raises(RunError, match="has no usable checkpoint"):
        newest_checkpoint(tmp_path / "nowhere")


def test_a_save_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoints = _write(tmp_path, 1)

    def fail(folder: Path) -> None:
        _save(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        RunError, match=r"round-00002 cannot be written: no space left; free some space, then"
    ) as caught:
        write_checkpoint(checkpoints, 2, {}, fail)
    assert f"fedsim resume {tmp_path}" in str(caught.value)
    assert [path.name for path in checkpoints.iterdir()] == ["round-00001"]
    assert newest_checkpoint(checkpoints)[0].name == "round-00001"


def test_ctrl_c_while_saving_leaves_nothing_half_written(tmp_path: Path) -> None:
    checkpoints = _write(tmp_path, 1)

    def interrupt(folder: Path) -> None:
        _save(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(checkpoints, 2, {}, interrupt)
    assert [path.name for path in checkpoints.iterdir()] == ["round-00001"]


def test_what_a_kill_left_behind_is_cleared(tmp_path: Path) -> None:
    checkpoints = _write(tmp_path, 1)
    torn = checkpoints / ".round-00002.tmp"
    torn.mkdir()
    (torn / "clients-00099.safetensors").write_bytes(b"half")
    assert newest_checkpoint(checkpoints)[0].name == "round-00001"
    _write(tmp_path, 2)
    assert "clients-00099.safetensors" not in newest_checkpoint(checkpoints)[1]["sha256"]
    assert not torn.exists()


def test_a_place_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="x cannot be written: .*; check the folder's permissions"):
        save_tensors({"a": torch.ones(1)}, tmp_path / "nowhere" / "x")
    with pytest.raises(RunError, match="cannot be read"):
        load_tensors(tmp_path / "nowhere")
    (tmp_path / "bad").write_bytes(b"not tensors")
    with pytest.raises(RunError, match="bad cannot be read"):
        load_tensors(tmp_path / "bad")


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    replace_text(path, "old")

    def full(target: Path, text: str) -> None:
        target.write_text("ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_text", full)
    with pytest.raises(RunError, match="no space left"):
        replace_text(path, "new and longer")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that loses power finds the checkpoint whole or not at all, and the name of a whole one stays."""
    steps: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(handle: int) -> None:
        steps.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        fsync(handle)

    def watched_rename(path: Path, target: Path) -> Path:
        steps.append(f"rename {path.name} to {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    _write(tmp_path, 1)
    assert steps == [
        "sync server.safetensors",
        "sync clients-00003.safetensors",
        "sync manifest.json",
        "sync .round-00001.tmp",
        "rename .round-00001.tmp to round-00001",
        "sync checkpoints",
    ]
    steps.clear()
    replace_text(tmp_path / "result.json", "{}")
    assert steps == ["sync .result.json.tmp", f"sync {tmp_path.name}"]


def test_a_kill_while_an_old_one_is_deleted_leaves_the_newer_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = _write(tmp_path, 1, 2, 3)

    def cut_off(folder: Path) -> None:
        (folder / "manifest.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", cut_off)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoints(checkpoints, 2, None)
    assert newest_checkpoint(checkpoints)[0].name == "round-00003"
    prune_checkpoints(checkpoints, 2, None)
    assert [folder.name for folder in list_checkpoints(checkpoints)] == ["round-00003", "round-00002"]


def test_a_disk_that_takes_no_more_leaves_the_one_before(tmp_path: Path) -> None:
    """The system itself refuses to write, here any file of more than 4 kB."""
    checkpoints = _write(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(RunError, match=r"server.safetensors cannot be written: .*`fedsim resume"):
            write_checkpoint(
                checkpoints, 2, {}, lambda folder: save_tensors({"a": torch.zeros(10_000)}, server_file(folder))
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in checkpoints.iterdir()] == ["round-00001"]
    assert newest_checkpoint(checkpoints)[0].name == "round-00001"
