"""The base model's tokenizer and attention: what is loaded, what is chosen, what is refused."""

import json
import shutil

import pytest
import tokenizers
import torch
from transformers import AutoConfig, AutoTokenizer

from abba.adapter.model_files import _companions, _copy
from abba.base_model import build_empty, choose_attention, find_base, load_tokenizer, load_whole
from abba.errors import CheckpointError, RecipeError
from tests.distributed.ranks import TINY


def test_a_revision_of_a_directory_is_named_as_the_user_typed_it():
    for setting, said in (((), "recipe: model.revision"), (("--model",), "argument: --revision")):
        with pytest.raises(RecipeError) as error:
            find_base(str(TINY), "abc", *setting)
        assert str(error.value) == f"{said}: 'abc' has no meaning for the directory {TINY}; leave it out"
        assert error.value.exit_code == 64


@pytest.mark.parametrize(
    "family, wanted, device, dtype, flash, chosen",
    [
        ("llama", "auto", "cpu", torch.bfloat16, True, "sdpa"),
        ("llama", "auto", "cuda", torch.bfloat16, True, "flash_attention_2"),
        ("llama", "auto", "cuda", torch.float32, True, "sdpa"),
        ("llama", "auto", "cuda", torch.bfloat16, False, "sdpa"),
        ("gemma2", "auto", "cuda", torch.bfloat16, False, "eager"),
        ("gemma2", "auto", "cuda", torch.bfloat16, True, "flash_attention_2"),
        ("gemma2", "auto", "cuda", torch.bfloat16, "2.5.9", "eager"),
        ("llama", "auto", "cuda", torch.bfloat16, "2.5.9", "flash_attention_2"),
        ("gemma2", "eager", "cpu", torch.bfloat16, True, "eager"),
        ("gemma2", "flash_attention_2", "cuda", torch.bfloat16, True, "flash_attention_2"),
        ("gemma2", "flash_attention_2", "cuda", torch.bfloat16, False, "flash_attention_2"),
        ("llama", "sdpa", "cuda", torch.bfloat16, True, "sdpa"),
    ],
)
def test_attention_is_chosen_with_a_reason(monkeypatch, family, wanted, device, dtype, flash, chosen):
    monkeypatch.setattr("abba.base_model.is_flash_attn_2_available", lambda: bool(flash))
    monkeypatch.setattr("abba.base_model.is_flash_attn_greater_or_equal", lambda version: flash is True)
    attention, why = choose_attention(AutoConfig.for_model(family), wanted, device, dtype)
    assert attention == chosen and why


@pytest.mark.parametrize("wanted, named", [("sdpa", "sdpa"), ("flash_attention_2", "flash-attn before 2.6.0")])
def test_an_attention_that_cannot_cap_logits_is_the_recipes_mistake(monkeypatch, wanted, named):
    monkeypatch.setattr("abba.base_model.is_flash_attn_2_available", lambda: True)
    config = AutoConfig.for_model("gemma2")
    with pytest.raises(
        RecipeError,
        match=rf"model\.attn_implementation: {named} cannot cap .* 50, as gemma2 does; write auto or eager$",
    ):
        choose_attention(config, wanted, "cuda", torch.bfloat16)


def test_attention_that_makes_a_plan_for_every_length_is_off():
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("load", [build_empty, load_whole])
def test_flash_attention_that_is_not_there_is_not_fetched_from_the_hub(load):
    with pytest.raises(RecipeError, match=r"model\.attn_implementation: flash_attention_2 needs .*; write auto$"):
        load(TINY, torch.float32, "flash_attention_2")


def test_a_library_that_a_tokenizer_lacks_is_not_blamed_on_attention(monkeypatch):
    def lacking(*arguments, **named):
        raise ImportError("\nThe tokenizer requires the protobuf library but it was not found.\n")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lacking)
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded: .*requires the protobuf library"):
        load_tokenizer(TINY)


@pytest.mark.parametrize("tekken", [False, True])
def test_the_wrong_splitting_of_mistrals_tekken_tokenizers_is_mended(tmp_path, tekken):
    model = tokenizers.models.BPE({f"t{number}": number for number in range(100_001)}, [])
    published = tokenizers.Tokenizer(model)
    published.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.ByteLevel(use_regex=True)])
    published.save(str(tmp_path / "tokenizer.json"))
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t1"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "transformers_version": "4.42.0"}))
    if tekken:
        (tmp_path / "tekken.json").write_text("{}")
    merged = tmp_path / "merged"
    merged.mkdir()
    _copy(_companions(tmp_path), tmp_path, merged)
    shutil.copy(tmp_path / "config.json", merged)
    for directory in (tmp_path, merged):
        assert (r"\p{Lu}" in str(load_tokenizer(directory).backend_tokenizer.pre_tokenizer)) == tekken
