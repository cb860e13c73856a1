"""Activations by arithmetic against what autograd really saves and allocates."""

import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import abba.training.loss
from abba import AdapterConfig, inject
from abba.adapter.baseline import inject_baseline
from abba.adapter.config import BaselineConfig
from abba.planning.architecture import architecture_of
from abba.planning.job import Job
from abba.planning.memory import CHUNK, backward_bytes, evaluation_bytes, kept_bytes, layer_bytes, loss_bytes
from abba.training.attention import keep_rows_apart, line_tokens
from abba.training.batches import collate, lines_of
from abba.training.loss import return_losses
from abba.training.model import enable_checkpointing
from tests.faults.harness import computes_much_in_bfloat16
from tests.warm import ROOT

sys.path.append(str(ROOT / "benchmarks"))
from measure import peak_bytes

BF16, NEAR, ABBA = 2, 0.04, AdapterConfig(4, 4, 16.0)
ROWS_OF_TOKENS = (8, 128)  # two chunks of supervised tokens
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


class Rows:
    """As TokenizedRows: all supervised."""

    def __init__(self, lengths):
        self._lengths = lengths

    def __len__(self):
        return len(self._lengths)

    def input_ids(self, row):
        return torch.full((self._lengths[row],), 1 + row)

    def length(self, row):
        return self._lengths[row]

    def supervised(self, row):
        return torch.arange(1, self._lengths[row])


def build(
    family,
    attention,
    layers=3,
    *,
    vocab=256,
    mode="none",
    adapter=ABBA,
    packing=False,
    shape=ROWS_OF_TOKENS,
    **more,
):
    """(model with adapters in bf16 that returns losses, a batch as training makes it, the job that plans it)."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE, num_hidden_layers=layers, vocab_size=vocab, **more)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention).train()
    (inject_baseline if isinstance(adapter, BaselineConfig) else inject)(model, adapter)
    enable_checkpointing(model, mode)
    return_losses(model)
    rows, tokens = shape
    data = Rows([tokens] + [tokens - 1] * (rows - 1))  # padded
    if packing:  # as many tokens: on one line, or with a mask on lines of two rows each
        data = Rows([tokens // 2] * (2 * rows) if attention == "eager" else [tokens] * rows)
        keep_rows_apart(model)
    lines = lines_of(data, list(range(len(data))), line_tokens(attention, tokens) if packing else None)
    batch = collate(data, lines, 0, torch.device("cpu"))
    assert batch.input_ids.shape == ((1, rows * tokens) if packing and attention == "sdpa" else shape)
    job = Job(architecture_of(config.to_dict(), family), adapter, 1, rows, rows, tokens, mode, BF16, attention)
    return model, batch.inputs, replace(job, packing=packing)


def saved_bytes(*model, **changes):
    model, batch, job = build(*model, **changes)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*batch)
    return sum(storage.nbytes() for storage in storages.values()), job


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "family, attention, more",
    [
        ("llama", "sdpa", {}),
        ("llama", "eager", {}),
        ("mistral", "sdpa", {}),
        ("mistral", "sdpa", {"sliding_window": 64}),
        ("qwen2", "sdpa", {}),
        ("gemma2", "eager", {}),
    ],
)
def test_what_a_layer_saves(family, attention, more, packing):
    (three, job), (two, _) = (saved_bytes(family, attention, layers, packing=packing, **more) for layers in (3, 2))
    scaled_norms = 4 * SHAPE["hidden_size"] * 4 if family == "gemma2" else 0  # 1 + weight in fp32, of no size
    assert layer_bytes(job) + scaled_norms == three - two


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_dropout_saves(dropout):
    """On a GPU one byte says of each feature whether it is left; on a CPU a factor in the model's own dtype does."""
    adapter = BaselineConfig("lora", 8, 16.0, dropout)
    (three, job), (two, _) = (saved_bytes(*LLAMA, layers, adapter=adapter) for layers in (3, 2))
    features = (6 * SHAPE["hidden_size"] + SHAPE["intermediate_size"]) * bool(dropout)
    assert layer_bytes(job) + job.micro_tokens * features * (BF16 - 1) == three - two


def peak_of_a_micro_batch(model, batch):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # under ZeRO-3 a gradient is reduced at once
    return peak_bytes(lambda: model(*batch).backward())


FEW, MANY = {"vocab": 256}, {"vocab": 8192}
WIDE = {"vocab": 256, "adapter": AdapterConfig(16, 16, 16.0)}
LLAMA, GEMMA = ("llama", "sdpa"), ("gemma2", "eager")


@computes_much_in_bfloat16
@pytest.mark.parametrize("model", [LLAMA, GEMMA])
@pytest.mark.parametrize(
    "mode, sizes",
    [
        ("none", FEW),
        ("reentrant", FEW),
        ("selective", FEW),
        ("non_reentrant", FEW),
        ("non_reentrant", WIDE),
        ("none", MANY),
        ("selective", MANY),
    ],
)
def test_the_most_that_a_micro_batch_holds(model, mode, sizes):
    """Few words: a layer's backward is the fullest moment; many: the loss; high ranks: the Khatri-Rao factors."""
    model, batch, job = build(*model, 3, mode=mode, **sizes)
    measured = peak_of_a_micro_batch(model, batch)
    assert (loss_bytes(job) > backward_bytes(job)) == (sizes is MANY)
    assert kept_bytes(job) + max(loss_bytes(job), backward_bytes(job)) == pytest.approx(measured, rel=NEAR)


@computes_much_in_bfloat16
@pytest.mark.parametrize(
    "model, layers, mode, packing, shape",
    [
        (LLAMA, 4, "selective", False, (8, 128)),
        (LLAMA, 3, "selective", True, (2, 512)),
        (LLAMA, 3, "none", True, (2, 512)),
        (("llama", "eager"), 3, "non_reentrant", False, (2, 512)),
        (GEMMA, 3, "non_reentrant", True, (2, 512)),
    ],
)
def test_masks_long_rows_and_a_last_layer_that_keeps_all(model, layers, mode, packing, shape):
    """Rows of 512 tokens in eager attention: the softmax is the fullest moment."""
    model, batch, job = build(*model, layers, mode=mode, packing=packing, shape=shape)
    assert kept_bytes(job) + backward_bytes(job) == pytest.approx(peak_of_a_micro_batch(model, batch), rel=NEAR)


@pytest.mark.parametrize("vocab", [256, 8192])
@pytest.mark.parametrize("model", [LLAMA, GEMMA])
def test_the_most_that_evaluation_holds(model, vocab):
    model, batch, job = build(*model, vocab=vocab)
    with torch.no_grad():
        measured = peak_bytes(lambda: model.eval()(*batch))
    assert evaluation_bytes(replace(job, eval_batch=job.micro_batch)) == pytest.approx(measured, rel=NEAR)


def test_a_chunk_is_that_of_the_loss():
    assert CHUNK == abba.training.loss.CHUNK
