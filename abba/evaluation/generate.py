"""Batched greedy generation with transformers, for the bare base and with an adapter."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from abba.adapter.files import load_adapter
from abba.base_model import choose_attention, load_config, load_tokenizer, load_whole
from abba.text.encode import encode_prompt, padding_id


def load_for_generation(base: Path, adapter: Path | None, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer); on the GPUs if there are any, spread over them by accelerate.

    Raises:
        CheckpointError: the base has no safetensors, or the adapter is damaged or made for another base.
    """
    tokenizer = load_tokenizer(base)
    on_gpu = torch.cuda.is_available()
    attention, _ = choose_attention(load_config(base), "auto", "cuda" if on_gpu else "cpu", dtype)
    model = load_whole(base, dtype, attention, **({"device_map": "auto"} if on_gpu else {}))
    # A base may bring penalties and beams of its own, which would change what "greedy" means.
    model.generation_config = GenerationConfig()
    if adapter is not None:
        load_adapter(model, adapter)
    return model, tokenizer


@torch.inference_mode()
def generate_greedy(
    model: PreTrainedModel, tokenizer: Any, instructions: list[str], batch_size: int, max_new_tokens: int
) -> Iterator[tuple[int, str]]:
    """(index, generated text) for every instruction, in batches of similar length, so that little is padded."""
    prompts = encode_prompt(tokenizer, instructions)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    padding = padding_id(tokenizer)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(prompts[index]) for index in chosen)
        ids = torch.full((len(chosen), longest), padding)
        mask = torch.zeros_like(ids)
        for line, index in enumerate(chosen):  # padded on the left: generation continues on the right
            ids[line, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[line, longest - len(prompts[index]) :] = 1
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=padding
        )
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
        )
        texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        yield from zip(chosen, texts, strict=True)
