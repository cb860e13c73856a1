"""Where factors come from: runs, checkpoints, tensors alone; what is refused; whose scores reach the card."""

import json
import os

import pytest

from abba.adapter.config import AdapterConfig
from abba.adapter.directory import read_description
from abba.checkpoint.convert import Form, convert, convert_source
from abba.checkpoint.source import adapter_of, find_checkpoint, open_checkpoint
from abba.errors import CheckpointError, RecipeError
from tests.checkpoint.made import factor_shapes, linears, write_checkpoint

CONFIG, MODULES = AdapterConfig(3, 2, 4.0), {"a.q_proj": (7, 5), "a.up_proj": (11, 5)}
SHAPES = factor_shapes(MODULES, 3, 2)


def test_an_adapter_is_known_by_its_tensors(tmp_path):
    assert adapter_of(SHAPES, tmp_path) == (3, 2, MODULES)
    many = linears(64, 128, 32, 3)
    assert adapter_of(factor_shapes(many, 4, 4), tmp_path) == (4, 4, many)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"a.norm.weight": (5,)}, "a.norm.weight (5,) was trained and is no factor"),
        ({"a.q_proj.C1": (3, 5)}, "a.q_proj.C1 (3, 5) was trained and is no factor"),
        ({"A1": (3, 5)}, "A1 (3, 5) was trained and is no factor"),
        ({"a.q_proj.A1": (3, 5, 1)}, "a.q_proj.A1 (3, 5, 1) was trained and is no factor"),
        ({"a.down_proj.A1": (3, 5)}, "a.down_proj.B1 is missing"),
        ({"a.q_proj.B2": (8, 2)}, "a.q_proj.B2 is (8, 2); with ranks (3, 2) it should be (7, 2)"),
        ({"a.up_proj.B1": (11, 4)}, "a.up_proj.B1 is (11, 4); with ranks (3, 2)"),
        ({"a.up_proj.A2": (3, 5)}, "a.up_proj.A2 is (3, 5); with ranks (3, 2) it should be (2, 5)"),
    ],
)
def test_tensors_that_make_no_adapter_are_named(tmp_path, change, message):
    with pytest.raises(CheckpointError) as error:
        adapter_of({**SHAPES, **change}, tmp_path)
    assert message in str(error.value)


def test_no_tensors_make_no_adapter(tmp_path):
    with pytest.raises(CheckpointError, match="holds no trained tensors"):
        adapter_of({}, tmp_path)


def test_strict_refuses_what_is_otherwise_skipped(tmp_path):
    older = write_checkpoint(tmp_path / "run/checkpoints", CONFIG, MODULES, 4)
    newer = write_checkpoint(tmp_path / "run/checkpoints", CONFIG, MODULES, 8)
    assert find_checkpoint(tmp_path / "run", print, strict=True) == newer
    os.truncate(newer / "shard-00001-of-00002.safetensors", 100)
    said = []
    assert find_checkpoint(tmp_path / "run", said.append) == older and len(said) == 1
    with pytest.raises(CheckpointError, match=r"skipped step-000008: .*shard-00001.*; without --strict"):
        find_checkpoint(tmp_path / "run", said.append, strict=True)


@pytest.mark.parametrize("rank", [-1, 0, 7, 10**9])
def test_a_rank_that_no_truncation_has_is_refused(tmp_path, rank):
    checkpoint = write_checkpoint(tmp_path / "checkpoints", CONFIG, MODULES)
    with open_checkpoint(checkpoint) as source, pytest.raises(RecipeError, match="is not between 1 and r1[*]r2 = 6"):
        convert_source(source, tmp_path / "adapter", Form("lora", rank=rank))
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "form, said",
    [
        (Form(rank=3), "--rank 3: has a meaning for --format lora alone"),
        (Form("loha", rank=3), "--rank 3: has a meaning for --format lora alone"),
        (Form("merged"), "--base: is needed for a whole model, merged; give the one that was trained"),
    ],
)
def test_forms_that_lack_something_are_refused_by_the_library_too(tmp_path, form, said):
    checkpoint = write_checkpoint(tmp_path / "checkpoints", CONFIG, MODULES)
    with pytest.raises(RecipeError, match=said):
        convert(checkpoint, tmp_path / "adapter", form)
    assert not (tmp_path / "adapter").exists()


def test_a_destination_among_the_checkpoints_is_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "run/checkpoints", CONFIG, MODULES)
    with pytest.raises(CheckpointError, match="lies among the checkpoints of a run"):
        convert(checkpoint, tmp_path / "run/checkpoints/adapter")
    convert(checkpoint, tmp_path / "run/adapter")


def test_a_card_says_what_made_the_adapter(tmp_path):
    known = {"fingerprint": {"data": {"tokens": "abc"}, "software": {"torch": "9.9"}}}
    known["recipe"] = {"train": {"learning_rate": 0.5}, "data": {"path": "```\n# evil"}}
    checkpoint = write_checkpoint(tmp_path / "checkpoints", CONFIG, MODULES, 12, base_model="a/base", **known)
    convert(checkpoint, tmp_path / "adapter")
    card = (tmp_path / "adapter/README.md").read_text()
    for said in ('base_model: "a/base"', "r1 = 3, r2 = 2, alpha = 4", "step 12, on 2 rank(s)", '"learning_rate": 0.5',
                 '"tokens": "abc"', '"torch": "9.9"', 'from_pretrained("a/base")'):  # fmt: skip
        assert said in card
    assert str(tmp_path) not in card and "\n# evil" not in card
    assert read_description(tmp_path / "adapter").provenance["step"] == 12


@pytest.mark.parametrize("step, shown", [(4, True), (5, False), (None, False)])
def test_only_the_scores_of_this_step_reach_the_card(tmp_path, step, shown):
    checkpoint = write_checkpoint(tmp_path / "run/checkpoints", CONFIG, MODULES, 4)
    (tmp_path / "run/evaluation").mkdir()
    scores = {"task": "gsm8k", "n": 8, "exact_match": 62.5, "step": step, "adapter": "/home/me"}
    (tmp_path / "run/evaluation/scores.json").write_text(json.dumps(scores))
    convert(checkpoint, tmp_path / "adapter")
    card = (tmp_path / "adapter/README.md").read_text()
    assert ('"exact_match": 62.5' in card) == shown and "/home" not in card
    (tmp_path / "run/evaluation/scores.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"scores\.json: holds no scores"):
        convert(checkpoint, tmp_path / "other")
    assert not (tmp_path / "other").exists()
