"""The plan of a benchmark: its cells, their configs and folders, and what is refused before anything runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builders import write_tiny_dataset
from fedsim.benchmark.folder import check_free, locked, manifest_of, open_folder
from fedsim.benchmark.methods import METHODS
from fedsim.benchmark.plan import Missing, Plan, check_changes, check_trials, parse_missing
from fedsim.benchmark.recipes import Recipe, TuningBudget, find_data, select_recipes
from fedsim.benchmark.tuned import Tuned
from fedsim.config import Config
from fedsim.errors import ConfigError, DataError, RunError


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Two methods, one of them the same at all rates, at two rates and two seeds."""
    write_tiny_dataset(tmp_path / "tiny")
    settings = {"data.path": str(tmp_path / "tiny"), "federation.num_rounds": 4, "model.dropout": 0.1}
    recipe = Recipe("tiny-3", "tiny", "tiny", "fedsim data import A B", settings, ("0", "0.5"), TuningBudget())
    return Plan(
        output=tmp_path / "out",
        recipes=[recipe],
        methods=[METHODS["local"], METHODS["mmfede-mean"]],
        rates={"tiny-3": [parse_missing("0.5"), parse_missing("client:0.3")]},
        num_seeds=2,
        tuned=Tuned({"tiny": {"local": {"model.dropout": 0.2}}}),
        changes={},
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", Missing("0", "random", 0.0)),
        ("0.30", Missing("0.3", "random", 0.3)),
        (" 1 ", Missing("1", "random", 1.0)),
        ("client", Missing("client-0.5", "client", 0.5)),
        ("client:0.34", Missing("client-0.34", "client", 0.34)),
    ],
)
def test_missing_rates_are_read(text: str, expected: Missing) -> None:
    assert parse_missing(text) == expected


@pytest.mark.parametrize("text", ["1.1", "-0.1", "nan", "half", "", "0.3:0.3", "client:2", "client:", "random:0.2"])
def test_missing_rates_outside_0_to_1_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="from 0 to 1, client, or client:SHARE"):
        parse_missing(text)


def test_cells_come_seed_by_seed_and_one_run_serves_all_rates_of_a_method_that_fixes_its_own(plan: Plan) -> None:
    folders = [cell.folder.relative_to(plan.output).as_posix() for cell in plan.cells()]
    assert folders == [
        "tiny-3/any/local/seed0",
        "tiny-3/0.5/mmfede-mean/seed0",
        "tiny-3/client-0.3/mmfede-mean/seed0",
        "tiny-3/any/local/seed1",
        "tiny-3/0.5/mmfede-mean/seed1",
        "tiny-3/client-0.3/mmfede-mean/seed1",
    ]


def test_a_cells_config_is_that_of_recipe_tuning_changes_rate_method_and_seed(plan: Plan) -> None:
    local, mean, blind, *_ = plan.cells()
    assert (local.config.model.dropout, mean.config.model.dropout) == (0.2, 0.1)
    assert (local.config.data.missing_rate, local.config.data.missing_pattern) == (0.0, "random")
    assert (mean.config.data.missing_rate, mean.config.data.missing_pattern) == (0.5, "random")
    assert (blind.config.data.missing_rate, blind.config.data.missing_pattern) == (0.3, "client")
    assert mean.config.federation.strategy == "fede"
    assert mean.config.model.imputer == "mean"
    assert mean.config.runtime.kind == "in_process"
    assert mean.config.output == str(mean.folder)
    assert [cell.config.seed for cell in plan.cells()] == [0, 0, 0, 1, 1, 1]
    changed = replace(plan, changes={"federation.num_rounds": 9, "model.dropout": 0.4}, on_gpu=True).cells()[0]
    assert (changed.config.federation.num_rounds, changed.config.model.dropout) == (9, 0.4)
    assert changed.config.runtime.gpus_per_client == 1.0


def test_settings_of_a_part_are_those_of_the_methods_that_have_it(plan: Plan) -> None:
    """A method's strategy, imputer and fusion count; tuned values win, and a recipe's other settings stay."""
    parts = {"local": {"model.dropout": 0.3, "training.batch_size": 8}, "mean": {"training.batch_size": 16}}
    recipe = replace(plan.recipes[0], parts=parts | {"gate": {"model.dim": 12}})
    local, mean, *_ = replace(plan, recipes=[recipe]).cells()
    assert (local.config.model.dropout, local.config.training.batch_size) == (0.2, 8)
    assert (mean.config.model.dropout, mean.config.training.batch_size) == (0.1, 16)
    assert (local.config.model.dim, mean.config.model.dim) == (Config().model.dim, 12)
    assert {local.config.federation.num_rounds, mean.config.federation.num_rounds} == {4}
    changed = replace(plan, recipes=[recipe], changes={"training.batch_size": 4}).cells()
    assert {cell.config.training.batch_size for cell in changed} == {4}


def test_an_option_may_not_be_what_trials_vary_but_own_trials_that_are_left_out_vary_nothing(plan: Plan) -> None:
    recipe, method = plan.recipes[0], METHODS["mmfed3-hide"]
    changes = {"distillation.logit_to_client": 1.0}
    with pytest.raises(ConfigError, match="is what the trials of mmfed3-hide on tiny-3 vary"):
        check_trials([recipe], [method], changes)
    without = replace(recipe, tuning=TuningBudget(own_trials=False))
    check_trials([without], [method], changes)
    with pytest.raises(ConfigError, match="--model.dropout is what the trials"):
        check_trials([without], [method], {"model.dropout": 0.1})


def test_settings_of_sampled_negatives_come_with_that_loss_alone(plan: Plan) -> None:
    method = replace(METHODS["mmfede-mean"], sampled={"training.margin": 3.0})
    plan = replace(plan, methods=[method])
    assert plan.cells()[0].config.training.margin == 10.0
    plan = replace(plan, changes={"training.loss": "self_adversarial"})
    assert plan.cells()[0].config.training.margin == 3.0


def test_a_tuning_has_the_same_trials_for_every_method(plan: Plan) -> None:
    shared = plan.trials()
    best = {"tiny-3": {"local": {"training.learning_rate": 0.04}, "mmfede-mean": {"training.learning_rate": 0.02}}}
    cells = shared + plan.trials(best)
    places = ("any/local", "0.5/mmfede-mean")
    assert [cell.folder.relative_to(plan.output).as_posix() for cell in cells] == [
        *(f"tiny-3/{place}/trial{number}-seed100" for place in places for number in range(5)),
        *(f"tiny-3/{place}/trial{number}-seed100" for place in places for number in (5, 6)),
    ]
    rates = [cell.config.training.learning_rate for cell in cells]
    assert rates == [0.01, 0.02, 0.04, 0.02, 0.04] * 2 + [0.04, 0.08, 0.02, 0.08]
    assert [cell.config.model.dropout for cell in cells] == [0.6, 0.6, 0.6, 0.7, 0.7] * 2 + [0.8, 0.1] * 2
    assert {(cell.config.seed, cell.config.federation.num_rounds) for cell in cells} == {(100, 6)}


@pytest.mark.parametrize("damage", ["[]", '{"kind": "benchmark", "recipes": null}', "{"])
def test_a_damaged_manifest_is_told(plan: Plan, damage: str) -> None:
    open_folder(plan, "benchmark")
    (plan.output / "benchmark.json").write_text(damage)
    with pytest.raises(RunError, match=r"benchmark\.json (is damaged|cannot be read)"):
        open_folder(plan, "benchmark")


def test_absent_data_say_what_to_import(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    with pytest.raises(
        DataError, match=r"recipe tiny-3: data set 'gone' not found.*FEDSIM_DATA.*fedsim data import A B"
    ):
        replace(plan, changes={"data.path": "gone"}).cells()
    with pytest.raises(DataError, match=r"recipe tiny-3: .*tiny has no split 'five'.*fedsim data import A B"):
        replace(plan, changes={"data.split": "given", "data.split_file": "five"}).cells()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model.dropout": 2}, "model.dropout"),
        ({"model.scorer": "x"}, "choose from"),
        ({"model.dorpout": 1}, "nearest"),
    ],
)
def test_settings_that_are_not_accepted_name_recipe_and_method(changes: dict[str, Any], part: str, plan: Plan) -> None:
    with pytest.raises(ConfigError, match="recipe tiny-3, method local") as caught:
        replace(plan, changes=changes).cells()
    assert part in str(caught.value)


@pytest.mark.parametrize("path", ["data.missing_rate", "model.imputer", "federation.strategy", "runtime.kind"])
def test_what_a_benchmark_varies_cannot_be_changed_for_all(path: str) -> None:
    with pytest.raises(ConfigError, match=rf"--{path} is what the benchmark varies"):
        check_changes({path: "x"})


def test_a_folder_grows_but_takes_no_other_benchmark(plan: Plan) -> None:
    open_folder(plan, "benchmark")
    open_folder(plan, "benchmark")
    larger = replace(plan, num_seeds=3, methods=[*plan.methods, METHODS["fede"]])
    open_folder(larger, "benchmark")
    for other, part in [
        (plan, "methods fede too"),
        (replace(larger, num_seeds=2), "seeds 2 too"),
        (replace(larger, rates={"tiny-3": [parse_missing("0.5")]}), "rates tiny-3 client-0.3 too"),
        (replace(larger, changes={"model.dim": 8}), '"model.dim": 8'),
        (replace(larger, tuned=Tuned({})), "tuned settings of tiny-3 local"),
        (replace(larger, recipes=[replace(plan.recipes[0], settings={})]), "recipes settings of tiny-3"),
        (replace(larger, recipes=[replace(plan.recipes[0], parts={"mean": {}})]), "recipes settings of tiny-3"),
    ]:
        with pytest.raises(RunError, match="holds another benchmark") as caught:
            open_folder(other, "benchmark")
        assert part in str(caught.value)
    with pytest.raises(RunError, match='its kind is "benchmark", this one\'s is "tuning"'):
        open_folder(larger, "tuning")


@pytest.mark.parametrize("kind", ["benchmark", "tuning"])
def test_a_folder_from_before_parts_and_budgets_without_own_trials_goes_on(plan: Plan, kind: str) -> None:
    """What a recipe does not use is not in the manifest, so such folders still hold the same benchmark."""
    manifest = manifest_of(plan, kind)["recipes"]["tiny-3"]
    assert set(manifest) == {"settings"} | ({"tuning"} if kind == "tuning" else set())
    assert set(manifest.get("tuning", {})) <= {"missing", "num_rounds", "seeds", "trials"}


def test_a_folder_of_something_else_is_not_taken(plan: Plan) -> None:
    check_free(plan.output)
    plan.output.mkdir()
    (plan.output / ".lock").write_text("")
    check_free(plan.output)
    (plan.output / "thesis.tex").write_text("")
    with pytest.raises(RunError, match="holds files but no benchmark"):
        check_free(plan.output)
    open_folder(plan, "benchmark")
    check_free(plan.output)
    (plan.output / "benchmark.json").write_text("{")
    with pytest.raises(RunError, match=r"benchmark\.json cannot be read"):
        open_folder(plan, "benchmark")


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    with locked(path, "busy"), pytest.raises(RunError, match="busy"), locked(path, "busy", 0.3):
        pass
    with locked(path, "busy"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"), locked(tmp_path / "file" / ".lock", "busy"):
        pass


def test_a_recipe_without_a_path_takes_the_default_data(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("title: mine\nsettings: {federation.num_rounds: 2}\nrecipes: {mine: {}}\n")
    (recipe,) = select_recipes([str(file)])
    assert find_data(recipe, recipe.settings).name == "wn_noto"


def test_a_split_that_is_a_number_is_one_message(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("title: mine\nsettings: {data.split: given}\nrecipes: {mine: {data.split_file: 3}}\n")
    (recipe,) = select_recipes([str(file)])
    with pytest.raises(DataError, match="recipe mine: .* has no split '3'"):
        find_data(recipe, recipe.settings)
