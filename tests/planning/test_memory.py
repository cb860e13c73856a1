"""Activations by arithmetic against what autograd really saves and allocates."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from abba import AdapterConfig, inject
from abba.planning.architecture import architecture_of
from abba.planning.job import Job
from abba.planning.memory import backward_bytes, evaluation_bytes, kept_bytes, layer_bytes, loss_bytes
from abba.training.loss import token_loss_sum
from abba.training.model import enable_checkpointing

ROWS, TOKENS, BF16 = 2, 128, 2
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def build(family, attention, layers=3, vocab=256, mode="none", rank=4):
    """(model with adapters in bf16, inputs with padding, the job that plans it)."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE, num_hidden_layers=layers, vocab_size=vocab)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention).train()
    adapter = AdapterConfig(rank, rank, 16.0)
    inject(model, adapter)
    enable_checkpointing(model, mode)
    ids = torch.randint(1, vocab, (ROWS, TOKENS))
    mask = torch.ones_like(ids)
    mask[0, -9:] = 0
    architecture = architecture_of(config.to_dict(), family)
    job = Job(architecture, adapter, 1, ROWS, ROWS, TOKENS, mode, BF16, attention)
    return model, {"input_ids": ids, "attention_mask": mask, "use_cache": False}, job


def saved_bytes(family, attention, layers):
    model, inputs, _ = build(family, attention, layers)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(
    "family, attention",
    [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"), ("qwen2", "sdpa"), ("gemma2", "eager")],
)
def test_what_a_layer_saves(family, attention):
    measured = saved_bytes(family, attention, 3) - saved_bytes(family, attention, 2)
    scaled_norms = 4 * SHAPE["hidden_size"] * 4 if family == "gemma2" else 0  # 1 + weight in fp32, of no size
    assert layer_bytes(build(family, attention)[2]) + scaled_norms == measured


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within it hold at once."""

    def __init__(self, known):
        super().__init__()
        self.live = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self._known:
                self._known.add(key)
                self.live += tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), self._freed, key, tensor.untyped_storage().nbytes())
        self.most = max(self.most, self.live)
        return result

    def _freed(self, key, size):
        self._known.discard(key)
        self.live -= size


@pytest.mark.parametrize("mode", ["none", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("family, attention", [("llama", "sdpa"), ("gemma2", "eager")])
@pytest.mark.parametrize("vocab, rank", [(256, 4), (8192, 4), (256, 16)])
def test_the_most_that_a_micro_batch_holds(family, attention, mode, vocab, rank):
    """Few words: a layer's backward is the fullest moment; many: the loss; high ranks: the Khatri-Rao factors."""
    model, inputs, job = build(family, attention, 3, vocab, mode, rank)
    labels = inputs["input_ids"].clone()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # under ZeRO-3 a gradient is reduced at once
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    inputs_and_labels = [inputs["input_ids"], inputs["attention_mask"], labels]
    with Peak([*model.parameters(), *model.buffers(), *gradients, *inputs_and_labels]) as peak:
        logits = model(**inputs).logits
        token_loss_sum(logits, labels).backward()
    planned = kept_bytes(job) + max(loss_bytes(job), backward_bytes(job))
    assert planned == pytest.approx(peak.most, rel=0.06)


def test_the_most_that_evaluation_holds():
    model, inputs, job = build("llama", "sdpa", vocab=8192)
    tensors = [inputs["input_ids"], inputs["attention_mask"]]
    with torch.no_grad(), Peak([*model.parameters(), *model.buffers(), *tensors]) as peak:
        logits = model(**inputs).logits
        token_loss_sum(logits, inputs["input_ids"])
    assert evaluation_bytes(replace(job, eval_batch=ROWS)) == pytest.approx(peak.most, rel=0.06)
