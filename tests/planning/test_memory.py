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
from abba.training.batches import collate, lines_of
from abba.training.loss import return_losses
from abba.training.model import enable_checkpointing

ROWS, TOKENS, BF16 = 8, 128, 2  # two chunks of supervised tokens
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
    """As TokenizedRows: every row ends in padding but the first, or with `packed` two rows fill a line."""

    def __init__(self, packed):
        lengths = [TOKENS // 2] * (2 * ROWS) if packed else [TOKENS] + [TOKENS - 1] * (ROWS - 1)
        self.rows = list(range(len(lengths)))
        self._lengths = lengths

    def input_ids(self, row):
        return torch.full((self._lengths[row],), 1 + row)

    def length(self, row):
        return self._lengths[row]

    def prompt_length(self, row):
        return 1


def build(family, attention, layers=3, vocab=256, mode="none", rank=4, packing=False):
    """(model with adapters in bf16 that returns losses, a batch of the trainer's, the job that plans it)."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE, num_hidden_layers=layers, vocab_size=vocab)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention).train()
    adapter = AdapterConfig(rank, rank, 16.0)
    inject(model, adapter)
    enable_checkpointing(model, mode)
    return_losses(model)
    data = Rows(packing)
    batch = collate(data, lines_of(data, data.rows, TOKENS if packing else None), 0, torch.device("cpu"))
    assert batch.input_ids.shape == (ROWS, TOKENS)
    job = Job(architecture_of(config.to_dict(), family), adapter, 1, ROWS, ROWS, TOKENS, mode, BF16, attention)
    return model, (batch.input_ids, batch.position_ids, batch.targets), replace(job, packing=packing)


def saved_bytes(family, attention, layers, packing):
    model, batch, _ = build(family, attention, layers, packing=packing)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*batch)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "family, attention",
    [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"), ("qwen2", "sdpa"), ("gemma2", "eager")],
)
def test_what_a_layer_saves(family, attention, packing):
    measured = saved_bytes(family, attention, 3, packing) - saved_bytes(family, attention, 2, packing)
    scaled_norms = 4 * SHAPE["hidden_size"] * 4 if family == "gemma2" else 0  # 1 + weight in fp32, of no size
    assert layer_bytes(build(family, attention, packing=packing)[2]) + scaled_norms == measured


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


def peak_of_a_micro_batch(model, batch):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # under ZeRO-3 a gradient is reduced at once
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with Peak([*model.parameters(), *model.buffers(), *gradients, *batch]) as peak:
        model(*batch).backward()
    return peak.most


def peak_of_evaluation(model, batch):
    with torch.no_grad(), Peak([*model.parameters(), *model.buffers(), *batch]) as peak:
        model.eval()(*batch)
    return peak.most
