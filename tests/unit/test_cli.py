"""The command line: options from the config tree, messages, exit codes."""

import logging
from pathlib import Path

import numpy as np
import pytest

from builders import tiny_graph
from fedsim import cli
from fedsim.config import config_fields, load_config, make_config
from fedsim.data.dataset import save_dataset


def _no_traceback(text: str) -> bool:
    return "Traceback" not in text


def test_help_names_every_config_field_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--help"]) == 0
    text = capsys.readouterr().out
    for path, _ in config_fields():
        assert f"--{path} " in text
    assert "[default: wn_noto]" in " ".join(text.split())


def test_config_prints_what_run_would_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("federation: {num_rounds: 5, strategy: fede}\n")
    options = ["--federation.num_rounds", "9", "--data.missing_rate", "{text: 0.25}", "--data.modalities", "[text]"]
    options += ["--training.learning_rate", "1e-3", "--output", "5", "--runtime.address", "null", "--seed", "4"]
    assert cli.main(["config", str(path), *options]) == 0
    text = capsys.readouterr().out
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(text)
    expected = make_config(
        {"federation": {"num_rounds": 9, "strategy": "fede"}, "output": "5", "seed": 4},
        {"data.missing_rate": {"text": 0.25}, "data.modalities": ["text"], "training.learning_rate": 0.001},
    )
    assert load_config(resolved) == expected
    assert "# federation rounds" in text


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["run", "--federation.num_round", "3"], ["No such option", "--federation.num_rounds"]),
        (["run", "--federation.num_rounds", "0"], ["federation.num_rounds", "greater than or equal to 1"]),
        (["run", "--data.missing_rate", "[1"], ["data.missing_rate", "not a YAML value"]),
        (["run", "nowhere.yaml"], ["nowhere.yaml cannot be read"]),
        (["rum"], ["No such command", "run"]),
        (["resume", "nowhere"], ["nowhere is not a run folder"]),
        (["evaluate", "nowhere"], ["nowhere is not a run folder"]),
        (["predict", "nowhere", "--relation", "r", "--head", "a", "--tail", "b"], ["--head", "--tail"]),
        (["predict", "nowhere", "--relation", "r", "--head", "a"], ["nowhere is not a run folder"]),
        (["data", "split", "nowhere", "out.safetensors"], ["'nowhere' not found"]),
        (["data", "split", "nowhere", "out.txt"], ["out.txt", ".safetensors"]),
        (["data", "encode", "nowhere"], ["'nowhere' not found"]),
        (["data", "import", "nowhere", "out"], ["nowhere"]),
        (["data", "import", "nowhere", "out", "--feature", "image"], ["MODALITY=FILE"]),
        (["data", "import", "nowhere", "out", "--format", "fancy"], ["'fancy'", "openke"]),
    ],
)
def test_what_a_user_gets_wrong_is_one_message_and_exit_code_2(
    args: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert _no_traceback(shown.err)
    for part in parts:
        assert part in shown.err
    assert not list(tmp_path.iterdir())


def test_split_writes_a_split_that_another_run_of_it_equals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_dataset(tiny_graph(), tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "split", "tiny", "a.safetensors", "--kind", "cluster", "--num-clients", "2"]) == 0
    assert "train" in capsys.readouterr().out
    assert cli.main(["data", "info", "tiny", "--split", "a.safetensors"]) == 0
    assert "image features" in capsys.readouterr().out
    assert cli.main(["data", "split", "tiny", "b.safetensors", "--from", "a.safetensors"]) == 0
    assert cli.main(["data", "split", "tiny", "a.safetensors"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert cli.main(["data", "split", "tiny", "c.safetensors", "--num-clients", "99"]) == 2
    assert "99" in capsys.readouterr().err
    assert not (tmp_path / "c.safetensors").exists()
    assert cli.main(["data", "split", "tiny", "c.safetensors", "--from", "a.safetensors", "--seed", "1"]) == 2
    assert "--from" in capsys.readouterr().err


def test_import_makes_a_data_set_that_split_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    (source / "train.txt").write_text("a\tr\tb\nb\ts\tc\nc\tr\td\n")
    (source / "valid.txt").write_text("a\tr\tc\n")
    (source / "test.txt").write_text("b\tr\td\n")
    (source / "entities.tsv").write_text("key\na\nb\nc\nd\n")
    np.save(source / "visual.npy", np.ones((4, 3), dtype=np.float32))
    assert cli.main(["data", "import", "source", "made", "--feature", "image=source/visual.npy"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "train triples" in shown
    assert "image features" in shown
    assert cli.main(["data", "split", "made", "one.safetensors", "--num-clients", "1"]) == 0
    assert cli.main(["data", "import", "source", "made"]) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_command_closes_no_log_of_its_host() -> None:
    """A library's handler may hold a stream that is not its own; Python ends all logs when the process ends."""

    class Log(logging.Handler):
        closed = False

        def close(self) -> None:
            self.closed = True
            super().close()

    log = Log()
    assert cli.main(["config"]) == 0
    assert not log.closed
