"""Hostile adapters: refused within a second and 100 MB, and the model they were meant for stays as it was."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from abba import AdapterConfig, inject, load_adapter, save_adapter
from tests.models import randomize_factors, tiny_model
from tests.security.test_safetensors import entry, refused, write


@pytest.fixture
def adapter(tmp_path):
    model = tiny_model()
    inject(model, AdapterConfig(4, 4))
    randomize_factors(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


KEY = "base_model.model.model.layers.1.mlp.down_proj.hada_w2_b"


def change_tensors(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def change_json(directory, name, change):
    raw = json.loads((directory / name).read_text())
    change(raw)
    (directory / name).write_text(json.dumps(raw))


def ranks(directory, rank):
    change_json(directory, "abba_config.json", lambda raw: raw["config"].update(r1=rank, r2=rank))
    change_json(directory, "adapter_config.json", lambda raw: raw.update(r=rank, alpha=24.0**2))


ATTACKS = {
    "NaN": lambda d: change_tensors(d, lambda t: t[KEY].fill_(float("nan"))),
    "infinity": lambda d: change_tensors(d, lambda t: t[KEY].fill_(-float("inf"))),
    "shape": lambda d: change_tensors(d, lambda t: t.update({KEY: torch.ones(4, 4)})),
    "dimensions": lambda d: change_tensors(d, lambda t: t.update({KEY: torch.ones(4 * 112)})),
    "missing": lambda d: change_tensors(d, lambda t: t.pop(KEY)),
    "renamed": lambda d: change_tensors(d, lambda t: t.update({"../" + KEY: t.pop(KEY)})),
    "extra": lambda d: change_tensors(d, lambda t: t.update(x=torch.ones(1))),
    "empty": lambda d: change_tensors(d, lambda t: t.clear()),
    "rank 10^9": lambda d: ranks(d, 10**9),
    "rank 10^30": lambda d: ranks(d, 10**30),
    "rank -1": lambda d: ranks(d, -1),
    "rank 0": lambda d: ranks(d, 0),
    "rank true": lambda d: ranks(d, True),
    "rank 4.0": lambda d: ranks(d, 4.0),
    "PEFT's rank alone": lambda d: change_json(d, "adapter_config.json", lambda raw: raw.update(r=10**9)),
    "alpha 10^300": lambda d: change_json(d, "abba_config.json", lambda raw: raw["config"].update(alpha=1e300)),
    "alpha NaN": lambda d: change_json(d, "abba_config.json", lambda raw: raw["config"].update(alpha=float("nan"))),
    "sizes": lambda d: change_json(d, "abba_config.json", lambda raw: raw["modules"].update({"x": [10**9, 10**9]})),
    "modules": lambda d: change_json(
        d, "abba_config.json", lambda raw: raw["modules"].update({f"m{i}": [1, 1] for i in range(50_000)})
    ),
    "no modules": lambda d: change_json(d, "abba_config.json", lambda raw: raw.update(modules={})),
    "deep": lambda d: (d / "abba_config.json").write_text("[" * 100_000),
    "deep objects": lambda d: (d / "adapter_config.json").write_text('{"a":' * 100_000),
    "digits": lambda d: (d / "abba_config.json").write_text('{"format_version": ' + "9" * 10**6 + "}"),
    "large": lambda d: (d / "abba_config.json").write_text("[" + "[]," * 30_000_000 + "0]"),
    "header length": lambda d: write(d / "adapter_model.safetensors", {"a": entry()}, length=2**63),
    "header offsets": lambda d: write(d / "adapter_model.safetensors", {"a": entry(offsets=(0, 10**18))}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_adapters(adapter, attack):
    ATTACKS[attack](adapter)
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refused(adapter, lambda path: load_adapter(model, path))
    assert model.state_dict().keys() == before.keys(), "nothing was injected"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
