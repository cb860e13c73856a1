"""Batched greedy generation with transformers, for the bare base and with an adapter."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from abba.adapter.files import load_adapter
from abba.base_model import choose_attention, load_config, load_whole
from abba.errors import ArgumentError, CheckpointError, first_line
from abba.storage import in_gb, is_file, read_json
from abba.text.chat import ChatTemplate
from abba.text.encode import eos_id, padding_id
from abba.text.prompt import CHAT


def load_for_generation(
    base: Path, adapter: Path | None, dtype: torch.dtype, for_weights: Mapping[int | str, int]
) -> PreTrainedModel:
    """The model, each decoder layer read to the GPU that it stays on; accelerate's hooks carry activations between.

    Args:
        for_weights: bytes that the weights may take on each GPU; empty: the CPU.

    Raises:
        ArgumentError: the base does not fit.
        CheckpointError: it has no safetensors, or the adapter is damaged or for another base.
    """
    attention, _ = choose_attention(load_config(base), "auto", "cuda" if for_weights else "cpu", dtype)
    if len(for_weights) == 1:
        placement: dict[str, Any] = {"device_map": {"": next(iter(for_weights))}}
    else:
        placement = {"device_map": "auto", "max_memory": dict(for_weights)} if for_weights else {}
    model = load_whole(base, dtype, attention, **placement)
    if any(parameter.is_meta for parameter in model.parameters()):  # accelerate would read them anew for each token
        raise ArgumentError(
            f"{base}: its layers do not fit into {[in_gb(size) for size in for_weights.values()]} of memory; "
            "use more or larger GPUs, or a smaller batch size"
        )
    # A base may bring penalties and beams of its own, which would change what "greedy" means; its stops are `stop_ids`.
    model.generation_config = GenerationConfig()
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def stop_ids(base: Path, tokenizer: Any, prompt: str | None) -> list[int]:
    """What ends an answer: the tokenizer's EOS, what the base's generation_config.json adds, a turn's end in a chat.

    Args:
        prompt: a name of abba.text.prompt; None: of somebody else's.

    Raises:
        CheckpointError: generation_config.json is damaged.
    """
    stops, path = {eos_id(tokenizer)}, base / "generation_config.json"
    if is_file(path):
        settings = read_json(path)
        own = settings.get("eos_token_id", []) if isinstance(settings, dict) else ""
        own = own if isinstance(own, list) else [] if own is None else [own]
        if not all(isinstance(number, int) and number >= 0 for number in own):
            raise CheckpointError(f"{path}: its eos_token_id is neither a token's number nor a list of them")
        stops |= set(own)
    if prompt == CHAT:
        stops |= ChatTemplate(tokenizer).turn_end()
    return sorted(stops)


@torch.inference_mode()
def generate_greedy(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: list[list[int]],
    batches: list[list[int]],
    max_new_tokens: int,
    stops: list[int],
) -> Iterator[tuple[int, str]]:
    """(index, generated text) for the prompts, given as token ids, that each batch names by their indices.

    Raises:
        ArgumentError: a batch is too much for the GPU's memory.
    """
    padding = padding_id(tokenizer)
    for chosen in batches:
        longest = max(len(prompts[index]) for index in chosen)
        ids = torch.full((len(chosen), longest), padding)
        mask = torch.zeros_like(ids)
        for line, index in enumerate(chosen):  # padded on the left: generation continues on the right
            ids[line, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[line, longest - len(prompts[index]) :] = 1
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=padding
        )
        try:
            output = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
            )
        except torch.OutOfMemoryError as error:
            raise ArgumentError(
                f"out of GPU memory with {len(chosen)} sequences of {longest} + {max_new_tokens} tokens: "
                f"{first_line(error)}; use a smaller batch size"
            ) from None
        texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        yield from zip(chosen, texts, strict=True)
