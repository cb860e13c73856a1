"""The check behind `convert.py --verify --base` passes on the true factors and fails on any other."""

import shutil

import pytest
import torch

from abba import AdapterConfig, inject, load_adapter, save_adapter
from abba.adapter.files import describe, read_factors, write_adapter
from abba.adapter.linear import abba_modules
from abba.errors import AbbaError, CheckpointError
from abba.evaluation.parity import peft_difference
from tests.distributed.ranks import TINY
from tests.models import randomize_factors, tiny_model


@pytest.mark.parametrize("format", ["loha", "lora"])
def test_it_tells_true_factors_from_others(tmp_path, format):
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    config = AdapterConfig(4, 3, 2.0)
    inject(model, config)
    randomize_factors(model)
    modules = abba_modules(model)
    write_adapter(tmp_path / "adapter", describe(model, config, format, None), lambda name: modules[name].factors)
    factors = {name: module.factors for name, module in modules.items()}
    difference, largest = peft_difference(tmp_path / "base", tmp_path / "adapter", factors)
    assert difference <= 1e-5 * max(1.0, largest)
    name = "model.layers.1.mlp.up_proj"
    factors[name] = factors[name]._replace(B1=-factors[name].B1)
    assert peft_difference(tmp_path / "base", tmp_path / "adapter", factors)[0] > 1e-3


def test_an_adapter_of_another_base_is_refused(tmp_path):
    model = tiny_model()
    inject(model, AdapterConfig(4, 3, 2.0))
    save_adapter(model, tmp_path / "adapter")
    _, factors = read_factors(tmp_path / "adapter")
    shutil.copytree(TINY, tmp_path / "other")
    with pytest.raises(AbbaError, match="modules differ"):
        peft_difference(tmp_path / "other", tmp_path / "adapter", factors)
    wider = tiny_model(hidden_size=128, head_dim=32)
    with pytest.raises(CheckpointError, match="the adapter was made for another model"):
        load_adapter(wider, tmp_path / "adapter")
    other = tiny_model()
    inject(other, AdapterConfig(4, 5, 2.0))
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(CheckpointError, match=r"A2 of .* is \(3, 64\), this model needs \(5, 64\)"):
        load_adapter(other, tmp_path / "adapter")
    assert all(map(torch.equal, before, other.parameters())), "nothing of it has been taken over"
