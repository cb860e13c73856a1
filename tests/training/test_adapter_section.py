"""The recipe's methods: defaults of equal budget, options of one method refused in another, by name."""

import pytest

from abba.adapter.config import METHODS, AdapterConfig, BaselineConfig, FullConfig, config_from, factors_of
from abba.errors import RecipeError
from abba.training.adapter_section import AdapterSection
from tests.training.test_recipe import GOOD, load, message

SHAPES = {"q_proj": (64, 64), "up_proj": (112, 64)}


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_of_one_budget(tmp_path, method):
    recipe = load(tmp_path, GOOD, f"adapter.method={method}")
    config = recipe.adapter.config()
    assert config.method == method
    if method == "full":
        assert config == FullConfig() and recipe.adapter.target_modules is None
    else:
        assert config.width == AdapterConfig().width == 32
        assert len(factors_of(config, SHAPES)) == {"abba": 8, "loha": 8, "dora": 6}.get(method, 4)


def test_only_options_of_the_method_have_values(tmp_path):
    adapter = load(tmp_path, GOOD, "adapter.method=hira", "adapter.dropout=0.1").adapter
    assert adapter.config() == BaselineConfig("hira", 32, None, 0.1)
    given = {key for key, value in adapter if value is not None}
    assert given == {"method", "r", "dropout", "target_modules"}


def test_null_leaves_out_what_an_extended_recipe_sets(tmp_path):
    (tmp_path / "base.yaml").write_text(GOOD + "adapter: {r1: 8, r2: 8, alpha: 12}\n")
    twin = "extends: base\nadapter: {method: lora, r1: null, r2: null, r: 16, alpha: null}\n"
    assert load(tmp_path, twin).adapter.config() == BaselineConfig("lora", 16, 32.0)
    assert "adapter.r1=null where a recipe" in message(tmp_path, "extends: base\nadapter: {method: lora}\n")


@pytest.mark.parametrize(
    "method, option, known",
    [
        ("lora", "r1=8", "r, alpha, dropout, target_modules, layer_range"),
        ("rslora", "init=svd", "r, alpha, dropout"),
        ("dora", "scale_rule=paper", "r, alpha, dropout"),
        ("abba", "r=8", "r1, r2, alpha, scale_rule, init, init_from, cache_factors, target_modules"),
        ("abba", "dropout=0.1", "r1, r2"),
        ("hira", "alpha=8", "r, dropout, target"),
        ("loha", "dropout=0.1", "r, alpha, target"),
        ("loha", "init_from=runs/x", "r, alpha, target"),
        ("lora", "cache_factors=false", "r, alpha, dropout"),
        ("full", "cache_factors=true", "none"),
        ("full", "r=8", "none"),
        ("full", "target_modules=[q_proj]", "none"),
    ],
)
def test_an_option_of_another_method_is_refused_by_name(tmp_path, method, option, known):
    said = message(tmp_path, GOOD, f"adapter.method={method}", f"adapter.{option}")
    key = option.partition("=")[0]
    assert f"adapter.{key}: " in said and f": no option of the method {method}, whose options are: {known}" in said
    assert f"adapter.{key}=null" in said and "\n" not in said


def test_all_of_a_sections_mistakes_are_reported_at_once(tmp_path):
    start = ["adapter.init_from=runs/x/adapter", "adapter.init=kaiming"]
    summary, *lines = message(tmp_path, GOOD, "adapter.r=8", "adapter.dropout=0.1", *start).split("\n")
    assert summary.endswith("3 mistakes:")
    begins = ["adapter.r: 8: no option", "adapter.dropout: 0.1: no option", "adapter.init: kaiming has no meaning"]
    assert all(line.startswith(f"  {begin}") for line, begin in zip(lines, begins, strict=True)), lines
    start = ["adapter.method=lora", *start]
    assert "2 mistakes:" in message(tmp_path, GOOD, *start), "of init_from and init no other method has anything to say"


@pytest.mark.parametrize(
    "override, said",
    [
        ("adapter.method=lorra", "adapter.method: 'lorra' is not one of 'abba', 'lora'"),
        ("adapter.method=[lora]", "adapter.method: "),
        ("adapter.scale_rule=papper", "adapter.scale_rule: 'papper' is not one of 'paper' or 'reference'"),
        ("adapter.init=zeros", "adapter.init: 'zeros' is not one of 'svd', 'kaiming' or 'reference'"),
        ("adapter=lora", "adapter: "),
    ],
)
def test_unknown_choices_are_named(tmp_path, override, said):
    assert said in message(tmp_path, GOOD, override)


def test_an_init_beside_factors_to_start_from_is_refused(tmp_path):
    said = message(tmp_path, GOOD, "adapter.init=kaiming", "adapter.init_from=runs/x/adapter")
    assert "adapter.init: kaiming has no meaning with init_from" in said
    assert load(tmp_path, GOOD, "adapter.init_from=runs/x/adapter").adapter.init_from == "runs/x/adapter"


def test_scale_rules():
    assert AdapterConfig(4, 9, 12.0).scale == 24.0
    assert AdapterConfig(4, 9, 12.0, scale_rule="reference").scale == 12.0
    options = AdapterSection(r1=4, r2=9, alpha=12.0, scale_rule="reference", init="kaiming").config()
    assert options.scale == 12.0 and options.init == "kaiming"


@pytest.mark.parametrize(
    "raw",
    [
        {"method": "lora", "r": 0, "alpha": 1.0},
        {"method": "lora", "r": True, "alpha": 1.0},
        {"method": "lora", "r": 8, "alpha": None},
        {"method": "hira", "r": 8, "alpha": 1.0},
        {"method": "loha", "r": 8, "alpha": 1.0, "dropout": 0.1},
        {"method": "dora", "r": 8, "alpha": float("nan")},
        {"method": "lora", "r": 8, "alpha": 1.0, "target_modules": []},
        {"method": "vera", "r": 8, "alpha": 1.0},
        {"r1": 4, "scale_rule": "best"},
        {"r1": 4, "init": "zero"},
    ],
)
def test_what_a_file_cannot_say(raw):
    with pytest.raises(RecipeError, match=r"adapter\."):
        config_from(raw)
