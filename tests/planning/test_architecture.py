"""Shapes by arithmetic against the published totals and against transformers' own models."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from abba import AdapterConfig, inject
from abba.adapter.inject import find_targets
from abba.errors import RecipeError
from abba.planning.architecture import architecture_of, factors
from abba.planning.known_models import KNOWN, known_config
from tests.models import FAMILIES, SMALL, tiny_model

# Parameters of the base as published, and of ABBA with r1 = r2 = 16 in the seven linears.
PUBLISHED = {
    "meta-llama/Llama-3.2-1B": (1_235_814_400, 22_544_384),
    "meta-llama/Llama-3.2-3B": (3_212_749_824, 48_627_712),
    "meta-llama/Llama-3.1-8B": (8_030_261_248, 83_886_080),
    "meta-llama/Llama-3.1-70B": (70_553_706_496, 414_187_520),
    "mistralai/Mistral-7B-v0.1": (7_241_732_096, 83_886_080),
    "google/gemma-2-9b": (9_241_705_984, 108_036_096),
    "Qwen/Qwen2.5-14B": (14_770_033_664, 137_625_600),
    "Qwen/Qwen2.5-32B": (32_763_876_352, 268_435_456),
    "Qwen/Qwen2.5-72B": (72_706_203_648, 421_068_800),
}


@pytest.mark.parametrize("name", KNOWN)
def test_counts_are_the_published_ones(name):
    architecture = architecture_of(KNOWN[name], name)
    base = sum(p.numel for p in architecture.base())
    trainable = sum(p.numel for p in factors(architecture.targets(AdapterConfig()), AdapterConfig()))
    assert (base, trainable) == PUBLISHED[name]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_that_of_transformers(family, tied):
    more = {"attention_bias": True, "mlp_bias": True} if family == "llama" and tied else {}
    config = AutoConfig.for_model(family, **{**SMALL, "tie_word_embeddings": tied, **more})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    architecture = architecture_of(config.to_dict(), family)
    assert {p.name: p.shape for p in architecture.base()} == {n: tuple(p.shape) for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(4, 3),
        AdapterConfig(4, 3, target_modules="all-linear"),
        AdapterConfig(4, 3, target_modules=r".*\.(q|down)_proj", layer_range=(1, 2)),
    ],
)
def test_targets_and_factors_are_those_of_injection(config):
    model = tiny_model("qwen2", tie_word_embeddings=False)
    architecture = architecture_of(model.config.to_dict(), "tiny")
    targets = architecture.targets(config)
    assert list(targets) == list(find_targets(model, config))
    report = inject(model, config)
    assert targets == report.shapes
    assert sum(p.numel for p in factors(targets, config)) == report.trainable_parameters


@pytest.mark.parametrize(
    "targets, words", [(("lm_head",), "output head"), (r".*\.mlp", "not a linear"), (("qproj",), "did you mean q_proj")]
)
def test_targets_that_injection_refuses_are_refused(targets, words):
    with pytest.raises(RecipeError, match=words):
        architecture_of(KNOWN["google/gemma-2-9b"], "gemma").targets(AdapterConfig(target_modules=targets))


@pytest.mark.parametrize(
    "name, like",
    [
        ("meta-llama/Llama-3.1-70B-Instruct", "meta-llama/Llama-3.1-70B"),
        ("mistralai/Mistral-7B-Instruct-v0.1", "mistralai/Mistral-7B-v0.1"),
        ("google/gemma-2-9b-it", "google/gemma-2-9b"),
        ("qwen/qwen2.5-32b-instruct", "Qwen/Qwen2.5-32B"),
        ("somebody/Llama-3.1-70B", None),
        ("mistralai/Mistral-7B-v0.3", None),
    ],
)
def test_a_name_is_known_with_its_tuned_twin_and_no_other(name, like):
    assert known_config(name) == (KNOWN[like] if like else None)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "mamba"}, "hidden_size"),
        ({"hidden_size": None}, "config.json needs hidden_size"),
        ({"num_hidden_layers": 0}, "at least 1, and has 0"),
        ({"num_attention_heads": "32"}, "has '32'"),
        ({"model_type": "mistral", "num_key_value_heads": None}, "num_key_value_heads"),
        ({"model_type": "gemma2"}, "head_dim"),
    ],
)
def test_an_architecture_that_cannot_be_planned_is_named(change, words):
    with pytest.raises(RecipeError, match=words):
        architecture_of({**KNOWN["meta-llama/Llama-3.1-8B"], **change}, "somewhere")
