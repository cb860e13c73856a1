"""A model whose layers lie on several devices, under accelerate's real hooks.

Two GPUs are not to be had here. What runs instead is the same branch of accelerate with every device the CPU
(force_hooks), and its real placement of models of 8B and 70B, built without weights.
"""

from collections import Counter

import accelerate.hooks
import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.accelerate import get_balanced_memory, infer_auto_device_map

from abba import AbbaLinear, AdapterConfig, inject, load_adapter, save_adapter
from abba.adapter.initialize import Factors
from abba.adapter.linear import bypass
from abba.base_model import load_tokenizer, load_whole
from abba.errors import ArgumentError, RecipeError
from abba.evaluation import engine, generate
from abba.evaluation.generate import generate_greedy, load_for_generation
from abba.evaluation.placement import Demand, Gpus, kv_cache_bytes
from abba.evaluation.score import evaluate
from abba.evaluation.subject import Subject
from abba.sharded.ranks import Ranks
from tests.distributed.ranks import STORIES, TINY
from tests.evaluation.made import adapted
from tests.models import tiny_model

TOKENS = torch.arange(24).reshape(2, 12) * 7 + 5
OUTSIDE_LAYERS = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")


def split(model):
    """The model as from_pretrained leaves one that lies on several GPUs: a hook on every layer and on every linear."""
    layers = [f"model.layers.{index}" for index in range(model.config.num_hidden_layers)]
    placement = dict.fromkeys([*OUTSIDE_LAYERS, *layers], "cpu")
    return dispatch_model(model, placement, force_hooks=True, skip_keys=model._skip_keys_device_placement)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("split") / "adapter"
    save_adapter(adapted()[0], directory)
    return directory


@pytest.fixture
def hooks_run(monkeypatch):
    """How often a hook has run, by the class of its module."""
    count, original = Counter(), accelerate.hooks.AlignDevicesHook.pre_forward

    def counted(self, module, *args, **kwargs):
        count[type(module)] += 1
        return original(self, module, *args, **kwargs)

    monkeypatch.setattr(accelerate.hooks.AlignDevicesHook, "pre_forward", counted)
    return count


def test_the_adapter_works_under_hooks_and_can_be_bypassed(adapter, hooks_run):
    plain, hooked = (load_whole(TINY, torch.float32, "sdpa") for _ in range(2))
    base = plain(TOKENS).logits
    for model in (plain, split(hooked)):
        load_adapter(model, adapter)
    assert torch.equal(hooked(TOKENS).logits, plain(TOKENS).logits)
    assert hooks_run[AbbaLinear] == 28
    assert (plain(TOKENS).logits - base).abs().max() > 0.5, "the adapter must matter"
    with bypass(hooked):
        assert torch.equal(hooked(TOKENS).logits, base)
    assert torch.equal(hooked(TOKENS).logits, plain(TOKENS).logits)


def test_scores_and_generations_of_a_split_model_are_those_of_a_whole_one(adapter, hooks_run, tmp_path, monkeypatch):
    def scored(name):
        return evaluate(
            Subject(TINY, adapter), "gsm8k", str(STORIES / "test.jsonl"), tmp_path / name,
            limit=12, engine="transformers", batch_size=5, max_new_tokens=32, dtype=torch.bfloat16, say=print,
        )  # fmt: skip

    whole = scored("whole")
    assert not hooks_run
    monkeypatch.setattr(generate, "load_whole", lambda *args, **kwargs: split(load_whole(*args, **kwargs)))
    parts = scored("parts")
    assert hooks_run[AbbaLinear] > 28
    assert whole == parts
    texts = [(tmp_path / name / "generations.jsonl").read_bytes() for name in ("whole", "parts")]
    assert texts[0] == texts[1]


def test_layers_that_would_be_fetched_from_disk_for_every_token_are_refused(adapter):
    with pytest.raises(ArgumentError, match=r"its layers do not fit into \['1\.0 MB', '10\.0 MB'\] of memory") as error:
        load_for_generation(TINY, adapter, torch.float32, {"cpu": 10**6, "disk": 10**7})
    assert "smaller batch size" in str(error.value)


def test_a_model_too_large_for_the_gpu_of_a_rank_is_scored_by_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "visible_gpus", lambda: Gpus(1, 1_000_000, 1_000_000))
    settings = {"limit": 2, "batch_size": 2, "max_new_tokens": 8, "dtype": torch.float32, "say": print}
    rows = str(STORIES / "test.jsonl")
    with pytest.raises(ArgumentError, match=r"each of 8 ranks has its own; start it as one process, which takes all"):
        evaluate(Subject(TINY, None), "gsm8k", rows, tmp_path, engine="transformers", ranks=Ranks(3, 8), **settings)


def test_factors_lie_where_their_base_weight_lies():
    model = tiny_model()
    model.model.layers[1].to("meta")
    config = AdapterConfig(2, 2)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"):
        linear = model.get_submodule(name)
        out, into = linear.weight.shape
        AbbaLinear.adopt(linear, Factors(*map(torch.ones, ((2, into), (out, 2), (2, into), (out, 2)))), config)
        assert {factor.device for factor in linear.factors} == {linear.weight.device}


def test_a_forward_that_hides_the_adapter_is_refused():
    model = tiny_model()
    linear = model.model.layers[0].mlp.up_proj
    linear.forward = lambda x: nn.Linear.forward(linear, x)
    with pytest.raises(RecipeError, match="has replaced the forward"):
        inject(model, AdapterConfig(2, 2))


def test_memory_that_runs_out_while_generating_is_named(monkeypatch):
    model = load_for_generation(TINY, None, torch.float32, {})

    def full(**kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(model, "generate", full)
    with pytest.raises(ArgumentError, match=r"out of GPU memory with 2 sequences of .* use a smaller batch size$"):
        list(generate_greedy(model, load_tokenizer(TINY), [[1, 5], [1, 7]], [[0, 1]], 8, [2]))


SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_the_arithmetic_lets_pass_is_placed_on_the_gpus_with_room_for_its_cache(name):
    config = AutoConfig.for_model("llama", **SHAPES[name], num_key_value_heads=8, vocab_size=128256)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    sizes = {name: parameter.numel() * 2 for name, parameter in model.named_parameters()}
    layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
    kv_cache = kv_cache_bytes(config.num_hidden_layers, 8, 128, 32, 712, 2)
    demand = Demand(sum(sizes.values()), kv_cache, 0, max(layer, *sizes.values()))
    placed = 0
    for count in range(2, 9):
        for size in range(4, 84, 4):
            usable = Gpus(count, size * 10**9, size * 10**9).usable
            if demand.on_each(count) > usable:
                continue
            placed += 1
            budget, whole = dict.fromkeys(range(count), demand.for_weights(usable)), model._no_split_modules
            balanced = get_balanced_memory(model, max_memory=budget, no_split_module_classes=whole)
            placement = infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=whole)
            assert all(isinstance(device, int) for device in placement.values()), (count, size, placement)
            for gpu in range(count):
                mine = [part for part, device in placement.items() if device == gpu]
                weights = sum(sizes[name] for name in sizes if any(name.startswith(f"{part}.") for part in mine))
                layers = sum(".layers." in part for part in mine)
                assert weights + kv_cache * layers // config.num_hidden_layers <= usable, (count, size, gpu)
    assert placed > 50
