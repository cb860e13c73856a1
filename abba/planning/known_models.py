"""config.json of models by their Hub name, as far as it decides shapes: planning needs no download and no licence."""

from typing import Any

_LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
_QWEN_14B = {
    "model_type": "qwen2",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
}
_SMALL = {"head_dim": 64, "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192}
_SMALL_3B = {"num_attention_heads": 24, "num_hidden_layers": 28, "hidden_size": 3072, "intermediate_size": 8192}
_LARGE = {"num_attention_heads": 64, "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672}
_GEMMA_9B = {
    "model_type": "gemma2",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "vocab_size": 256000,
}

KNOWN: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.2-1B": {**_LLAMA_8B, **_SMALL, "tie_word_embeddings": True},
    "meta-llama/Llama-3.2-3B": {**_LLAMA_8B, **_SMALL_3B, "tie_word_embeddings": True},
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-70B": {**_LLAMA_8B, **_LARGE},
    "mistralai/Mistral-7B-v0.1": {**_LLAMA_8B, "model_type": "mistral", "vocab_size": 32000},
    "google/gemma-2-9b": _GEMMA_9B,
    "Qwen/Qwen2.5-14B": _QWEN_14B,
    "Qwen/Qwen2.5-32B": {**_QWEN_14B, "intermediate_size": 27648, "num_hidden_layers": 64},
    "Qwen/Qwen2.5-72B": {**_QWEN_14B, **_LARGE, "intermediate_size": 29568},
}
_TUNED = ("-instruct", "-it")  # of the same shapes


def known_config(name: str) -> dict[str, Any] | None:
    """The shapes of a Hub name in KNOWN, in any case, or of its instruction-tuned twin."""
    plain = name.lower()
    for ending in _TUNED:
        plain = plain.removesuffix(ending).replace(f"{ending}-v0.1", "-v0.1")
    return next((config for known, config in KNOWN.items() if known.lower() == plain), None)
