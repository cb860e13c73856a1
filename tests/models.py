"""Tiny random models of every supported family, built from their real configurations."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
FAMILIES = ("llama", "mistral", "qwen2", "gemma2")


def tiny_model(family: str = "llama", seed: int = 0, **changes) -> PreTrainedModel:
    """A random causal LM of `family` in fp32."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SMALL, "pad_token_id": 0, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def randomize_factors(model, seed: int = 1) -> None:
    """Non-zero values in all four factors, so that delta W is of the size of W."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] in ("A1", "B1", "A2", "B2"):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
