"""A random Llama in several files, and the same short run on it at several world sizes; each run happens once."""

import pytest
import torch
from transformers import AutoTokenizer

from abba.base_model import choose_dtype
from tests.distributed.ranks import NOTHING_STAYS, STORIES, TINY, probe
from tests.models import tiny_model

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 640,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
STEPS = 8
# A CPU without instructions for bfloat16 is slow at it: few rows there, or what is fast.
FAST = f"model.dtype={choose_dtype('auto')[0]}"
IN_BFLOAT16 = ["model.dtype=bfloat16", "train.max_steps=4", "train.global_batch_size=2"]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """bf16 on disk, 2 layers, untied, indexed over several files, with tiny-llama's tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    tiny_model(**SHAPE, tie_word_embeddings=False).to(torch.bfloat16).save_pretrained(directory, max_shard_size="3MB")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(directory)
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


@pytest.fixture(scope="session")
def arguments(base):
    def build(output, *more):
        fixed = [
            f"model.name_or_path={base}",
            f"output_dir={output}",
            f"data.prepared_path={output}/tokens",
            f"data.path={STORIES / 'train.jsonl'}",
        ]
        fixed += ["model.dtype=float32", "model.attn_implementation=sdpa", "data.max_rows=256", "adapter.alpha=16"]
        fixed += ["adapter.r1=4", "adapter.r2=3", "train.global_batch_size=8", "train.per_device_train_batch_size=1"]
        fixed += [f"train.max_steps={STEPS}", "train.learning_rate=1e-2", "data.eval_rows=8"]
        return ["--recipe", "quickstart", *fixed, *NOTHING_STAYS, *more]

    return build


@pytest.fixture(scope="session")
def runs(tmp_path_factory, arguments):
    """runs(name, world_size, *overrides) -> (run directory, findings of each rank); cached by name."""
    root, done = tmp_path_factory.mktemp("runs"), {}

    def run(name, world_size, *overrides, nodes=1):
        if name not in done:
            found = probe(world_size, root / f"{name}-probe", arguments(root / name, *overrides), nodes)
            done[name] = (root / name, found)
        return done[name]

    return run
