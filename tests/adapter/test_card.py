"""What a README.md beside a result says of how it is stored, and of whose scores it shows."""

import pytest

from abba.adapter.card import model_card
from abba.adapter.config import AdapterConfig, BaselineConfig, FullConfig
from abba.adapter.directory import AdapterDescription

SCORES = {"task": "gsm8k", "exact_match": 0.5}
OWN = "Greedy generation:"


def card(config, form, dtype):
    modules = {} if form == "full" else {"model.layers.0.self_attn.q_proj": (8, 8)}
    return model_card(AdapterDescription(config, form, modules, None, dtype=dtype), SCORES)


def test_a_card_advises_only_what_convert_accepts():
    """It truncates and merges ABBA alone."""
    assert "--rank 256" in card(AdapterConfig(32, 32), "lora", "float32")
    for method in ("lora", "rslora"):
        text = card(BaselineConfig(method, 1024, 32.0), "lora", "float32")
        assert "rank 1024 is above vLLM's limit of 512" in text and "--rank" not in text and "--format" not in text


@pytest.mark.parametrize(
    "config, form, dtype, stored, whose",
    [
        (AdapterConfig(), "loha", "float32", "Float32.", OWN),
        (AdapterConfig(), "lora", "bfloat16", "Bfloat16.", "Of the run's own adapter, in LoHa form and fp32:"),
        (BaselineConfig("lora", 4, 8.0), "lora", "float32", "Stored in float32.", OWN),
        (
            BaselineConfig("lora", 4, 8.0),
            "lora",
            "bfloat16",
            "Stored in bfloat16.",
            "Of the run's own adapter, in LoRA form and fp32:",
        ),
        (FullConfig(), "full", None, "Stored: each tensor in the base's own dtype.", OWN),
        (
            FullConfig(),
            "full",
            "float32",
            "Stored: float32.",
            "Of the run's own model, in the base's own dtype:",
        ),
    ],
)
def test_a_card_says_how_a_result_is_stored_and_whose_scores_it_shows(config, form, dtype, stored, whose):
    text = card(config, form, dtype)
    assert stored in text
    assert f"## Scores\n\n{whose}\n" in text
