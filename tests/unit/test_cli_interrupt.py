"""Ctrl-C in mid-round, with the real simulation in a process of its own."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from builders import tiny_graph
from fedsim import cli
from fedsim.data.dataset import save_dataset
from processes import hear_interrupts

SMALL = ["--model.dim=8", "--diffusion.hidden=8", "--diffusion.num_draws=1", "--distillation.server_steps=1"]


def test_ctrl_c_keeps_the_rounds_and_resume_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_dataset(tiny_graph(), tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    options = ["--data.path=tiny", "--runtime.kind=in_process", "--output=trial", "--federation.num_rounds=30", *SMALL]
    command = [sys.executable, "-u", "-m", "fedsim.cli", "run", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("round  3/30"):
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=280)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "interrupted; continue with: fedsim resume trial"
    assert "Traceback" not in errors
    assert not list(tmp_path.rglob("*.tmp*"))

    assert cli.main(["resume", "trial"]) == 0
    shown = capsys.readouterr().out
    assert "continuing with round" in shown
    assert "round 30/30" in shown
    assert cli.main(["resume", "trial"]) == 2
    assert "is finished" in capsys.readouterr().err
