"""Standalone adapters: stock PEFT computes what the native layers compute; damage and misuse are named."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file

from abba import AdapterConfig, inject, load_adapter, save_adapter
from abba.adapter import files
from abba.adapter.config import BaselineConfig
from abba.adapter.directory import AdapterDescription, written_whole
from abba.adapter.export import vllm_advice
from abba.adapter.linear import abba_modules
from abba.errors import CheckpointError
from abba.prepared import KILLED_WHILE_WRITING_SECONDS
from tests.models import FAMILIES, randomize_factors, tiny_model

TOKENS = torch.arange(2 * 13).reshape(2, 13) * 7 % 128


def adapted(family="llama", r1=4, r2=4, targets=None, **changes):
    model = tiny_model(family)
    config = AdapterConfig(r1, r2, 1.5, **({"target_modules": targets} if targets else {}), **changes)
    inject(model, config)
    randomize_factors(model)
    return model, config


def write(model, config, directory, format, dtype=torch.float32):
    description = files.describe(model, config, format, None)
    modules = abba_modules(model)
    return files.write_adapter(directory, description, lambda name: modules[name].factors, dtype)


def peft_logits(family, directory):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a missing key is only a warning in PEFT
        return PeftModel.from_pretrained(tiny_model(family), directory).eval()(TOKENS).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["loha", "lora"])
@pytest.mark.parametrize("ranks", [(4, 4), (6, 2), (2, 5)])
def test_stock_peft_gives_the_native_logits(tmp_path, family, format, ranks):
    model, config = adapted(family, *ranks)
    write(model, config, tmp_path / "adapter", format)
    native = model(TOKENS).logits
    assert (native - tiny_model(family)(TOKENS).logits).abs().max() > 0.1, "the adapter must matter"
    torch.testing.assert_close(peft_logits(family, tmp_path / "adapter"), native, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "targets, changes",
    [("all-linear", {}), (r".*\.(q|v)_proj", {}), (("up_proj",), {"layer_range": (1, 2)}), (("mlp.up_proj",), {})],
)
def test_every_way_to_name_targets_means_the_same_to_peft(tmp_path, targets, changes):
    model, config = adapted("llama", 3, 3, targets, **changes)
    write(model, config, tmp_path / "adapter", "loha")
    torch.testing.assert_close(peft_logits("llama", tmp_path / "adapter"), model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_loha_holds_the_factors_bit_for_bit_and_loads_back(tmp_path):
    model, _ = adapted(r1=5, r2=3)
    summary = save_adapter(model, tmp_path / "adapter")
    assert summary.tensors == 14 * 4 and not summary.changes_nothing
    plain = tiny_model()
    load_adapter(plain, tmp_path / "adapter")
    injected = tiny_model()
    inject(injected, AdapterConfig(5, 3, 9.0))
    load_adapter(injected, tmp_path / "adapter")
    for name, module in abba_modules(model).items():
        for other in (abba_modules(plain)[name], abba_modules(injected)[name]):
            assert all(torch.equal(a, b) for a, b in zip(module.factors, other.factors, strict=True))
    assert torch.equal(plain(TOKENS).logits, model(TOKENS).logits)
    assert torch.equal(injected(TOKENS).logits, model(TOKENS).logits)


def test_a_base_of_another_shape_is_named_with_the_adapter(tmp_path):
    save_adapter(adapted()[0], tmp_path / "adapter")
    smaller = tiny_model(num_hidden_layers=1)
    with pytest.raises(
        CheckpointError, match=r"adapter: does not fit this model: .*modules differ.*; give its own base$"
    ):
        load_adapter(smaller, tmp_path / "adapter")
    assert not abba_modules(smaller)


def test_bfloat16_loha_rounds_each_factor_once(tmp_path):
    model, config = adapted()
    write(model, config, tmp_path / "adapter", "loha", torch.bfloat16)
    stored = load_file(tmp_path / "adapter" / files.WEIGHTS)
    key = "base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a"
    assert torch.equal(stored[key], model.model.layers[0].self_attn.q_proj.B1.bfloat16())


def test_an_adapter_that_does_nothing_is_reported(tmp_path):
    model = tiny_model()
    inject(model, AdapterConfig(2, 2))
    assert save_adapter(model, tmp_path / "adapter").changes_nothing


def test_nothing_is_overwritten_or_left_half_written(tmp_path):
    model, _ = adapted()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="holds something that is no adapter"):
        save_adapter(model, tmp_path / "adapter", overwrite=True)
    model.model.layers[0].mlp.up_proj.B1.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        save_adapter(model, tmp_path / "other")
    assert [p.name for p in tmp_path.rglob("*")] == ["adapter", "mine.txt"]
    save_adapter(adapted()[0], tmp_path / "third")
    with pytest.raises(CheckpointError, match="--force"):
        save_adapter(adapted()[0], tmp_path / "third")
    save_adapter(adapted()[0], tmp_path / "third", overwrite=True)


def left_by(directory, pid, age, name="adapter"):
    """What a conversion of process `pid` was writing `age` seconds ago; its directory itself is older."""
    leftover = directory / f".{name}.tmp-{pid}"
    leftover.mkdir()
    (leftover / files.WEIGHTS).write_text("much")
    now = time.time()
    os.utime(leftover / files.WEIGHTS, (now - age,) * 2)
    os.utime(leftover, (now - 9 * KILLED_WHILE_WRITING_SECONDS,) * 2)
    return leftover


def test_what_killed_conversions_left_is_removed_and_no_living_ones(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    old = KILLED_WHILE_WRITING_SECONDS + 60
    gone = [left_by(tmp_path, killed.pid, old), left_by(tmp_path, f"{killed.pid}-0123abcd", old)]
    kept = [
        left_by(tmp_path, f"{killed.pid}-89abcdef", 0),  # perhaps alive on another machine
        left_by(tmp_path, f"{os.getppid()}-0123abcd", old),  # alive, and stopped perhaps
        left_by(tmp_path, killed.pid, old, "adapter2"),
        left_by(tmp_path, "notes", old),
    ]
    save_adapter(adapted()[0], tmp_path / "adapter")
    assert not any(path.exists() for path in gone)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "adapter"])
    assert all((path / files.WEIGHTS).read_text() == "much" for path in kept)


def test_what_was_replaced_is_a_leftover_until_it_is_deleted(tmp_path, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr("abba.storage.shutil.rmtree", lambda *_, **__: None)
        for _ in range(2):
            save_adapter(adapted()[0], tmp_path / "adapter", overwrite=True)
    (replaced,) = tmp_path.glob(".*")
    assert re.fullmatch(rf"\.adapter\.tmp-{os.getpid()}-[0-9a-f]{{8}}", replaced.name)


def test_two_that_write_to_one_place_at_once_do_not_share_files(tmp_path):
    """Though their process ids are equal, as in two containers."""
    with written_whole(tmp_path / "adapter", True) as one, written_whole(tmp_path / "adapter", True) as other:
        for place, text in ((one, "one"), (other, "other")):
            (place / files.ABBA_CONFIG).touch()  # or it would be none of ours, and stay
            (place / "x").write_text(text)
        assert (one / "x").read_text() == "one"
    assert (tmp_path / "adapter/x").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to own files that others cannot delete")
def test_somebody_elses_leftover_does_not_stop_a_conversion(tmp_path):
    with tempfile.TemporaryDirectory() as shared:
        os.chmod(shared, 0o1777)
        leftover = left_by(Path(shared), 10**8, KILLED_WHILE_WRITING_SECONDS + 60)
        model = adapted()[0]
        os.seteuid(65534)
        try:
            save_adapter(model, Path(shared) / "adapter")
        finally:
            os.seteuid(0)
        assert (leftover / files.WEIGHTS).exists() and (Path(shared) / "adapter").is_dir()


def damage_tensor(directory, change):
    tensors = load_file(directory / files.WEIGHTS)
    change(tensors)
    save_file(tensors, directory / files.WEIGHTS, {"format": "pt"})


def damage_json(directory, name, **changes):
    path = directory / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


KEY = "base_model.model.model.layers.1.mlp.down_proj.hada_w2_b"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: damage_tensor(d, lambda t: t.pop(KEY)), "down_proj.hada_w2_b is missing"),
        (lambda d: damage_tensor(d, lambda t: t.update({KEY: t[KEY][:, :3].clone()})), "(4, 3), its module needs"),
        (lambda d: damage_tensor(d, lambda t: t[KEY].mul_(float("inf"))), "NaN or infinity"),
        (lambda d: damage_tensor(d, lambda t: t.update(extra=t[KEY].clone())), "extra does not belong there"),
        (lambda d: damage_json(d, files.PEFT_CONFIG, alpha=1.0), "alpha is 1.0 where abba_config.json means"),
        (lambda d: damage_json(d, files.ABBA_CONFIG, format_version=9), "version 9"),
        (lambda d: damage_json(d, files.ABBA_CONFIG, config={}, modules=3), "does not describe an adapter"),
        (lambda d: damage_json(d, files.ABBA_CONFIG, config={"r1": 4.0}), "does not describe an adapter"),
        (lambda d: damage_json(d, files.ABBA_CONFIG, base_model=123), "does not describe an adapter"),
        (lambda d: (d / files.PEFT_CONFIG).write_text("[]"), "is no PEFT configuration"),
        (lambda d: (d / files.ABBA_CONFIG).write_text("{"), "is not JSON"),
        (lambda d: (d / files.ABBA_CONFIG).unlink(), "is not an ABBA adapter"),
        (lambda d: (d / files.WEIGHTS).write_bytes(b"\x00" * 40), "damaged header"),
        (lambda d: (d / files.WEIGHTS).unlink(), "cannot be opened"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    model, _ = adapted()
    save_adapter(model, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(CheckpointError) as error:
        load_adapter(tiny_model(), tmp_path / "adapter")
    assert message in str(error.value)


def test_the_lora_form_cannot_be_loaded_back_and_says_why(tmp_path):
    model, config = adapted()
    write(model, config, tmp_path / "adapter", "lora")
    with pytest.raises(CheckpointError, match="--format loha"):
        load_adapter(tiny_model(), tmp_path / "adapter")


def test_an_adapter_is_replaced_only_where_it_is_meant(tmp_path):
    model, _ = adapted()
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"is not empty; .* pass --force \(in Python overwrite=True\)$"):
        save_adapter(model, tmp_path / "adapter")
    save_adapter(model, tmp_path / "adapter", overwrite=True)


def test_what_came_meanwhile_is_not_replaced(tmp_path):
    model, _ = adapted()

    def late(name):
        (tmp_path / "adapter").mkdir(exist_ok=True)
        (tmp_path / "adapter/mine.txt").write_text("keep")
        return abba_modules(model)[name].factors

    description = files.describe(model, next(iter(abba_modules(model).values())).adapter_config, "loha", None)
    with pytest.raises(CheckpointError, match="holds something that is no adapter"):
        files.write_adapter(tmp_path / "adapter", description, late)
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "mine.txt"]


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "volume")
    with pytest.raises(CheckpointError, match="volume: is a mount point; name a directory inside it"):
        save_adapter(adapted()[0], tmp_path / "volume")
    assert not list(tmp_path.iterdir())


def test_modules_that_differ_have_no_common_configuration(tmp_path):
    model, _ = adapted()
    module = next(iter(abba_modules(model).values()))
    module.adapter_config = replace(module.adapter_config, alpha=99.0)
    with pytest.raises(CheckpointError, match="its modules differ in r1, r2, alpha or targets"):
        save_adapter(model, tmp_path / "adapter")


def test_the_pinned_revision_of_the_base_is_exported(tmp_path):
    model, config = adapted()
    recipe = {"model": {"name_or_path": "org/base", "revision": "abc123"}}
    description = replace(files.describe(model, config, "loha", "org/base"), provenance={"recipe": recipe})
    files.write_adapter(tmp_path / "adapter", description, lambda name: abba_modules(model)[name].factors)
    assert PeftConfig.from_pretrained(tmp_path / "adapter").revision == "abc123"
    assert 'from_pretrained("org/base", revision="abc123")' in (tmp_path / "adapter/README.md").read_text()
    damage_json(tmp_path / "adapter", files.PEFT_CONFIG, base_model_name_or_path="/elsewhere", revision=None)
    load_adapter(tiny_model(), tmp_path / "adapter")
    assert replace(description, base_model="/elsewhere").base_revision is None


def test_vllm_advice_names_the_flag_or_the_limit():
    for config, rank, said in (
        (AdapterConfig(16, 16), None, "--max-lora-rank 256"),
        (AdapterConfig(6, 6), None, "--max-lora-rank 64"),
        (AdapterConfig(32, 32), 256, "--max-lora-rank 256"),
        (AdapterConfig(32, 32), None, "--format merged, or with --format lora --rank 256"),
        (BaselineConfig("lora", 1024, 32.0), None, "above vLLM's limit of 512: .* merge_and_unload"),
    ):
        advice = vllm_advice(AdapterDescription(config, "lora", {}, None, rank))
        assert re.search(said, advice) and ("convert" in advice) == ("merged" in said)


def test_an_adapter_whose_base_was_moved_still_loads(tmp_path):
    model, _ = adapted()
    save_adapter(model, tmp_path / "adapter")
    damage_json(tmp_path / "adapter", files.PEFT_CONFIG, base_model_name_or_path="/elsewhere")
    load_adapter(tiny_model(), tmp_path / "adapter")
