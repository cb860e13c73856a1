"""Bases of every family, dtype and file layout, loaded by slices on two ranks: the loss is from_pretrained's."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from abba.training.batches import BatchPlan, split_rows
from abba.training.tokens import TokenizedRows
from tests.distributed.conftest import SHAPE
from tests.distributed.ranks import TINY, probe, read_metrics
from tests.models import tiny_model

SMALL = {**SHAPE, "hidden_size": 64, "intermediate_size": 112, "head_dim": 16, "num_attention_heads": 4}
CASES = {
    "llama, tied, fp16 on disk": ("llama", torch.float16, {"tie_word_embeddings": True}),
    "mistral, fp32 on disk": ("mistral", torch.float32, {"tie_word_embeddings": False}),
    "qwen2, biases, bf16 on disk": ("qwen2", torch.bfloat16, {"tie_word_embeddings": True}),
    "qwen2, biases, computed in bf16": ("qwen2", torch.bfloat16, {"tie_word_embeddings": True}),
    "gemma2, capped logits": ("gemma2", torch.bfloat16, {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_loss_is_that_of_from_pretrained(tmp_path, arguments, case):
    family, dtype, changes = CASES[case]
    base = tmp_path / "base"
    model = tiny_model(family, **SMALL, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at 0
            torch.nn.init.normal_(parameter)
    model.to(dtype).save_pretrained(base)
    # Under its own class name: a Qwen configuration would make transformers read it as a Qwen tokenizer.
    PreTrainedTokenizerFast(
        tokenizer_file=str(TINY / "tokenizer.json"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(base)
    if "fp16" in case:  # as exporters that write every name do
        tensors = load_file(base / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        save_file(tensors, base / "model.safetensors", {"format": "pt"})

    more = [f"model.name_or_path={base}", "train.max_steps=1", "model.attn_implementation=auto"]
    more += ["model.dtype=bfloat16"] if "computed in bf16" in case else []
    found = probe(2, tmp_path / "probe", arguments(tmp_path / "run", *more))

    stored = sum(t.nbytes for t in load_file(base / "model.safetensors").values())
    unused = 8 * 4 if "fp16" in case else 0  # inv_freq; a tied lm_head is read and compared
    assert sum(rank["bytes_read"] for rank in found) == stored - unused
    said = (tmp_path / "probe/rank-0/stdout").read_text()
    assert ("passed over lm_head.weight" in said) == ("fp16" in case)
    assert ("eager attention because this architecture caps" in said) == (family == "gemma2")
    rounding = 1e-2 if "computed in bf16" in case else 1e-5
    assert read_metrics(tmp_path / "run")[0]["loss"] == pytest.approx(dense_loss(tmp_path / "run", base), rel=rounding)


def dense_loss(run, base):
    data = TokenizedRows(next((run / "tokens").glob("tokens-*")))
    rows = BatchPlan(split_rows(len(data), 8, seed=0)[0], 8, 1, seed=0).global_rows(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    total = 0.0
    with torch.no_grad():
        for row in rows:
            ids, prompt = data.input_ids(row).long()[None], int(data.supervised(row)[0])
            logits = model(ids).logits[0, prompt - 1 : -1]
            total += float(F.cross_entropy(logits, ids[0, prompt:], reduction="sum"))
    return total / data.supervised_tokens(rows)
