"""The config tree: defaults, overrides, round trip and the messages for what is wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsim.config import Config, config_fields, dump_config, load_config, make_config
from fedsim.errors import ConfigError


def test_defaults_are_the_main_job() -> None:
    config = make_config()
    assert (config.data.path, config.data.split, config.data.num_clients) == ("wn_noto", "relation", 3)
    assert config.data.missing_rate == 0.5
    assert (config.federation.strategy, config.model.imputer, config.runtime.kind) == ("mmfed3", "diffusion", "ray")


@pytest.mark.parametrize("comments", [False, True])
def test_a_dumped_config_loads_to_the_same_config(tmp_path: Path, comments: bool) -> None:
    config = make_config(
        {"data": {"modalities": ["text"], "missing_rate": {"text": 0.25, "image": 1.0}}, "output": "runs/with # sign"},
        {"federation.num_rounds": 7, "data.split_file": None},
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config, comments=comments), encoding="utf-8")
    assert load_config(path) == config


def test_every_field_has_a_description_and_every_default_is_valid() -> None:
    fields = dict(config_fields())
    assert all(field.description for field in fields.values())
    assert make_config({}, {path: field.default for path, field in fields.items()}) == Config()


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("federation: {num_rounds: 5, strategy: fede}\n")
    config = load_config(path, {"federation.num_rounds": 9})
    assert (config.federation.num_rounds, config.federation.strategy) == (9, "fede")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"federation.num_round": 3}, ["federation.num_round", "federation.num_rounds"]),
        ({"federation.num_rounds": 0}, ["federation.num_rounds", "= 0", "greater than or equal to 1"]),
        ({"data.missing_rate": 1.5}, ["data.missing_rate", "1.5"]),
        ({"data.split": "sideways"}, ["data.split", "sideways", "'cluster'"]),
        ({"diffusion.sampling_steps": 60}, ["sampling_steps 60", "50"]),
        ({"data.split": "given"}, ["split_file"]),
        ({"training.learning_rate": float("nan")}, ["training.learning_rate"]),
        ({"seed.x": 1}, ["seed"]),
    ],
)
def test_a_wrong_value_is_named_with_its_field_and_rule(overrides: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({}, overrides)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [("- a\n- b\n", "not a list"), ("a: [1,\n", "is not YAML"), ("seed: -1\n", "'seed' = -1")],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert part in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_a_config_does_not_change_after_validation() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_config().seed = 3  # type: ignore[misc]


def test_plain_dump_is_yaml_of_the_whole_tree() -> None:
    tree = yaml.safe_load(dump_config(Config()))
    assert list(tree) == list(Config.model_fields)
