"""Answers to a task's questions from the engine that can hold the model: vLLM, or transformers on one GPU or several.

Measured here is what `placement` calculates with.
"""

import gc
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from abba.adapter.directory import AdapterDescription, read_description
from abba.adapter.export import vllm_rank
from abba.adapter.inject import layer_index
from abba.base_files import BaseFiles
from abba.base_model import load_config
from abba.errors import RecipeError
from abba.evaluation.generate import generate_greedy, load_for_generation
from abba.evaluation.kept import batches_by_length
from abba.evaluation.placement import Demand, Gpus, choose, kv_cache_bytes, tensor_parallel_size
from abba.evaluation.vllm_engine import GROUPS, generate_with_vllm, vllm_version


@dataclass(frozen=True)
class Plan:
    """How answers will be generated; no model is loaded yet.

    made_by: the engine, its version and its GPUs.
    batches: indices of prompts that are generated together.
    generate: batches -> (index, text) of each prompt in them, greedily.
    """

    made_by: dict[str, Any]
    batches: list[list[int]]
    generate: Callable[[list[list[int]]], Iterator[tuple[int, str]]]


def plan_answers(
    base: Path,
    adapter: Path | None,
    tokenizer: Any,
    prompts: list[list[int]],
    *,
    engine: str,
    batch_size: int,
    max_new_tokens: int,
    stops: list[int],
    dtype: torch.dtype,
    say: Callable[[str], None],
    ranks: int = 1,
) -> Plan:
    """Choose the engine for these prompts, which are token ids, and say which it is.

    Args:
        stops: token ids that end an answer.
        ranks: that share the prompts, each with GPUs of its own.

    Raises:
        RecipeError: see `require_engine`; or the model fits nowhere.
        CheckpointError: it or the adapter is damaged.
    """
    description = read_description(adapter) if adapter is not None else None
    rank = description.lora_rank if description is not None else None
    require_engine(engine, rank, dtype)
    tokens = max(map(len, prompts)) + max_new_tokens
    gpus = visible_gpus()
    demands, most = _measure(base, description, min(batch_size, len(prompts)), tokens, dtype, gpus.count)
    # Only where it could be taken: the import of vLLM takes seconds, and memory of the GPU.
    refusal = why_not_vllm(rank, dtype) if engine == "vllm" or (engine == "auto" and gpus.count) else None
    placement = choose(engine, gpus, most, demands, refusal, ranks)
    say(placement.line)
    name, count = placement.engine, placement.gpus
    made_by = {"engine": name, "engine_version": vllm_version() if name == "vllm" else version(name), "gpus": count}
    if name == "vllm":
        limits = {"max_model_len": tokens, "max_num_seqs": batch_size, "tensor_parallel_size": max(1, count)}
        if count:
            limits["gpu_memory_utilization"] = gpus.usable / gpus.total

        def generate(batches: list[list[int]]) -> Iterator[tuple[int, str]]:
            return generate_with_vllm(base, adapter, tokenizer, prompts, batches, max_new_tokens, stops, dtype, limits)

        return Plan(made_by, batches_by_length(prompts, GROUPS * batch_size), generate)
    for_weights = demands[name].for_weights(gpus.usable)

    def generate(batches: list[list[int]]) -> Iterator[tuple[int, str]]:
        model = load_for_generation(base, adapter, dtype, dict.fromkeys(range(count), for_weights))
        return generate_greedy(model, tokenizer, prompts, batches, max_new_tokens, stops)

    return Plan(made_by, batches_by_length(prompts, batch_size), generate)


def require_engine(engine: str, rank: int | None, dtype: torch.dtype) -> None:
    """Raises RecipeError when vLLM is wanted and cannot serve an adapter of LoRA rank `rank` (None: the bare base)."""
    if engine == "vllm" and (refusal := why_not_vllm(rank, dtype)) is not None:
        raise RecipeError(f"engine vllm: {refusal}; choose the engine transformers or auto")


def why_not_vllm(rank: int | None, dtype: torch.dtype) -> str | None:
    """Why vLLM does not serve an adapter of LoRA rank `rank` (0: it has no LoRA form) here, or None."""
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    try:
        vllm_version()
    except RecipeError as error:
        return error.reason
    if rank == 0:
        return "vLLM serves LoRA, and the adapter is of another method that has no LoRA form"
    if rank is not None and vllm_rank(rank) is None:
        return f"the adapter's LoRA rank (for ABBA r1*r2) = {rank} is above vLLM's 512"
    if rank is not None and dtype != torch.bfloat16:
        return f"vLLM serves adapters in bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def visible_gpus() -> Gpus:
    """What is there, after giving back what this process has cached, of a training run for example."""
    if not torch.cuda.is_available():
        return Gpus(0, 0, 0)
    gc.collect()
    torch.cuda.empty_cache()
    free, total = zip(*(torch.cuda.mem_get_info(gpu) for gpu in range(torch.cuda.device_count())), strict=True)
    return Gpus(len(total), min(total), min(free))


def _measure(
    base: Path, description: AdapterDescription | None, sequences: int, tokens: int, dtype: torch.dtype, gpus: int
) -> tuple[dict[str, Demand], dict[str, int]]:
    """What each engine needs, and over how many of the GPUs it can split the model."""
    config = load_config(base).get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = getattr(config, "intermediate_size", None) or config.hidden_size
    kv_cache = kv_cache_bytes(config.num_hidden_layers, kv_heads, head_dim, sequences, tokens, dtype.itemsize)
    pieces: Counter[str | int] = Counter()  # what stays together on one GPU: a decoder layer, or a tensor outside them
    with BaseFiles(base) as files:
        for name in files.names:
            layer = layer_index(name)
            pieces[name if layer is None else layer] += files.stored(name).numel * dtype.itemsize
    weights, sides, native, lora = pieces.total(), 0, 0, 0
    if description is not None:
        sides = sum(out + into for out, into in description.modules.values()) * dtype.itemsize
        native = description.config.width * sides
        lora = (vllm_rank(description.lora_rank) or 0) * sides  # of which vLLM splits a half at most
    demands = {
        "transformers": Demand(weights, kv_cache, native, replicated=max(pieces.values())),
        "vllm": Demand(weights, kv_cache, replicated=lora),
    }
    return demands, {"transformers": gpus, "vllm": tensor_parallel_size(gpus, heads, kv_heads, width)}
