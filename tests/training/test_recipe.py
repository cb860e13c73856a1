"""Recipes: what is accepted, and that each mistake is named with its way out."""

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abba.errors import RecipeError
from abba.training.recipe import load_recipe

SHIPPED = Path(__file__).resolve().parents[2] / "recipes"
GOOD = """
model:
  name_or_path: some/model
data:
  path: rows.jsonl
train:
  global_batch_size: 8
  per_device_train_batch_size: 2
  learning_rate: 1e-3
"""


def load(tmp_path, text=GOOD, *overrides):
    (tmp_path / "mine.yaml").write_text(text)
    return load_recipe("mine", list(overrides), tmp_path)


def message(tmp_path, text=GOOD, *overrides):
    with pytest.raises(RecipeError) as error:
        load(tmp_path, text, *overrides)
    return str(error.value)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_opens_with_its_command(path):
    recipe = load_recipe(path.name, [], SHIPPED)
    assert recipe.output_dir.startswith("runs/")
    opening = path.read_text().split("\n\n")[0]
    assert path.name in opening and "Hardware" in opening and "Download" in opening


def test_defaults_names_and_overrides(tmp_path):
    recipe = load(
        tmp_path, GOOD, "train.max_steps=60", "adapter.target_modules=[q_proj, v_proj]", "data.split=train[:5]"
    )
    assert recipe.output_dir == "runs/mine"
    assert (recipe.adapter.r1, recipe.adapter.r2, recipe.train.learning_rate) == (16, 16, 1e-3)
    assert (recipe.train.max_steps, recipe.data.split) == (60, "train[:5]")
    assert recipe.adapter.config().target_modules == ("q_proj", "v_proj")
    assert load_recipe(str(tmp_path / "mine.yaml"), [], SHIPPED) == load(tmp_path)


def test_extends_merges_deeply(tmp_path):
    (tmp_path / "base.yaml").write_text(GOOD)
    recipe = load(tmp_path, "extends: base\ntrain:\n  learning_rate: 2\n")
    assert recipe.train.learning_rate == 2.0 and recipe.train.global_batch_size == 8


@pytest.mark.parametrize("text, value", [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.5e-4", 1.5e-4), ("3", 3.0), ("0.1", 0.1)])
def test_numbers_as_people_write_them(tmp_path, text, value):
    assert load(tmp_path, GOOD, f"train.learning_rate={text}").train.learning_rate == value


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["train.learning_rat=1"], "train.learning_rat: unknown key; did you mean learning_rate?"),
        (["trian.learning_rate=1"], "trian: unknown key; did you mean train?"),
        (["train.learning_rate='1e-4'"], "train.learning_rate: '1e-4' is text, not a number; write it without quotes"),
        (["train.learning_rate=fast"], "'fast' is text, not a number"),
        (["train.global_batch_size=8.5"], "train.global_batch_size: 8.5"),
        (["train.global_batch_size=010"], "'010' is text, not a whole number"),
        (["train.global_batch_size=0"], "train.global_batch_size: 0"),
        (["train.global_batch_size=7"], "7 is not a multiple of per_device_train_batch_size 2"),
        (["train.learning_rate=.nan"], "train.learning_rate"),
        (["train.learning_rate=-1"], "train.learning_rate: -1"),
        (["train.lr_scheduler_type=cosin"], "'cosin' is not one of 'cosine', 'linear' or 'constant'"),
        (["overwrite_output_dir=no"], "overwrite_output_dir: 'no' is text, not true or false"),
        (["adapter.r1=0"], "adapter.r1: 0"),
        (["adapter.target_modules=[]"], "is empty"),
        (["adapter.target_modules=3"], "mine.yaml: adapter.target_modules: 3"),
        (["adapter.layer_range=[4, 2]"], "holds no layer"),
        (["deepspeed.bf16.enabled=false"], "bf16 cannot be set here: set model.dtype"),
        (["deepspeed.zero_optimization.stage=2"], "zero_optimization.stage cannot be set here"),
        (["deepspeed.zero_optimizaton.stage=2"], "zero_optimizaton: unknown key; did you mean zero_optimization?"),
        (["deepspeed.zero_optimization=3"], "zero_optimization: 3 is no section"),
        (["deepspeed.zero_optimization.cpu_offload=true", "deepspeed.bf16={}"], "bf16 cannot be set here"),
        (["deepspeed.zero_optimization.cpu_offload=true", "deepspeed.bf16={}"], "cpu_offload cannot be set here"),
        (["data.streaming=true"], "data.streaming: unknown key"),
        (["train.adam_beta1=1"], "train.adam_beta1: 1"),
        (["train.seed=99999999999999999999"], "train.seed"),
        (["adapter.alpha=1e200"], "adapter.alpha"),
        (['output_dir="a\\0b"'], "output_dir"),
        (["train.eval_steps=5"], "has no meaning without held-out rows; set data.eval_rows"),
        (["a", "b.c"], "'a': is no override; write section.key=value, such as train.max_steps=60; 'b.c'"),
        (["train.global_batch_size=7", "train.learning_rat=1"], "7 is not a multiple"),
        (["train.global_batch_size=7", "train.learning_rat=1"], "learning_rat: unknown key"),
        (["train=3"], "train"),
        (["max_steps"], "'max_steps': is no override; write section.key=value"),
        (["--train.x=1"], "is no override"),
        (["train.learning_rate.x=1"], "learning_rate is a value, not a section"),
        (["model.name_or_path="], "model.name_or_path"),
    ],
)
def test_each_mistake_is_named(tmp_path, overrides, expected):
    assert expected in message(tmp_path, GOOD, *overrides)


def test_all_mistakes_are_reported_at_once(tmp_path):
    text = message(tmp_path, GOOD, "train.learning_rat=1", "adapter.r1=0", "data.path=3", "model.dtype=fp8")
    assert "4 mistakes" in text
    assert all(key in text for key in ("train.learning_rat", "adapter.r1", "data.path", "model.dtype"))


def test_missing_sections_and_keys_are_named(tmp_path):
    text = message(tmp_path, "model: {name_or_path: x}\ntrain: {learning_rate: 1}\n")
    assert "data: is required" in text and "train.global_batch_size: is required" in text


@pytest.mark.parametrize(
    "text, expected",
    [
        (GOOD + "model:\n  name_or_path: y\n", "line 10: model: stands twice; keep one"),
        ("a: &x [1]\nb: *x\n", "aliases are not supported"),
        ("a: !!python/object/apply:os.system [ls]\n", "tags are not supported"),
        ("<<: {a: 1}\n", "merge keys are not supported"),
        ("? [1, 2]\n: 3\n", "a key must be a plain word"),
        ("a: [1\n", "is not YAML"),
        ("- 1\n", "holds no sections"),
        ("", "holds no sections"),
        ("a: " + "[" * 50 + "]" * 50, "is nested deeper than"),
        ("extends: mine\n" + GOOD, "extends itself"),
        ("extends: [a]\n", "is not the name of a recipe"),
        ("extends: nowhere\n", "cannot be read"),
    ],
)
def test_yaml_traps_are_refused(tmp_path, text, expected):
    assert expected in message(tmp_path, text)


def test_text_that_is_not_utf8_and_huge_files_are_refused(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(RecipeError, match="is not UTF-8"):
        load_recipe("bad", [], tmp_path)
    (tmp_path / "huge.yaml").write_bytes(b"# " + b"x" * 41_000)
    with pytest.raises(RecipeError, match="longer than 40000 bytes"):
        load_recipe("huge", [], tmp_path)


def test_a_missing_recipe_names_the_nearest(tmp_path):
    with pytest.raises(RecipeError) as error:
        load_recipe("quickstrat.yaml", [], SHIPPED)
    assert "did you mean quickstart?" in str(error.value)
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe("x" * 300, [], SHIPPED)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutated_recipes_load_or_are_refused_quickly(tmp_path, data):
    text = GOOD
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 6))
        text = text[:place] + data.draw(st.text(max_size=8)) + text[place + cut :]
    started = time.monotonic()
    try:
        (tmp_path / "mine.yaml").write_text(text, errors="surrogatepass")
        load_recipe("mine", [], tmp_path)
    except (RecipeError, UnicodeEncodeError):
        pass
    assert time.monotonic() - started < 1.0
