"""Checkpoint -> adapter -> merged model -> reload: the same function all the way."""

import pytest
import torch

from abba import AdapterConfig, load_adapter
from abba.adapter.directory import ABBA_CONFIG
from abba.base_model import load_whole
from abba.checkpoint.convert import Form, convert, convert_source
from abba.checkpoint.source import open_checkpoint
from abba.evaluation.parity import merged_difference
from tests.checkpoint.made import linears, write_checkpoint
from tests.models import SMALL, tiny_model

CONFIG = AdapterConfig(4, 3, 1.5)
TOKENS = torch.arange(2 * 13).reshape(2, 13) * 7 % 128
KV = SMALL["num_key_value_heads"] * SMALL["head_dim"]
MODULES = linears(SMALL["hidden_size"], SMALL["intermediate_size"], KV, SMALL["num_hidden_layers"])


@pytest.fixture(params=["llama", "gemma2"])
def base(tmp_path, request):
    tiny_model(request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def logits(directory):
    return load_whole(directory, torch.float32, "eager")(TOKENS).logits


@torch.inference_mode()
@pytest.mark.parametrize("world", [1, 3])
def test_the_function_survives_every_form(tmp_path, base, world):
    checkpoint = write_checkpoint(tmp_path / "checkpoints", CONFIG, MODULES, world=world)
    for name in ("adapter", "again"):
        convert(checkpoint, tmp_path / name)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_model.safetensors", ABBA_CONFIG}
    for path in (tmp_path / "adapter").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    model = load_whole(base, torch.float32, "eager")
    plain = model(TOKENS).logits
    load_adapter(model, tmp_path / "adapter")
    expected = model(TOKENS).logits
    assert (expected - plain).abs().max() > 0.1, "the adapter must matter"

    with open_checkpoint(checkpoint) as source:
        for dtype, tolerance in ((None, 1e-5), (torch.bfloat16, 5e-2)):
            merged = tmp_path / f"merged-{dtype}"
            _, summary = convert_source(source, merged, Form("merged", dtype=dtype, base=base))
            largest = max(1.0, expected.abs().max().item())
            assert (logits(merged) - expected).abs().max() <= tolerance * largest
            assert (summary.rounding > 0) == (dtype is not None)
            difference, _ = merged_difference(base, merged, source.all_factors())
            assert difference <= tolerance * largest
            factors = source.all_factors()
            name = next(iter(factors))
            factors[name] = factors[name]._replace(B1=-factors[name].B1)
            assert merged_difference(base, merged, factors)[0] > 1e-2
    assert torch.equal(logits(base), plain), "the base is as it was"
