"""A merged model is the base plus delta W to one rounding, everything else bit for bit, and it is whole or absent."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from abba import AdapterConfig, inject
from abba.adapter import merge, model_files
from abba.adapter.directory import AdapterDescription
from abba.adapter.files import rewrite_card, verify_adapter
from abba.adapter.functional import delta_weight
from abba.adapter.linear import abba_modules
from abba.adapter.model_files import verify_model
from abba.base_files import INDEX
from abba.errors import CheckpointError
from tests.models import randomize_factors, tiny_model

CONFIG = AdapterConfig(4, 3, 1.5)
HEAD, TARGET, NORM = "lm_head.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"


@pytest.fixture
def adapter():
    """(description, factors by name) of a random adapter for the tiny Llama."""
    model = tiny_model()
    inject(model, CONFIG)
    randomize_factors(model)
    modules = abba_modules(model)
    shapes = {name: (module.out_features, module.in_features) for name, module in modules.items()}
    return AdapterDescription(CONFIG, "merged", shapes, "base"), {n: module.factors for n, module in modules.items()}


def write_base(directory, dtype=torch.float32, files=1, **changes):
    tiny_model(tie_word_embeddings=False, **changes).to(dtype).save_pretrained(
        directory, max_shard_size="80KB" if files > 1 else "1GB"
    )
    assert len(list(directory.glob("*.safetensors"))) >= files
    return directory


def tensors(directory):
    return {key: value for path in directory.glob("*.safetensors") for key, value in load_file(path).items()}


def write(directory, base, adapter, dtype=None, **more):
    description, factors = adapter
    return merge.write_merged(directory, base, description, factors.__getitem__, dtype, **more)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("block", [50, 1 << 20])
@pytest.mark.parametrize(
    "base_dtype, dtype", [("float32", None), ("bfloat16", None), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_targets_are_rounded_once_and_the_rest_is_copied(
    tmp_path, monkeypatch, adapter, base_dtype, dtype, block, files
):
    monkeypatch.setattr(merge, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(model_files, "BLOCK_ELEMENTS", block)
    base = write_base(tmp_path / "base", getattr(torch, base_dtype), files)
    wanted = getattr(torch, dtype or base_dtype)
    summary = write(tmp_path / "merged", base, adapter, getattr(torch, dtype) if dtype else None)
    before, after, (description, factors) = tensors(base), tensors(tmp_path / "merged"), adapter
    assert before.keys() == after.keys() and summary.tensors == len(after)
    rounding = delta_energy = 0.0
    for key, stored in after.items():
        assert stored.dtype == wanted
        if key.removesuffix(".weight") not in description.modules:
            assert torch.equal(stored, before[key].to(wanted)), key
            continue
        delta = delta_weight(*(factor.double() for factor in factors[key.removesuffix(".weight")]), CONFIG.scale)
        exact = before[key].double() + delta
        # one rounding to what is stored, and those of fp32 arithmetic with terms as large as the two products
        half_ulp = {torch.float32: 2**-24, torch.bfloat16: 2**-8}[wanted]
        slack = 2**-18 * (exact.abs().max() + delta.abs().max())
        assert ((stored.double() - exact).abs() <= half_ulp * exact.abs() + slack).all(), key
        rounding += (stored.double() - exact).square().sum().item()
        delta_energy += delta.square().sum().item()
    assert summary.unchanged == 0 and not summary.changes_nothing
    assert summary.rounding == pytest.approx((rounding / delta_energy) ** 0.5, rel=0.01, abs=1e-5)
    assert (summary.rounding > 1e-4) == (wanted == torch.bfloat16)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config == {**json.loads((base / "config.json").read_text()), "dtype": dtype or base_dtype}


def test_several_files_stay_several_and_their_index_is_right(tmp_path, adapter):
    base = write_base(tmp_path / "base", torch.bfloat16, 3)
    write(tmp_path / "merged", base, adapter, torch.float32)
    index, before = (json.loads((tmp_path / name / INDEX).read_text()) for name in ("merged", "base"))
    assert index["weight_map"] == before["weight_map"]
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors(tmp_path / "merged").values())
    verify_model(tmp_path / "merged")
    index["weight_map"][NORM] = next(
        name for name in before["weight_map"].values() if name != before["weight_map"][NORM]
    )
    (tmp_path / "merged" / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="does not say which tensors its files hold"):
        verify_model(tmp_path / "merged")


def test_what_belongs_to_a_model_comes_along_and_code_does_not(tmp_path, adapter):
    base = write_base(tmp_path / "base")
    reconfigure(base, quantization_config=None)  # as some configurations say that it is not
    wanted = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "generation_config.json"}
    unwanted = {"modeling_evil.py", "pytorch_model.bin", "training_args.bin", "optimizer.pt", "README.md", ".netrc"}
    for name in wanted | unwanted:
        (base / name).write_text(f"{{}} of {name}")
    write(tmp_path / "merged", base, adapter)
    ours = {"model.safetensors", "config.json", "abba_config.json", "README.md"}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == wanted | ours
    assert (tmp_path / "merged/LICENSE").read_text() == "{} of LICENSE"
    assert "merged ABBA adapter" in (tmp_path / "merged/README.md").read_text()


def test_a_link_out_of_the_base_is_not_copied_into_the_result(tmp_path, monkeypatch, adapter):
    base, secret = write_base(tmp_path / "base"), tmp_path / "secret"
    secret.write_text("mine")
    (base / "LICENSE").symlink_to(secret)
    monkeypatch.setattr(model_files, "write_safetensors", None)  # refused before hours of writing
    with pytest.raises(CheckpointError, match=r"LICENSE: leads out of .*base, to .*secret"):
        write(tmp_path / "merged", base, adapter)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_changes_nothing_is_reported(tmp_path, adapter):
    description, factors = adapter
    zero = {name: given._replace(B2=torch.zeros_like(given.B2)) for name, given in factors.items()}
    summary = write(tmp_path / "merged", write_base(tmp_path / "base"), (description, zero))
    assert summary.changes_nothing and summary.unchanged == len(zero) == 14


def edit(base, change):
    stored = load_file(base / "model.safetensors")
    change(stored)
    save_file(stored, base / "model.safetensors", {"format": "pt"})


def reconfigure(base, **changes):
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def as_index(base, name):
    (base / "model.safetensors").rename(base.parent / "outside.safetensors")
    (base / INDEX).write_text(json.dumps({"weight_map": {NORM: name}}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda b: edit(b, lambda t: t.pop(TARGET)), f"has no {TARGET}, which the adapter changes"),
        (lambda b: edit(b, lambda t: t.update({TARGET: torch.ones(3, 4)})), f"{TARGET} is (3, 4), the adapter"),
        (lambda b: edit(b, lambda t: t.update({TARGET: t[TARGET].to(torch.float8_e4m3fn)})), "stored as torch.float8"),
        (lambda b: edit(b, lambda t: t[NORM].mul_(float("nan"))), f"{NORM} holds NaN or infinity"),
        (lambda b: reconfigure(b, quantization_config={}), "is quantised"),
        (lambda b: (b / "config.json").write_text("[]"), "is no model configuration"),
        (lambda b: (b / "config.json").unlink(), "config.json: cannot be opened"),
        (lambda b: (b / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (lambda b: as_index(b, "../outside.safetensors"), "is not the plain name of a file beside it"),
        (lambda b: as_index(b, "model-2.safetensors"), "model-2.safetensors: cannot be opened: No such file"),
    ],
)  # fmt: skip
def test_a_base_that_does_not_fit_is_named_and_nothing_is_written(tmp_path, adapter, damage, message):
    base = write_base(tmp_path / "base")
    damage(base)
    with pytest.raises(CheckpointError) as error:
        write(tmp_path / "merged", base, adapter)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "outside.safetensors"}


@pytest.mark.parametrize("stated", [True, None])
def test_a_tied_head_is_never_a_target(tmp_path, adapter, stated):
    base, (description, _) = write_base(tmp_path / "base"), adapter
    reconfigure(base, tie_word_embeddings=stated)
    if stated is None:
        config = json.loads((base / "config.json").read_text())
        del config["tie_word_embeddings"]
        (base / "config.json").write_text(json.dumps(config))
    description.modules["lm_head"] = (128, 64)
    with pytest.raises(CheckpointError, match="lm_head.weight is tied to the input embedding"):
        write(tmp_path / "merged", base, adapter)


def test_an_untied_head_can_be_a_target(tmp_path, adapter):
    description, factors = adapter
    shapes = ((4, 64), (128, 4), (3, 64), (128, 3))
    factors["lm_head"] = type(factors[next(iter(factors))])(*(torch.ones(shape) for shape in shapes))
    description.modules["lm_head"] = (128, 64)
    base = write_base(tmp_path / "base")
    write(tmp_path / "merged", base, adapter)
    torch.testing.assert_close(tensors(tmp_path / "merged")[HEAD], tensors(base)[HEAD] + 12 * CONFIG.scale)


def test_only_what_is_ours_is_replaced(tmp_path, adapter):
    base = write_base(tmp_path / "base")
    with pytest.raises(CheckpointError, match="holds something that is no adapter"):
        write(base, base, adapter, overwrite=True)
    write(tmp_path / "merged", base, adapter)
    with pytest.raises(CheckpointError, match="--force"):
        write(tmp_path / "merged", base, adapter)
    write(tmp_path / "merged", base, adapter, torch.bfloat16, overwrite=True)
    assert all(value.dtype == torch.bfloat16 for value in tensors(tmp_path / "merged").values())
    with pytest.raises(CheckpointError, match="is a merged model and no adapter"):
        verify_adapter(tmp_path / "merged")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda m: edit(m, lambda t: t.pop(TARGET)), f"{TARGET} is not there with the shape"),
        (lambda m: edit(m, lambda t: t[TARGET].fill_(float("inf"))), f"{TARGET} holds NaN or infinity"),
        (lambda m: (m / "abba_config.json").unlink(), "is not an ABBA adapter"),
    ],
)
def test_damage_is_named_when_it_is_opened_again(tmp_path, adapter, damage, message):
    write(tmp_path / "merged", write_base(tmp_path / "base"), adapter)
    verify_model(tmp_path / "merged")
    damage(tmp_path / "merged")
    with pytest.raises(CheckpointError) as error:
        verify_model(tmp_path / "merged")
    assert message in str(error.value)


def test_the_card_gets_its_scores_later_and_without_paths(tmp_path, adapter):
    write(tmp_path / "merged", write_base(tmp_path / "base"), adapter)
    before = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    scores = {"task": "gsm8k", "n": 8, "exact_match": 62.5, "adapter": "/home/me/adapter", "model": "/home/me/base"}
    rewrite_card(tmp_path / "merged", scores)
    after = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {"README.md"}
    card = after["README.md"].decode()
    assert card.startswith(before["README.md"].decode()) and '"exact_match": 62.5' in card and "/home" not in card
