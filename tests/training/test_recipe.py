"""Recipes: what is accepted, and that each mistake is named with its way out."""

import importlib.metadata
import os
import random
import re
import resource
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import abba
from abba.errors import RecipeError
from abba.training.recipe import Recipe, load_recipe
from abba.training.resume import fingerprint
from tests.distributed.ranks import TINY
from tests.quick import assert_quick

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


def test_extends_finds_what_lies_beside_it_or_among_the_shipped(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: quickstart\ntrain: {max_steps: 7}\n")
    recipe = load_recipe(str(tmp_path / "mine.yaml"), [], SHIPPED)
    assert recipe.train.max_steps == 7 and recipe.data == load_recipe("quickstart", [], SHIPPED).data
    (tmp_path / "quickstart.yaml").write_text(GOOD)
    assert load_recipe(str(tmp_path / "mine.yaml"), [], SHIPPED).model.name_or_path == "some/model"
    (tmp_path / "mine.yaml").write_text("extends: quikstart\n")
    with pytest.raises(RecipeError, match="no recipe 'quikstart' beside it or in .*; did you mean quickstart"):
        load_recipe(str(tmp_path / "mine.yaml"), [], SHIPPED)


def test_a_path_below_the_home_directory_is_found(tmp_path, monkeypatch):
    """A shell leaves the ~ in data.path=~/rows.jsonl, and a file has none."""
    monkeypatch.setenv("HOME", "/home/me")
    sources = "data.sources=[{path: ~/a.jsonl}, {path: b~/c.jsonl}]"
    recipe = load(tmp_path, GOOD.replace("some/model", "~/base"), "output_dir=~/run", "data.path=", sources)
    assert (recipe.model.name_or_path, recipe.output_dir) == ("/home/me/base", "/home/me/run")
    assert [source.path for source in recipe.data.sources] == ["/home/me/a.jsonl", "b~/c.jsonl"]


def test_extends_merges_deeply(tmp_path):
    (tmp_path / "base.yaml").write_text(GOOD)
    recipe = load(tmp_path, "extends: base\ntrain:\n  learning_rate: 2\n")
    assert recipe.train.learning_rate == 2.0 and recipe.train.global_batch_size == 8


def test_a_chain_of_recipes_that_is_too_long_is_called_that(tmp_path):
    (tmp_path / "part1.yaml").write_text(GOOD)
    for number in range(2, 10):
        (tmp_path / f"part{number}.yaml").write_text(f"extends: part{number - 1}\n")
    assert load_recipe("part8", [], tmp_path).train.global_batch_size == 8
    with pytest.raises(RecipeError, match=r"part9.yaml: with what it extends it is more than 8 files; put some"):
        load_recipe("part9", [], tmp_path)


@pytest.mark.parametrize("text, value", [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.5e-4", 1.5e-4), ("3", 3.0), ("0.1", 0.1)])
def test_numbers_as_people_write_them(tmp_path, text, value):
    assert load(tmp_path, GOOD, f"train.learning_rate={text}").train.learning_rate == value


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["train.learning_rat=1"], "train.learning_rat: unknown key; did you mean learning_rate?"),
        (["train.save_steps=10"], "train.save_steps: unknown key; did you mean checkpoint.save_steps?"),
        (["learning_rate=1e-3"], "learning_rate: unknown key; did you mean train.learning_rate?"),
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


def test_sections_that_do_not_agree_are_all_reported_at_once(tmp_path):
    summary, *lines = message(tmp_path, GOOD, "overwrite_output_dir=true", "train.eval_steps=5").split("\n")
    assert summary.endswith("2 mistakes:")
    assert lines == [
        "  overwrite_output_dir: discards an earlier run, checkpoint.resume=auto continues one; leave it out, or set "
        "checkpoint.resume=never",
        "  train.eval_steps: has no meaning without held-out rows; set data.eval_rows too",
    ]


def test_a_requeued_jobs_recipe_can_be_used_again(tmp_path):
    recipe = load(tmp_path, GOOD, "checkpoint.resume=never", "overwrite_output_dir=true").with_resume("auto")
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


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
        ("extends: nowhere\n", "extends: no recipe 'nowhere' beside it or in "),
    ],
)
def test_yaml_traps_are_refused(tmp_path, text, expected):
    assert expected in message(tmp_path, text)


def test_text_that_is_not_utf8_and_huge_files_are_refused(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(RecipeError, match="is not UTF-8"):
        load_recipe("bad", [], tmp_path)
    (tmp_path / "huge.yaml").write_bytes(b"# " + b"x" * 51_000)
    with pytest.raises(RecipeError, match="longer than 50000 bytes"):
        load_recipe("huge", [], tmp_path)


def test_a_missing_recipe_names_the_nearest(tmp_path):
    with pytest.raises(RecipeError) as error:
        load_recipe("quickstrat.yaml", [], SHIPPED)
    assert "did you mean quickstart?" in str(error.value)
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe("x" * 300, [], SHIPPED)


MUTATIONS = int(os.environ.get("ABBA_RECIPE_MUTATIONS", "500"))  # 5000 for the full matrix
VALUES = [
    "", "~", "true", "no", "yes", "0", "-1", "1e400", "-1e-400", ".nan", ".inf", "-.inf", "010", "0x10", "1_000",
    "9" * 30, "9" * 5000, "1e-4", "'1e-4'", "2026-11-22", "[]", "{}", "[1, [2, [3]]]", "{a: {b: {c: 1}}}", "\U0001f600",
    "1:30:00", "'\u202e'",
    "'" + "x" * 2000 + "'", "a\tb", "null", "!!str x", "*a", "&a 1", "'", '"', "|", ">", "%", "@x", "`x`",
    "[" * 30, "- - -", "x: y: z", "'\\0'", '"\\0"', '"\\n"', "/", "~/x", "../../x", "-rf", "all-linear", "(a+)+$",
]  # fmt: skip
WHOLE = (
    GOOD + "  max_steps: 3\n  adam_beta1: 0.9\nadapter:\n  r1: 4\n  target_modules: [q_proj]\n  layer_range: [0, 2]\n"
)
WHOLE += "deepspeed:\n  zero_optimization:\n    stage3_max_live_parameters: 0\ncheckpoint:\n  save_steps: 4\n"


def mutate(lines, draw):
    """Drop, rename, retype, nest, repeat, move or break a line, as one does who edits a recipe."""
    at = draw.randrange(len(lines))
    key, colon, value = lines[at].partition(":")
    kind = draw.randrange(9)
    if kind == 0:
        return lines[:at] + lines[at + 1 :]
    if kind == 1:
        place = draw.randrange(len(key) + 1)
        changed = key[:place] + draw.choice("abz_-.: é\0\U0001f600") + key[place + draw.randrange(2) :]
    elif kind in (2, 3):
        changed, value = key, " " + draw.choice(VALUES)
    elif kind == 4:
        changed, value = key, f"\n    nested:{value or ' 1'}"
    elif kind == 5:
        return [*lines[: at + 1], *lines[at:]]
    elif kind == 6:
        return lines[:at] + lines[at + 1 :] + [lines[at]]
    elif kind == 7:
        changed = " " * draw.randrange(6) + key.strip()
    else:
        text = "\n".join(lines)
        start, stop = sorted(draw.randrange(len(text)) for _ in range(2))
        return (text[:start] + draw.choice(["", text[start:stop] * 2, "\x07", "\t", "{", "]"]) + text[stop:]).split(
            "\n"
        )
    return [*lines[:at], f"{changed}{colon}{value}", *lines[at + 1 :]]


def test_edited_recipes_load_or_are_refused_quickly_and_in_little_memory(tmp_path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw, outcome, before = random.Random(seed), Counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(MUTATIONS):
        lines = [line for line in WHOLE.split("\n") if line]
        for _ in range(draw.randint(1, 3)):
            lines = mutate(lines, draw) or ["x: 1"]
        (tmp_path / "mine.yaml").write_text("\n".join(lines), encoding="utf-8")
        started = time.process_time()
        try:
            recipe = load_recipe("mine", [], tmp_path)
            assert load_recipe("mine", [], tmp_path) == recipe
            outcome["loaded"] += 1
        except RecipeError as error:
            outcome["refused"] += 1
            said = str(error)
        else:
            said = ""
        assert time.process_time() - started < 1, lines
        assert all(line.isprintable() and len(line) < 3000 for line in said.split("\n"))
    print(outcome)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"
    assert outcome["loaded"] and outcome["refused"], outcome


@pytest.mark.parametrize("text", ["#" * 10**6, "a: " + "[" * 10**6, "x" * 10**6, "a: 1\n" * 200_000, "- " * 500_000])
def test_recipes_of_a_megabyte_are_refused_at_once(tmp_path, text):
    assert "longer than 50000 bytes" in message(tmp_path, text)
    assert_quick(lambda: message(tmp_path, text), 0.2)


def every_key(model=Recipe, prefix=""):
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        yield f"{prefix}{name}"
        for kind in inner:
            yield from every_key(kind, f"{prefix}{name}.")


def single_edits(word):
    """Drop a letter, double one, swap two, or hit the key beside it."""
    for place in range(len(word)):
        yield word[:place] + word[place + 1 :]
        yield word[:place] + word[place] + word[place:]
        yield word[:place] + "q" + word[place + 1 :]
        if word[place : place + 2] != word[place : place + 2][::-1]:
            yield word[:place] + word[place + 1 : place + 2] + word[place] + word[place + 2 :]


def test_the_suggestion_for_a_misspelt_key_is_right(tmp_path):
    """Every single edit of every key: at least 95 of 100 lead back to the key."""
    (tmp_path / "mine.yaml").write_text(GOOD)
    keys = sorted(every_key())
    right = wrong = 0
    for key in keys:
        section, _, last = key.rpartition(".")
        for edited in sorted(set(single_edits(last)))[:: max(1, len(last) // 4)]:
            misspelt = f"{section}.{edited}" if section else edited
            if misspelt in keys or not re.fullmatch(r"[a-z0-9_]+", edited):
                continue
            with pytest.raises(RecipeError) as error:
                load_recipe("mine", [f"{misspelt}=1"], tmp_path)
            found = f"{misspelt}: unknown key; did you mean {last}?" in str(error.value)
            right, wrong = right + found, wrong + (not found)
    print(f"{right} of {right + wrong}")
    assert right + wrong > 300 and right >= 0.95 * (right + wrong), f"{right} of {right + wrong}"


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutated_recipes_load_or_are_refused_quickly(tmp_path, data):
    text = GOOD
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 6))
        text = text[:place] + data.draw(st.text(max_size=8)) + text[place + cut :]
    started = time.process_time()
    try:
        (tmp_path / "mine.yaml").write_text(text, errors="surrogatepass")
        load_recipe("mine", [], tmp_path)
    except (RecipeError, UnicodeEncodeError):
        pass
    assert time.process_time() - started < 1


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch):
    """In a container it is mounted; what decides the numbers of a run is recorded all the same."""
    installed = importlib.metadata.version

    def only_others(name):
        if name == "abba-recipes":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", only_others)
    recipe = load_recipe("quickstart", ["model.attn_implementation=sdpa"], SHIPPED)
    software = fingerprint(recipe.model_dump(mode="json"), "", TINY)["software"]
    assert software["abba-recipes"] == abba.__version__ == installed("abba-recipes") and "torch" in software
