"""PEFT's methods as this project puts them into a model and onto disk, against PEFT's own."""

import json
import math
import shutil
import sys

import pytest
import torch
from peft import PeftModel, get_peft_config, get_peft_model
from safetensors.torch import load_file, save_file

from abba import AdapterConfig, inject, load_adapter
from abba.adapter.baseline import attach, inject_baseline
from abba.adapter.config import BASELINES, SEVEN_LINEARS, BaselineConfig, FullConfig, factors_of
from abba.adapter.directory import AdapterDescription, read_description
from abba.adapter.files import read_factors, verify_adapter, write_adapter
from abba.adapter.full import write_full
from abba.adapter.linear import bypass
from abba.adapter.model_files import verify_model
from abba.errors import CheckpointError, RecipeError
from tests.models import tiny_model
from tests.test_requirements import requirements

TOKENS = torch.arange(32).reshape(2, 16) * 37 % 128


def test_without_peft_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecipeError, match="adapter.method: lora: needs peft, which is not installed: pip") as error:
        inject_baseline(tiny_model(), config_of("lora"))
    assert error.value.reason.split("'")[1] in requirements("export")


def config_of(method, r=8, **more):
    alpha = None if method == "hira" else 12.0
    return BaselineConfig(method, r // 2 if method == "loha" else r, alpha, **more)


def randomised(model, seed=1):
    """Values that change the function, in every trained tensor."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(parameter.data + 0.1 * noise)
    return model


def trained_adapter(directory, config):
    """(model with live layers, the same written as a standalone adapter)"""
    model = tiny_model()
    shapes = inject_baseline(model, config).shapes
    randomised(model)
    description = AdapterDescription(config, config.default_format, shapes, "base")

    def load(name):
        return [model.get_parameter(f"{name}.{factor}") for factor in config.factor_shapes(*shapes[name])]

    write_adapter(directory, description, load)
    return model, {name: load(name) for name in shapes}


@pytest.mark.parametrize("method", BASELINES)
def test_it_starts_as_the_base_whatever_the_order(method):
    config, base = config_of(method, dropout=0.0), tiny_model()
    expected = base(TOKENS).logits
    report = inject_baseline(base, config, seed=5)
    assert torch.equal(base(TOKENS).logits, expected)
    values = {name: p.detach().clone() for name, p in base.named_parameters() if p.requires_grad}
    assert {name: tuple(value.shape) for name, value in values.items()} == factors_of(config, report.shapes)
    assert sum(value.numel() for value in values.values()) == report.trainable_parameters
    some = tiny_model()
    torch.manual_seed(99)
    narrow = config_of(method, target_modules=("down_proj",), layer_range=(1, 2))
    inject_baseline(some, narrow, seed=5)
    for name, parameter in some.named_parameters():
        assert not parameter.requires_grad or torch.equal(parameter, values[name])
    other = tiny_model()
    inject_baseline(other, config, seed=6)
    assert any(not torch.equal(other.get_parameter(name), value) for name, value in values.items())


@pytest.mark.parametrize("method", BASELINES)
def test_equal_budgets_are_within_one_percent(method):
    abba = inject(tiny_model(), AdapterConfig(32, 32)).trainable_parameters
    counted = inject_baseline(tiny_model(), config_of(method, r=64)).trainable_parameters
    assert abs(counted - abba) <= 0.01 * abba
    assert method == "dora" or counted == abba


@pytest.mark.parametrize("method", BASELINES)
def test_saved_adapters_are_pefts_own(tmp_path, method):
    """Keys, shapes, configuration and logits, against an adapter that PEFT itself made and saved."""
    config = config_of(method)
    live, factors = trained_adapter(tmp_path / "ours", config)
    assert verify_adapter(tmp_path / "ours").changes_nothing is False
    with torch.inference_mode():
        expected = live(TOKENS).logits
        stock = PeftModel.from_pretrained(tiny_model(), tmp_path / "ours").eval()
        assert (stock(TOKENS).logits - expected).abs().max() < 1e-6
        loaded = tiny_model()
        description = load_adapter(loaded, tmp_path / "ours")
        assert description.config == config and (loaded(TOKENS).logits - expected).abs().max() < 1e-6
        attached = tiny_model()
        attach(attached, config, factors)
        assert (attached(TOKENS).logits - expected).abs().max() < 1e-6
        with bypass(loaded):
            assert torch.equal(loaded(TOKENS).logits, tiny_model()(TOKENS).logits)
        assert (loaded(TOKENS).logits - expected).abs().max() < 1e-6
    own = get_peft_config({**config.peft_options, "target_modules": set(SEVEN_LINEARS)})
    get_peft_model(tiny_model(), own).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    written, saved = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    for key in written.keys() - {"base_model_name_or_path", "task_type", "inference_mode", "target_modules"}:
        assert written[key] == saved[key], key
    assert sorted(written["target_modules"]) == sorted(saved["target_modules"])


def test_damage_and_wrong_use_are_refused(tmp_path):
    trained_adapter(tmp_path / "good", config_of("lora"))
    with pytest.raises(CheckpointError, match="is a lora adapter and no ABBA adapter"):
        read_factors(tmp_path / "good")
    for name, change, said in (
        ("missing", lambda t: t.pop(next(iter(t))), "is missing"),
        ("nan", lambda t: t[next(iter(t))].fill_(math.nan), "holds NaN or infinity"),
    ):
        shutil.copytree(tmp_path / "good", tmp_path / name)
        tensors = load_file(tmp_path / "good" / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=said):
            load_adapter(tiny_model(), tmp_path / name)
    for key, value in {"format": "loha", "rank": 2}.items():
        raw = json.loads((tmp_path / "good" / "abba_config.json").read_text())
        shutil.copytree(tmp_path / "good", tmp_path / key)
        (tmp_path / key / "abba_config.json").write_text(json.dumps({**raw, key: value}))
        with pytest.raises(CheckpointError, match="does not describe an adapter"):
            read_description(tmp_path / key)
    with pytest.raises(CheckpointError, match="PEFT does not load it into this base"):
        load_adapter(tiny_model(hidden_size=32), tmp_path / "good")


@pytest.mark.parametrize("tied, files", [(True, 1), (False, 3)])
def test_a_model_that_was_trained_whole(tmp_path, tied, files):
    size = "80KB" if files > 1 else "1GB"
    base, trained = tiny_model(tie_word_embeddings=tied), randomised(tiny_model(tie_word_embeddings=tied))
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size=size)
    values = dict(trained.named_parameters())
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    description = AdapterDescription(FullConfig(), "full", {}, "base")
    write = (tmp_path / "base", description, shapes, values.__getitem__)
    summary = write_full(tmp_path / "model", *write, dtype=torch.float32)
    verify_model(tmp_path / "model")
    assert not summary.changes_nothing
    loaded = type(base).from_pretrained(tmp_path / "model", dtype=torch.float32, attn_implementation="eager")
    assert torch.equal(loaded(TOKENS).logits, trained(TOKENS).logits)
    with pytest.raises(CheckpointError, match="is a whole model and no adapter; give it as the model"):
        load_adapter(tiny_model(), tmp_path / "model")
    del shapes["model.norm.weight"]
    assert write_full(tmp_path / "less", *write).tensors == summary.tensors, "what was not trained is copied"
    shapes["model.other.weight"] = (3,)
    with pytest.raises(CheckpointError, match=r"has no model\.other\.weight, which was trained"):
        write_full(tmp_path / "wrong", *write)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("embedding", ["transformer.word_embeddings.weight", "model.other.weight"])
def test_a_tied_head_beside_an_embedding_of_another_name(tmp_path, embedding):
    """As Falcon's: the head that is stored beside it must not stay what it was."""
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base/model.safetensors")
    stored[embedding] = stored.pop("model.embed_tokens.weight")
    save_file({**stored, "lm_head.weight": stored[embedding].clone()}, tmp_path / "base/model.safetensors")
    shapes = {name: tuple(value.shape) for name, value in stored.items()}
    description = AdapterDescription(FullConfig(), "full", {}, "base")
    write = (tmp_path / "base", description, shapes, lambda name: stored[name] + 1)
    if "other" in embedding:
        with pytest.raises(CheckpointError, match="it cannot be told to which tensor it is tied"):
            write_full(tmp_path / "model", *write)
        return
    write_full(tmp_path / "model", *write)
    made = load_file(tmp_path / "model/model.safetensors")
    assert torch.equal(made["lm_head.weight"], stored[embedding] + 1)
