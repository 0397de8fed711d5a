"""The methods and recipes of the benchmark: names, groups, configs that load, advice on unknown names."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedsim.benchmark.methods import GROUPS, METHODS, Method, select_methods
from fedsim.benchmark.plan import check_parts
from fedsim.benchmark.recipes import TuningBudget, bundled_recipes, read_recipes, select_recipes
from fedsim.benchmark.tuned import BUNDLED, Tuned, choose, read_tuned, trials_of, write_tuned
from fedsim.config import config_fields, make_config
from fedsim.errors import ConfigError

ROOT = Path(__file__).parents[2]
FIELDS = {path for path, _ in config_fields()}


def _part(method: Method, field: str) -> str:
    return str(method.settings[field])


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_each_method_is_a_config_of_parts_that_exist(method: Method) -> None:
    check_parts(make_config(overrides=dict(method.settings)))
    sampled = {**method.settings, **method.sampled, "training.loss": "self_adversarial"}
    check_parts(make_config(overrides=sampled))


def test_each_group_varies_its_part_alone() -> None:
    varied = {"a": "model.fusion", "b": "model.imputer", "c": "federation.strategy"}
    for group, field in varied.items():
        members = [method for method in select_methods([group], []) if method.name != "mmfed3-hide"]
        assert len({_part(method, field) for method in members}) == len(members) >= 7
        for other in set(varied.values()) - {field}:
            assert len({_part(method, other) for method in members}) == 1
        assert "mmfede-zero" in [method.name for method in members]


def test_our_method_is_in_every_group_and_is_the_default_config() -> None:
    for group in GROUPS:
        assert METHODS["mmfed3-hide"] in select_methods([group], [])
    assert make_config(overrides=dict(METHODS["mmfed3-hide"].settings)) == make_config()


def test_variants_take_parts_away_and_run_with_the_values_of_the_whole() -> None:
    ablations = select_methods(["ablation"], [])
    assert len(ablations) == 3 * (1 + 3 * 2)  # imputers x (none, or a level x a direction)
    weights = ("logit_to_client", "logit_to_global", "feature_to_client", "feature_to_global", "prototype")
    for method in ablations:
        config = make_config(overrides=dict(method.settings)).distillation
        on = {name for name in weights if getattr(config, name) > 0}
        words = method.name.split("-")
        expected = set(weights) if {"none", "logits", "features"}.isdisjoint(words) else set()
        expected |= {name for name in weights if name.startswith("logit") and "logits" in words}
        expected |= {name for name in weights if not name.startswith("logit") and "features" in words}
        expected -= {name for name in weights if name.endswith("_to_global") and "oneway" in words}
        assert on == expected, method.name
        assert (config.num_soft_queries > 0) == ("logit_to_global" in expected)
        assert config.send_prototypes == ("prototype" in expected)
    tuned = read_tuned(BUNDLED)
    (recipe,) = select_recipes(["cn_visual"])
    for method in [*ablations, *select_methods(["steps"], [])]:
        assert tuned.settings(recipe, method.variant_of or method.name) is not None


def test_groups_and_names_add_up_in_the_order_of_the_table() -> None:
    assert [m.name for m in select_methods(["references"], ["mmfede-ridge"])] == [
        *("local", "fede", "central", "local-zero", "mmfede-ridge", "mmfed3-hide"),
    ]
    assert select_methods([], []) == [method for method in METHODS.values() if not method.variant_of]


@pytest.mark.parametrize(
    ("groups", "names", "nearest"), [(["d"], [], "unknown group 'd'"), ([], ["mmfede-rigde"], "'mmfede-ridge'")]
)
def test_an_unknown_method_or_group_names_the_nearest(groups: list[str], names: list[str], nearest: str) -> None:
    with pytest.raises(ConfigError, match=nearest):
        select_methods(groups, names)


def test_bundled_recipes_cover_the_data_and_their_settings_are_a_config() -> None:
    recipes = bundled_recipes()
    expected = {"wn_noto", "cn_visual", "db15k-3", "mkgw-3", "wn9img-3"}
    expected |= {f"fb15k237-{kind}{size}" for kind in ("r", "c", "fede") for size in (3, 5, 10)}
    assert expected <= set(recipes)
    for recipe in recipes.values():
        for trial in recipe.tuning.trials:
            for method in METHODS.values():
                assert set(recipe.settings_of(method)) | set(trial) <= FIELDS
                make_config(overrides={**recipe.settings_of(method), **trial, **method.settings})
        assert recipe.rates == ("0", "0.3", "0.6", "0.9", "client")
        assert recipe.name == "wn_noto" or recipe.obtain


def test_a_recipe_of_ones_own_is_read_from_its_path(tmp_path: Path) -> None:
    path = ROOT / "examples" / "recipes" / "many_small_clients.yaml"
    ten, twenty = select_recipes([str(path)])
    assert (ten.name, ten.settings["data.num_clients"]) == ("wn_noto-dirichlet10", 10)
    assert (twenty.name, twenty.settings["data.split"]) == ("wn_noto-dirichlet20", "dirichlet")
    for recipe in (ten, twenty):
        make_config(overrides=dict(recipe.settings))
    (tmp_path / "mine.yaml").write_text("title: mine\nsettings: {data.path: x}\nrates: [0, 0.5]\nrecipes: {mine: {}}\n")
    assert read_recipes(tmp_path / "mine.yaml")["mine"].rates == ("0", "0.5")


def test_a_splits_own_settings_win_over_those_of_parts(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "title: mine\nsettings: {model.dim: 8}\nparts: {fedlu: {model.dim: 16, model.dropout: 0.1}}\n"
        "recipes: {one: {}, two: {model.dim: 32}}\n"
    )
    one, two = read_recipes(tmp_path / "mine.yaml").values()
    assert one.settings_of(METHODS["fedlu-zero"]) == {"model.dim": 16, "model.dropout": 0.1}
    assert two.settings_of(METHODS["fedlu-zero"]) == {"model.dim": 32, "model.dropout": 0.1}
    assert one.settings_of(METHODS["mmfed3-zero"]) == {"model.dim": 8}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("title: [", "is not YAML"),
        ("title: x\nsettings: {}\n", "recipes: Field required"),
        ("title: x\nsettings: {}\nrecipes: {}\n", "recipes: "),
        ("title: x\nsettings: {}\nrecipes: {a: {}}\ntunning: {}\n", "tunning: "),
        ("title: x\nsettings: {}\nrecipes: {a: {}}\ntuning: {trials: []}\n", "tuning.trials: "),
        ("title: x\nsettings: {}\nparts: {fedlo: {}}\nrecipes: {a: {}}\n", "parts: 'fedlo' is no value of any of"),
        (
            "title: x\nsettings: {}\nparts: {fedlu: {model.dim: 8, a: 1}}\nrecipes: {a: {}}\n",
            "parts.fedlu: 'a' is no config",
        ),
        ("title: x\nsettings: {}\nrecipes: {a: {}}\ntuning: {seeds: [3, 3]}\n", "tuning.seeds: "),
        ("", "the file: "),
        (
            "title: x\nsettings: {data: {path: y}}\nrecipes: {a: {}}\n",
            "settings: 'data' is no config field, such as model.dropout",
        ),
        ("title: x\nsettings: {}\nrecipes: {a: {model.dropuot: 1}}\n", "recipes.a: 'model.dropuot' is no config field"),
        ("title: x\nsettings: {}\nrecipes: {a: {}}\ntuning: {trials: [{3: 4}]}\n", "tuning.trials"),
    ],
)
def test_a_broken_recipe_file_names_what_is_wrong(text: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"recipe file .*bad\.yaml") as caught:
        select_recipes([str(tmp_path / "bad.yaml")])
    assert part in str(caught.value)


def test_unknown_recipes_and_absent_files_are_told() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'cn_visul'; the nearest is 'cn_visual'"):
        select_recipes(["cn_visul"])
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read"):
        select_recipes(["nowhere.yaml"])


def test_bundled_tuned_values_are_trials_of_the_budget() -> None:
    tuned = read_tuned(BUNDLED)
    recipes = bundled_recipes()
    budgets = {recipe.family: recipe.tuning for recipe in recipes.values()}
    budgets |= {name: recipe.tuning for name, recipe in recipes.items()}
    assert {"cn_visual", "mkgw-3", "db15k-3", "fb15k237"} <= set(tuned.values)
    for name, methods in tuned.values.items():
        for method, settings in methods.items():
            shared = budgets[name].trials
            changes = METHODS[method].trials if budgets[name].own_trials else ()
            own = [{**trial, **change} for trial in shared for change in changes]
            assert settings in [*shared, *own], f"{name}, {method}"


def test_every_method_has_as_many_trials_and_its_own_change_it() -> None:
    """Two of its own, which differ from its defaults; a trial that changed nothing would be none."""
    for method in METHODS.values():
        assert len(method.trials) == 2, method.name
        default = make_config(overrides=dict(method.settings))
        configs = [make_config(overrides={**method.settings, **trial}) for trial in method.trials]
        assert default not in configs, method.name
        assert configs[0] != configs[1], method.name


def test_tuned_values_stand_under_the_recipe_or_its_family() -> None:
    recipes = bundled_recipes()
    tuned = Tuned({"cn_visual": {"local": {"model.dropout": 0.1}}, "cn_visual-r5": {"local": {"model.dropout": 0.2}}})
    assert tuned.settings(recipes["cn_visual-domain5"], "local") == {"model.dropout": 0.1}
    assert tuned.settings(recipes["cn_visual-r5"], "local") == {"model.dropout": 0.2}
    assert tuned.settings(recipes["cn_visual-r5"], "fede") is None
    assert tuned.settings(recipes["wn_noto"], "local") is None


def test_the_trial_with_the_best_validation_mrr_is_chosen_if_all_ended() -> None:
    recipe = bundled_recipes()["wn_noto"]
    assert recipe.tuning.trials == TuningBudget().trials
    methods = [METHODS[name] for name in ("local", "fede", "central", "fedprox-zero", "mmfede-imf")]
    first = {"local": (0.2, 0.3, 0.1), "fede": (0.9,), "central": (0.4, 0.4, 0.3), "fedprox-zero": (0.1, 0.1, 0.2)}
    first["mmfede-imf"] = (0.1, 0.2, 0.3)
    values = {name: found if name == "fede" else (*found, 0.0, 0.0) for name, found in first.items()}
    valid = {("wn_noto", name, number): [mrr] for name, found in values.items() for number, mrr in enumerate(found)}
    shared = recipe.tuning.trials
    best = choose([recipe], methods, valid)
    assert best == {
        "wn_noto": {
            "local": shared[1],
            "central": shared[0],
            "fedprox-zero": shared[2],
            "mmfede-imf": shared[2],
        }
    }
    assert trials_of(recipe, METHODS["fedprox-zero"], best) == [
        (5, {**shared[2], "federation.proximal_mu": 0.001}),
        (6, {**shared[2], "federation.proximal_mu": 0.0001}),
    ]
    assert trials_of(recipe, METHODS["fede"], best) == []
    own = {"local": (0.3, 0.3), "central": (0.1, 0.5), "fedprox-zero": (0.1, 0.21), "mmfede-imf": (0.5,)}
    valid |= {("wn_noto", name, number): [mrr] for name, found in own.items() for number, mrr in enumerate(found, 5)}
    assert choose([recipe], methods, valid, best) == {
        "wn_noto": {
            "local": shared[1],
            "central": {**shared[0], "training.learning_rate": 0.08},
            "fedprox-zero": {**shared[2], "federation.proximal_mu": 0.0001},
        }
    }


def test_a_recipe_may_leave_out_the_methods_own_trials() -> None:
    wn_noto = bundled_recipes()["wn_noto"]
    recipe = replace(wn_noto, tuning=TuningBudget(trials=wn_noto.tuning.trials[:2], own_trials=False))
    valid = {("wn_noto", "local", 0): [0.1], ("wn_noto", "local", 1): [0.2], ("wn_noto", "fede", 0): [0.3]}
    methods = [METHODS["local"], METHODS["fede"]]
    best = choose([recipe], methods, valid)
    assert best == {"wn_noto": {"local": recipe.tuning.trials[1]}}
    assert trials_of(recipe, METHODS["local"], best) == []
    assert choose([recipe], methods, valid, best) == best


def test_tuned_values_are_added_to_those_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tuned.yaml"
    write_tuned({"wn_noto": {"local": {"model.dropout": 0.1}, "fede": {"model.dropout": 0.2}}}, path)
    write_tuned({"wn_noto": {"fede": {"model.dropout": 0.3}}, "cn_visual": {"fede": {"model.dropout": 0.4}}}, path)
    assert read_tuned(path).values == {
        "wn_noto": {"local": {"model.dropout": 0.1}, "fede": {"model.dropout": 0.3}},
        "cn_visual": {"fede": {"model.dropout": 0.4}},
    }


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a", "must hold recipes"),
        ("wn_noto: [1]", "must hold methods"),
        ("wn_noto: {local: 3}", "must hold settings"),
        ("wn_noto: {locla: {}}", "nearest is 'local'"),
        ("wn_noto: {local: {model.dropuot: 0.1}}", "'model.dropuot' is no config field"),
        ("a: [", "are not YAML"),
    ],
)
def test_broken_tuned_values_name_what_is_wrong(text: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "tuned.yaml").write_text(text)
    with pytest.raises(ConfigError, match="tuned values") as caught:
        read_tuned(tmp_path / "tuned.yaml")
    assert part in str(caught.value)


def test_the_mean_over_the_tuning_seeds_counts() -> None:
    """Trial 1 has the best single run, trial 0 the best mean; with a seed missing nothing is chosen."""
    wn_noto = bundled_recipes()["wn_noto"]
    recipe = replace(wn_noto, tuning=TuningBudget(seeds=[100, 101], trials=wn_noto.tuning.trials[:2]))
    valid = {("wn_noto", "local", 0): [0.3, 0.3], ("wn_noto", "local", 1): [0.4, 0.1]}
    assert choose([recipe], [METHODS["local"]], valid) == {"wn_noto": {"local": recipe.tuning.trials[0]}}
    valid["wn_noto", "local", 1] = [0.4]
    assert choose([recipe], [METHODS["local"]], valid) == {}
