"""Tokens made once: shared by runs, waited for by ranks, verified, replaced where damaged; and the report's numbers."""

import json
import random
import re
import shutil
import socket
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import abba.training.prepare
from abba.errors import CheckpointError, RecipeError
from abba.sharded.ranks import Ranks
from abba.training.batches import BatchPlan, collate, lines_of
from abba.training.data_report import data_report, padding_share, percentile
from abba.training.dry_run import dry_run
from abba.training.mixture import Mixture, epoch_rows
from abba.training.prepare import prepare, refuse_unlike
from abba.training.recipe import load_recipe
from abba.training.tokens import TokenizedRows, write_tokens
from tests.models import SMALL
from tests.warm import ROOT

RANK_1 = Ranks(rank=1, world_size=2, local_rank=1, local_world_size=2)


@pytest.fixture
def recipe(tmp_path):
    def load(*overrides):
        where = [
            f"data.prepared_path={tmp_path / 'prepared'}",
            f"model.name_or_path={ROOT / 'recipes/assets/tiny-llama'}",
        ]
        where += [f"data.path={ROOT / 'recipes/assets/stories/train.jsonl'}", "data.max_rows=80", *overrides]
        return load_recipe("quickstart", where, ROOT / "recipes")

    return load


@pytest.fixture
def tokenised(monkeypatch):
    """How often rows were tokenised."""
    counted, function = [], abba.training.prepare.prepare_tokens

    def counting(*arguments):
        counted.append(arguments[-1])
        return function(*arguments)

    monkeypatch.setattr(abba.training.prepare, "prepare_tokens", counting)
    return counted


@pytest.fixture
def base(tmp_path):
    """A base of another architecture, as the override that names it; without weights, which nothing here reads."""

    def make(family):
        shutil.copytree(ROOT / "recipes/assets/tiny-llama", tmp_path / family, ignore=lambda *_: ["model.safetensors"])
        words = json.loads((tmp_path / family / "config.json").read_text())["vocab_size"]
        AutoConfig.for_model(family, **{**SMALL, "vocab_size": words}).save_pretrained(tmp_path / family)
        return f"model.name_or_path={tmp_path / family}"

    return make


def test_packing_on_an_architecture_that_cannot_is_refused_before_anything_is_loaded(recipe, base, tokenised):
    granite = base("granite")
    for start in (lambda recipe: prepare(recipe, Ranks(), print), lambda recipe: dry_run(recipe, 1)):
        with pytest.raises(RecipeError, match=r"data\.packing: .* not in granite; set data\.packing=false"):
            start(recipe(granite, "data.packing=true"))
    assert not tokenised
    assert len(prepare(recipe(granite), Ranks(), print)[2]) == 80


@pytest.mark.parametrize(
    "rope, most, said",
    [
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, 4096, "rope_type longrope is not"),
        ({"rope_type": "dynamic", "factor": 2.0}, 255, "data.max_length: beyond 255 tokens .* lower it from 256$"),
        ({"rope_type": "dynamic", "factor": 2.0}, 256, None),
        ({"rope_type": "linear", "factor": 2.0}, 255, None),
    ],
)
def test_frequencies_that_follow_the_longest_row_are_refused(recipe, base, tokenised, rope, most, said):
    llama = base("llama")
    path = Path(llama.partition("=")[2]) / "config.json"
    config = json.loads(path.read_text())
    config |= {"rope_parameters": {"rope_theta": 1e4, **rope}, "max_position_embeddings": most}
    path.write_text(json.dumps(config))
    for start in (lambda recipe: dry_run(recipe, 1), lambda recipe: prepare(recipe, Ranks(), print)):
        with pytest.raises(RecipeError, match=said) if said else nullcontext():
            start(recipe(llama))
    assert bool(tokenised) == (said is None)


def test_a_dry_run_finds_what_needs_no_weights(recipe, base, tmp_path, monkeypatch):
    small = base("llama")
    path = Path(small.partition("=")[2]) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 16}))
    for start in (lambda recipe: prepare(recipe, Ranks(), print), lambda recipe: dry_run(recipe, 1)):
        with pytest.raises(CheckpointError, match="its model has 16 embeddings; tokenizer and model do not belong"):
            start(recipe(small))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecipeError, match="adapter.method: lora: needs peft, which is not installed"):
        dry_run(recipe("adapter.method=lora", "adapter.r1=", "adapter.r2=", "adapter.alpha="), 1)


def test_a_dry_run_refuses_an_attention_that_the_base_cannot_take(recipe, base):
    gemma = base("gemma2")
    dry_run(recipe(gemma, "model.attn_implementation=eager"), 1)
    with pytest.raises(RecipeError, match=r"model\.attn_implementation: sdpa .* gemma2 does; write auto or eager"):
        dry_run(recipe(gemma, "model.attn_implementation=sdpa"), 1)


def test_ranks_that_would_compute_in_other_dtypes_are_refused():
    refuse_unlike([b"bfloat16"] * 3)
    with pytest.raises(RecipeError, match=r"auto is bfloat16 on rank 0 and float32 on rank 2, .*; write one of them"):
        refuse_unlike([b"bfloat16", b"bfloat16", b"float32"])


def test_runs_on_the_same_data_tokenise_once(recipe, tokenised, tmp_path):
    first = prepare(recipe("output_dir=runs/a"), Ranks(), print)[2]
    (tmp_path / "moved").mkdir()
    copy = tmp_path / "moved/same.jsonl"
    copy.write_bytes((ROOT / "recipes/assets/stories/train.jsonl").read_bytes())
    for overrides in (["output_dir=runs/b", "train.learning_rate=1e-5"], ["data.eval_rows=9"], [f"data.path={copy}"]):
        again = prepare(recipe(*overrides), Ranks(), print)[2]
        assert again.sha256 == first.sha256 and again.parts[0].path == first.parts[0].path
    assert len(tokenised) == 1
    assert prepare(recipe("data.max_rows=81"), Ranks(), print)[2].sha256 != first.sha256
    assert len(tokenised) == 2


def test_every_damage_is_seen_and_mended(recipe, tokenised):
    path = prepare(recipe(), Ranks(), print)[2].parts[0].path
    right, draw = path.read_bytes(), random.Random(7)
    for trial in range(200):
        wrong = bytearray(right)
        if trial % 6 == 0:
            wrong = wrong[: draw.randrange(len(wrong))]
        else:
            wrong[draw.randrange(len(wrong))] ^= 1 << draw.randrange(8)
        path.write_bytes(wrong)
        with pytest.raises(CheckpointError) as error:
            TokenizedRows(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    said, count = [], len(tokenised)
    assert len(prepare(recipe(), Ranks(), said.append)[2]) == 80
    assert said[0].startswith(f"data: WARNING: {path}: is damaged") and said[0].endswith("it is made anew")
    assert path.read_bytes() == right and len(tokenised) == count + 1
    assert [found.name for found in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("start", ["nothing", "damaged"])
def test_the_other_ranks_wait_for_rank_0(recipe, tokenised, start):
    path = prepare(recipe(), Ranks(), print)[2].parts[0].path
    right = path.read_bytes()
    path.unlink() if start == "nothing" else path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    found = []
    rank_1 = threading.Thread(target=lambda: found.append(prepare(recipe(), RANK_1, print)[2]), daemon=True)
    rank_1.start()
    rank_1.join(1)
    assert rank_1.is_alive() and not found
    ours = prepare(recipe(), Ranks(), print)[2]
    rank_1.join(20)
    assert found[0].sha256 == ours.sha256 and len(tokenised) == 2, "rank 1 never tokenises"


def test_a_rank_that_sees_another_disk_says_so(recipe, monkeypatch):
    monkeypatch.setattr(abba.training.prepare, "SHARED_WITHIN_SECONDS", 0.3)
    with pytest.raises(CheckpointError, match=r"data\.prepared_path .*put it on storage that all nodes share"):
        prepare(recipe(), RANK_1, print)
    path = prepare(recipe(), Ranks(), print)[2].parts[0].path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="tokens-"):
        prepare(recipe(), RANK_1, print)


def test_a_node_that_waits_for_what_another_disk_holds_says_so_once(recipe, monkeypatch, capsys):
    monkeypatch.setattr(abba.training.prepare, "SHARED_WITHIN_SECONDS", 0.3)
    path = prepare(recipe(), Ranks(), print)[2].parts[0].path
    elsewhere = path.rename(path.with_name("elsewhere"))
    capsys.readouterr()
    found = []
    ranks = [Ranks(rank=8 + local, world_size=16, local_rank=local, local_world_size=8) for local in range(2)]
    waiting = [
        threading.Thread(target=lambda r=r: found.append(prepare(recipe(), r, print)), daemon=True) for r in ranks
    ]
    for thread in waiting:
        thread.start()
    said, deadline = "", time.monotonic() + 60
    while "waits for" not in said and time.monotonic() < deadline:
        time.sleep(0.1)
        said += capsys.readouterr().err
    elsewhere.rename(path)
    for thread in waiting:
        thread.join(60)
    said += capsys.readouterr().err
    assert said.startswith(f"data: rank 8 on {socket.gethostname()} waits for {path}, which rank 0 makes; ")
    assert said.count("data: ") == 1 and len(found) == 2


@pytest.mark.parametrize("family, refused", [("opt", True), ("llama", False)])
def test_rows_beyond_the_bases_positions(recipe, base, family, refused):
    model = base(family)
    path = Path(model.partition("=")[2]) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 64}))
    linears, said = "adapter.target_modules=all-linear", []
    shown = "the longest row has [0-9]+ tokens"
    end = rf"data\.max_length: {shown} .* lower it to 64$"
    for start in (lambda recipe: prepare(recipe, Ranks(), said.append), lambda recipe: dry_run(recipe, 1)):
        with pytest.raises(RecipeError, match=end) if refused else nullcontext():
            start(recipe(model, linears))
        start(recipe(model, linears, "data.max_length=64"))
    warnings = [line for line in said if re.match(rf"data: WARNING: {shown}; this base was made for 64", line)]
    assert len(warnings) == (not refused)


def rows_of(tmp_path, uncut, prompts, max_length, left_out=None):
    """Rows with these lengths and prompts, from a tokens file."""
    lengths = torch.tensor(uncut).clamp(max=max_length)
    tensors = {"input_ids": torch.arange(int(lengths.sum()), dtype=torch.int32), "stops": lengths.cumsum(0)}
    pairs = zip(lengths.tolist(), prompts, strict=True)
    masks = [torch.arange(length) >= prompt for length, prompt in pairs]
    tensors |= {"supervised": torch.cat(masks).byte(), "sources": torch.arange(len(uncut))}
    write_tokens(tmp_path / "tokens-x.safetensors", {**tensors, "uncut": torch.tensor(uncut)}, left_out or {})
    return Mixture([TokenizedRows(tmp_path / "tokens-x.safetensors")], ["x"], [1.0])


def test_the_reports_numbers_are_those_of_a_dataset_made_by_hand(tmp_path):
    # 20 rows of 10 tokens, 18 of 20 and two of 90 and 100, which max_length=50 cuts; 4 tokens of prompt in each.
    uncut = [10] * 10 + [20] * 8 + [90, 100]
    data = rows_of(tmp_path, uncut, [4] * 20, 50, {"answer is empty": 3})
    plan = BatchPlan(list(range(20)), 20, 20, seed=0)  # one step is the whole dataset
    rows, lengths, tokens, padding, steps = data_report(data, plan, 3, None)
    assert rows == "rows: 20 to train on, 0 held out, 3 left out, 2 cut"
    assert lengths == "tokens a row, before cutting: p50 10  p90 20  p99 100  max 100"
    assert tokens == "tokens: 360; 77.8% of them are learned from, the others are prompt"  # 100 + 160 + 100; 280 of 360
    assert padding == "padding: 64.0% of what is computed, at 20 rows a micro-batch"  # 360 of 20 x 50
    assert steps == "steps: 3 of 20 rows, 3.00 epochs"
    assert data.notes == ["left out 3 rows: answer is empty", "cut 2 of 20 rows to data.max_length=50 tokens"]


def test_the_report_of_a_mixture_counts_an_epoch(tmp_path):
    parts = [rows_of(tmp_path, [10] * 10, [4] * 10, 50).parts[0], rows_of(tmp_path, [30] * 4, [9] * 4, 50).parts[0]]
    data = Mixture(parts, ["a.jsonl", "b.jsonl"], [0.5, 2.0])
    plan = BatchPlan(list(range(14)), 13, 13, 0, None, epoch_rows(data, list(range(14)), 0))
    rows, first, second, _, tokens, padding, steps = data_report(data, plan, 2, None)
    assert rows == "rows: 14 to train on, 0 held out, 0 left out, 0 cut"
    assert first == "a.jsonl: 10 rows to train on, weight 0.5: 5 of an epoch's 13, 38.5%"
    assert second == "b.jsonl: 4 rows to train on, weight 2: 8 of an epoch's 13, 61.5%"
    assert tokens == "tokens: 290; 68.3% of them are learned from, the others are prompt"  # 5 x 10 + 8 x 30; 30 + 168
    assert padding == "padding: 25.6% of what is computed, at 13 rows a micro-batch"  # 290 of 13 x 30
    assert steps == "steps: 2 of 13 rows, 2.00 epochs"


def test_the_padding_is_that_of_the_batches_which_are_trained_on(tmp_path):
    draw = random.Random(3)
    data = rows_of(tmp_path, [draw.randint(2, 40) for _ in range(30)], [1] * 30, 32)
    plan = BatchPlan(list(range(30)), 12, 3, seed=5)
    groups = [rows for step in range(4) for rows in plan.micro_batches(step, 0, 1)]
    for most in (None, 50):
        computed = sum(
            collate(data, lines_of(data, rows, most), 0, torch.device("cpu")).input_ids.numel() for rows in groups
        )
        padding = 1 - sum(data.tokens(rows) for rows in groups) / computed
        assert padding > 0.05 and padding_share(data, groups, most) == pytest.approx(padding)


@pytest.mark.parametrize("values", [[7], [1, 2], list(range(1, 101)), [5] * 9 + [1000]])
def test_a_percentile_is_a_value_that_so_many_do_not_exceed(values):
    for percent in (1, 50, 90, 99, 100):
        found = percentile(torch.tensor(values), percent)
        assert found in values
        assert sum(value <= found for value in values) >= len(values) * percent / 100
        assert sum(value < found for value in values) < len(values) * percent / 100
