"""Search spaces and plans: every form is read, and what is wrong is said before anything starts."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders import write_tiny_dataset
from fedsim import cli
from fedsim.errors import ConfigError, RunError
from tune.plan import Settings, SweepPlan, make_plan, read_plan
from tune.search_space import load_space, parse_space, shipped_spaces

STEPS = {"space": {"diffusion.steps": [10, 20]}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


def _plan(space: dict[str, Any], changes: dict[str, Any] | None = None, **settings: Any) -> SweepPlan:
    return make_plan(parse_space(space, "here.yaml"), Path("sweep"), {}, changes or {}, Settings(**settings))


def test_a_grid_walks_through_all_combinations_in_order() -> None:
    space = parse_space({"space": {"diffusion.steps": [10, 20], "model.scorer": ["distmult", "complex"]}}, "s")
    assert [tuple(params.values()) for params in space.grid()] == [
        (10, "distmult"),
        (10, "complex"),
        (20, "distmult"),
        (20, "complex"),
    ]


def test_paths_with_a_comma_get_the_same_value() -> None:
    name = "distillation.logit_to_client, distillation.logit_to_global"
    plan = _plan({"space": {name: [0.5]}}, search="grid")
    weights = plan.config({name: 0.5}).distillation
    assert (weights.logit_to_client, weights.logit_to_global) == (0.5, 0.5)


def test_draws_lie_in_their_ranges_are_unlike_and_come_again_with_the_seed() -> None:
    spec: dict[str, Any] = {
        "distillation.temperature": {"uniform": [1.0, 3.0]},
        "training.learning_rate": {"loguniform": [0.001, 0.1]},
        "data.num_clients": {"randint": [2, 4]},
        "model.gate_hidden": {"lograndint": [8, 64]},
    }
    space = parse_space({"space": spec}, "s")
    draws = space.draws(200, seed=3)
    assert len({json.dumps(params) for params in draws}) == 200
    for item in space.parameters:
        values = [params[item.name] for params in draws]
        low, high = item.values
        assert low <= min(values) <= max(values) <= high
    assert {params["data.num_clients"] for params in draws} == {2, 3, 4}
    # Half of log-uniform draws lie below the geometric mean, 0.01; of uniform ones 9 % would.
    assert 70 < sum(params["training.learning_rate"] < 0.01 for params in draws) < 130
    assert space.draws(200, seed=3) == draws
    assert space.draws(200, seed=4) != draws


def test_a_small_space_gives_each_combination_once() -> None:
    assert sorted(p["diffusion.steps"] for p in parse_space(STEPS, "s").draws(9, seed=0)) == [10, 20]


def test_a_python_file_may_use_what_ray_tune_draws_from(tmp_path: Path) -> None:
    path = tmp_path / "space.py"
    path.write_text(
        "from ray import tune\n"
        "space = {'training.learning_rate': tune.loguniform(0.001, 0.1), 'data.num_clients': tune.randint(2, 5),\n"
        "         'model.scorer': tune.choice(['complex', 'rotate']), 'diffusion.steps': tune.grid_search([5, 9])}\n"
    )
    space = load_space(str(path))
    assert [(item.kind, item.values) for item in space.parameters] == [
        ("loguniform", (0.001, 0.1)),
        ("randint", (2, 4)),
        ("choice", ("complex", "rotate")),
        ("choice", (5, 9)),
    ]
    assert parse_space(space.as_plain(), str(path)) == space


@pytest.mark.parametrize("name", sorted(shipped_spaces()))
def test_shipped_spaces_are_planned(name: str) -> None:
    plan = make_plan(load_space(name), Path("sweep"), {}, {}, Settings(num_trials=8))
    assert plan.num_trials == 8
    assert plan.space.title


def test_the_three_questions_of_the_project_have_a_space() -> None:
    overview = {path for item in load_space("overview").parameters for path in item.paths}
    weights = {f"distillation.{kind}_to_{whom}" for kind in ("logit", "feature") for whom in ("client", "global")}
    assert overview == {"diffusion.steps", "data.num_clients"} | weights
    (clients,) = [item for item in load_space("overview").parameters if item.name == "data.num_clients"]
    assert clients.values == (3, 5, 10)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"space": {"diffusion.step": [1]}}, "unknown config path 'diffusion.step'; the nearest is 'diffusion.steps'"),
        ({"spaces": {}}, "must hold `space`"),
        ({"space": {"diffusion.steps": [5]}, "extra": 1}, "unknown key 'extra'"),
        ({"space": {"diffusion.steps": 5}}, "diffusion.steps: 5 is not understood"),
        (
            {"space": {"diffusion.steps": [5, datetime.date(2001, 1, 1)]}},
            "diffusion.steps: datetime.date(2001, 1, 1) is no number, text, list or null; put text in quotes",
        ),
        (
            {"settings": {"data.path": datetime.date(2001, 1, 1)}, "space": {"diffusion.steps": [5]}},
            "settings: data.path: datetime.date(2001, 1, 1) is no number",
        ),
        ({"space": {"diffusion.steps": []}}, "no values to try"),
        ({"space": {"diffusion.steps": {"unifrm": [1, 2]}}}, "unknown kind 'unifrm', the nearest is 'uniform'"),
        ({"space": {"diffusion.steps": {"randint": [9, 2]}}}, "randint needs two numbers"),
        ({"space": {"diffusion.steps": {"randint": [1.5, 2]}}}, "randint needs whole numbers"),
        ({"space": {"training.learning_rate": {"loguniform": [0, 1]}}}, "loguniform needs numbers above 0"),
        ({"space": {"runtime.placement": ["pooled"]}}, "'runtime.placement' is what the sweep decides"),
        ({"space": {"diffusion.steps": [5]}, "settings": {"diffusion.steps": 9}}, "'diffusion.steps' is set twice"),
        ({"space": {"diffusion.steps": [5]}, "settings": {"model.dm": 9}}, "unknown config path 'model.dm'"),
    ],
)
def test_a_space_that_is_wrong_is_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"search space here\.yaml") as err:
        parse_space(space, "here.yaml")
    assert message in str(err.value)


@pytest.mark.parametrize(
    ("space", "settings", "message"),
    [
        ({"diffusion.steps": [10, 0]}, {}, r"diffusion.steps=0 is refused: config field 'diffusion.steps' = 0"),
        ({"model.scorer": ["complex", "compex"]}, {}, "model.scorer=compex is refused: .*choose from"),
        ({"diffusion.steps": [2, 50], "diffusion.sampling_steps": [1, 4]}, {}, "must not exceed steps 2"),
        ({"diffusion.steps": {"randint": [0, 9]}}, {"search": "optuna"}, "diffusion.steps=0 is refused"),
        ({"training.learning_rate": {"uniform": [0, 1]}}, {}, "training.learning_rate=0 is refused"),
        ({"diffusion.steps": {"randint": [5, 9]}}, {"search": "grid"}, "is a range, which a grid cannot walk through"),
        ({"diffusion.steps": [5, 9, 10]}, {"search": "grid", "num_trials": 2}, "its grid has 3 trials, but --trials"),
        ({"diffusion.steps": [5, 9]}, {"scheduler": "pbt"}, "'diffusion.steps' cannot change in a running federation"),
    ],
)
def test_values_that_the_config_refuses_are_said_before_anything_starts(
    space: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _plan({"space": space}, **settings)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"search": "grid"}, "leave --search out"),
        ({}, {"num_trials": 1}, "a population of 2 or more"),
        ({}, {"interval": 20}, "leaves no change within federation.num_rounds 15"),
        ({"evaluation.every": 2}, {}, "--pbt-interval 3 must be a multiple of evaluation.every 2"),
        ({"federation.strategy": "fede"}, {}, "federation.strategy fede has no distillation weights"),
        ({"distillation.schedule": [{"from_round": 3, "logit_to_client": 1.0}]}, {}, "leave it out"),
        (
            {f"distillation.{name}": 0 for name in ("logit_to_global", "feature_to_client", "feature_to_global")},
            {},
            "one of the four distillation weights above 0 at all times",
        ),
    ],
)
def test_what_a_population_cannot_do_is_refused(
    changes: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _plan({"space": {"distillation.logit_to_client": [0.0, 1.0]}}, changes, scheduler="pbt", **settings)


def test_an_option_that_the_space_varies_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--diffusion\.steps is what search space here\.yaml varies"):
        _plan(STEPS, {"diffusion.steps": 5})


def test_options_win_over_the_settings_of_a_space() -> None:
    plan = _plan(STEPS | {"settings": {"federation.num_rounds": 4, "model.dim": 16}}, {"federation.num_rounds": 7})
    config = plan.config({"diffusion.steps": 10}, "trial-00000")
    assert (config.federation.num_rounds, config.model.dim, plan.max_rounds) == (7, 16, 7)
    assert config.output == str(plan.folder / "trials" / "trial-00000")


def test_files_are_found_from_any_folder(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dataset.parent)
    assert _plan(STEPS, {"data.path": "tiny"}).config({}).data.path == str(dataset)
    assert _plan(STEPS).config({}).data.path == "wn_noto"


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    space = parse_space({"space": {"training.learning_rate": {"loguniform": [0.001, 0.1]}}}, "s.yaml")
    plan = make_plan(space, tmp_path / "sweep", {}, {"seed": 5}, Settings(num_trials=3, concurrent=2))
    plan.write()
    assert read_plan(tmp_path / "sweep") == plan
    assert plan.seed == 5


def test_a_sweep_of_another_version_is_refused(tmp_path: Path) -> None:
    make_plan(parse_space(STEPS, "s.yaml"), tmp_path, {}, {}, Settings()).write()
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fedsim": "0.0.1"}))
    with pytest.raises(RunError, match=r"is a sweep of fedsim 0\.0\.1 \(format 1\), and this is fedsim"):
        read_plan(tmp_path)
    path.write_text("{")
    with pytest.raises(RunError, match=r"plan\.json is damaged"):
        read_plan(tmp_path)
    with pytest.raises(RunError, match="is not a sweep"):
        read_plan(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere.yaml", "--output", "sweep"], "search space nowhere.yaml is not there; give a YAML or Python file"),
        (["wrong.yaml", "--output", "sweep"], "the nearest is 'diffusion.steps'"),
        (["wrong.yaml"], "give --output"),
        ([], "give a search space"),
        (["--resume", "sweep"], "sweep is not a sweep"),
        (["--resume", "sweep", "--trials", "3"], "--trials beside --resume"),
        (["--resume", "sweep", "--model.dim", "8"], "--model.dim beside --resume"),
    ],
)
def test_the_command_says_what_is_wrong_and_makes_nothing(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text(yaml.safe_dump({"space": {"diffusion.stps": [1]}}))
    assert cli.main(["tune", *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("sweep").exists()


def test_the_command_lists_the_shipped_spaces(capsys: Any) -> None:
    assert cli.main(["tune", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in shipped_spaces())
