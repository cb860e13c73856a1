"""Real ZeRO-3 over real gloo ranks with every threshold at 0: who holds, reads, gathers and computes what."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from abba import AdapterConfig, inject, load_adapter
from abba.adapter.linear import abba_modules
from abba.checkpoint.format import ShardReader, list_checkpoints, read_state
from abba.sharded.replicated import GATHERED_AT_ONCE
from abba.storage import SafetensorsFile
from abba.training.batches import BatchPlan, split_rows
from abba.training.tokens import TokenizedRows
from tests.distributed.conftest import FAST, IN_BFLOAT16, STEPS
from tests.distributed.ranks import read_metrics
from tests.faults.harness import beyond_make_test

WORLDS = (1, 2, 4)


def at_world(runs, world):
    return runs(f"world{world}", world)


def losses(run):
    return [record["loss"] for record in read_metrics(run)]


@pytest.fixture(scope="module")
def plain(base, runs):
    """The same training in one process of plain torch: dense forward, HF's own collation rules, no DeepSpeed."""
    run, _ = at_world(runs, 1)
    data = TokenizedRows(next((run / "tokens").glob("tokens-*")))
    plan = BatchPlan(split_rows(len(data), 8, seed=0)[0], 8, 1, seed=0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa")
    inject(model, AdapterConfig(4, 3, 16.0), seed=0)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0)
    seen = []
    for step in range(STEPS):
        total, count = 0.0, 0
        for row in plan.global_rows(step):
            ids, prompt = data.input_ids(row).long()[None], int(data.supervised(row)[0])
            logits = model(ids).logits[0, prompt - 1 : -1]
            total = total + F.cross_entropy(logits, ids[0, prompt:], reduction="sum")
            count += ids.shape[1] - prompt
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1.0 if step == 0 else 1 - (step - 1) / (STEPS - 1))
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(total.detach()) / count)
    return model, seen


def test_losses_equal_plain_torch_at_every_world_size(runs, plain):
    _, expected = plain
    assert expected[-1] < expected[0] - 0.05, "it must learn something for the comparison to mean anything"
    for world in WORLDS:
        assert losses(at_world(runs, world)[0]) == pytest.approx(expected, rel=1e-5)


def test_the_adapter_a_run_leaves_is_the_plain_one(runs, plain, base):
    model, _ = plain
    trained = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    load_adapter(trained, at_world(runs, 2)[0] / "adapter")
    for name, module in abba_modules(model).items():
        for ours, theirs in zip(abba_modules(trained)[name].factors, module.factors, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_step_zero_loss_is_that_of_from_pretrained(runs, plain, base):
    run, _ = at_world(runs, 2)
    data = TokenizedRows(next((run / "tokens").glob("tokens-*")))
    plan = BatchPlan(split_rows(len(data), 8, seed=0)[0], 8, 1, seed=0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in plan.global_rows(0):
            ids, labels = data.input_ids(row).long()[None], data.input_ids(row).long()[None].clone()
            labels[0, : int(data.supervised(row)[0])] = -100
            supervised = int((labels != -100).sum())
            total += float(model(ids, labels=labels).loss) * supervised
            count += supervised
    assert losses(run)[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_each_rank_reads_and_holds_its_share_of_the_base(runs, base, world):
    _, found = at_world(runs, world)
    stored = 0
    for path in base.glob("*.safetensors"):
        with SafetensorsFile(path) as file:
            stored += sum(tensor.numel * tensor.dtype.itemsize for tensor in file.tensors.values())
    assert sum(rank["bytes_read"] for rank in found) == stored, "every byte is read once, by one rank"
    for rank in found:
        padding = rank["base_parameters"]  # less than one element per tensor and rank
        assert abs(rank["bytes_read"] - stored / world) <= 2 * padding * world
        assert rank["base_elements"] / world <= rank["held_elements"] <= rank["base_elements"] / world + padding
        assert rank["resident_2d"] == [0] * STEPS if world > 1 else True


def test_the_checksum_of_the_resident_slices_is_that_of_the_files(runs, base):
    bits = 0
    for path in base.glob("*.safetensors"):
        for tensor in load_file(path).values():
            bits += int(tensor.float().view(torch.int32).sum(dtype=torch.int64))
    for world in WORLDS:
        run, _ = at_world(runs, world)
        state = read_state(list_checkpoints(run / "checkpoints")[-1])
        assert state.fingerprint["model"]["weights"] == f"{bits % 2**64:016x}"


@pytest.mark.parametrize("world", [2, 4])
def test_no_factor_is_gathered_in_forward_or_backward_and_the_base_always_is(runs, world):
    _, found = at_world(runs, world)
    for rank in found:
        assert rank["gathered_factors"][1:] == [0] * (STEPS - 1)
        micro_batches, matrices = 8 // world, 2 * 7 + 2
        # Twice each: forward, and backward, where checkpointing recomputes; embedding and head in forward alone.
        assert rank["gathered_base"][1:] == [micro_batches * (2 * matrices - 2)] * (STEPS - 1)


@pytest.mark.parametrize("world", [2, 4])
def test_few_gathers_make_all_factors_whole_after_an_update(runs, world):
    factors, norms = 2 * 7 * 4, 2 * 2 + 1
    for rank in at_world(runs, world)[1]:
        assert rank["refresh_gathers"] == [-(-(factors + norms) // GATHERED_AT_ONCE)] * (1 + STEPS) == [2] * (1 + STEPS)


def test_factors_by_svd_are_bit_equal_at_every_world_size(runs, base):
    reference = at_world(runs, 1)[1][0]["svd"]
    assert "model.layers.1.mlp.down_proj" in reference  # 512 x 1376
    for world in WORLDS:
        for rank in at_world(runs, world)[1]:
            assert rank["svd"] == reference


def test_masters_start_from_the_unrounded_svd(runs):
    run, found = runs("bf16", 2, *IN_BFLOAT16)
    for rank in found:
        assert rank["masters_equal_to_their_bf16"] == 0, "a master that equals its bf16 round trip was rounded"
    assert losses(run)[-1] < losses(run)[0]


def test_rope_buffers_stay_fp32_in_bf16(runs):
    _, found = runs("bf16", 2, *IN_BFLOAT16)
    inverse = {name: dtype for name, dtype in found[0]["buffers"].items() if "inv_freq" in name}
    assert inverse and set(inverse.values()) == {"torch.float32"}


@pytest.mark.parametrize(
    ("mode", "linears"),
    [
        ("selective", 21),
        pytest.param("none", 14, marks=beyond_make_test),
        pytest.param("non_reentrant", 28, marks=beyond_make_test),
    ],
)
def test_gradient_checkpointing_does_not_change_a_bit(runs, mode, linears):
    run, found = runs(mode, 2, FAST, f"train.gradient_checkpointing={mode}")
    checkpointed, found_there = runs("reentrant", 2, FAST)
    assert losses(run) == losses(checkpointed)
    assert found[0]["layer_forwards"] == [linears * 4] * STEPS, "7 linears of 2 layers, 4 micro-batches"
    assert found_there[0]["layer_forwards"] == [14 * 4 * 2] * STEPS


def test_one_micro_batch_of_eight_rows_equals_eight_of_one(runs):
    whole, _ = runs("whole", 1, "train.per_device_train_batch_size=8")
    assert losses(whole) == pytest.approx(losses(at_world(runs, 1)[0]), rel=1e-5)


def test_packed_and_grouped_rows_give_the_same_losses(runs):
    packed, found = runs(
        "packed", 2, "train.per_device_train_batch_size=4", "data.packing=true", "train.group_by_length=true"
    )
    assert losses(packed) == pytest.approx(losses(at_world(runs, 1)[0]), rel=1e-5)
    assert found[0]["layer_forwards"] == [14 * 2] * STEPS, "one micro-batch of four rows, computed twice"
    expected = read_metrics(at_world(runs, 1)[0])[-1]["eval_loss"]
    assert read_metrics(packed)[-1]["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_holds_slices_of_masters_and_moments_and_no_base(runs):
    run, _ = at_world(runs, 4)
    checkpoint = list_checkpoints(run / "checkpoints")[-1]
    assert checkpoint.name == "step-000008"
    state = read_state(checkpoint)
    names = {path.name for path in checkpoint.iterdir()}
    assert names == {f"shard-{r:05d}-of-00004.safetensors" for r in range(4)} | {"state.json", "manifest.json"}
    adapter = AutoModelForCausalLM.from_pretrained(json.loads((run / "adapter/adapter_config.json").read_text())[
        "base_model_name_or_path"
    ], dtype=torch.float32)  # fmt: skip
    load_adapter(adapter, run / "adapter")
    with ShardReader(checkpoint, state) as reader:
        for name in state.tensors:
            assert torch.equal(reader.read("master", name), adapter.get_parameter(name))
            assert reader.read("exp_avg_sq", name).min() >= 0
            assert reader.read("exp_avg", name).any()
    assert set(state.tensors) == {f"{m}.{f}" for m in abba_modules(adapter) for f in ("A1", "B1", "A2", "B2")}


def test_metrics_have_every_field(runs):
    run, _ = at_world(runs, 2)
    records = read_metrics(run)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    fields = "step epoch loss learning_rate grad_norm tokens supervised_tokens tokens_per_second step_seconds"
    assert set(f"{fields} data_seconds peak_memory_bytes".split()) <= records[0].keys()
    assert "eval_loss" in records[-1] and records[-1]["save_bytes"] > 0
    assert records[-1]["eval_loss"] == pytest.approx(read_metrics(at_world(runs, 1)[0])[-1]["eval_loss"], rel=1e-5)
