"""Greedy generation with vLLM: the adapter as the LoRA of rank r1*r2 that it is, weights split over the GPUs."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from abba.adapter.directory import read_description
from abba.adapter.export import vllm_rank
from abba.adapter.files import read_factors, verify_adapter, write_adapter
from abba.base_config import check_config
from abba.base_files import BaseFiles
from abba.errors import CheckpointError, RecipeError, first_line
from abba.sharded.ranks import leave_torchruns_store

GROUPS = 8  # times max_num_seqs prompts are given to vLLM at a time, so that progress can be shown and kept


def vllm_version() -> str:
    """Raises RecipeError when vLLM is installed but cannot be imported."""
    try:
        from vllm import __version__
    except Exception as error:  # its libraries are those of one torch and one CUDA
        reason = first_line(error)
        raise RecipeError(f"vllm cannot be imported: {reason}") from None
    return __version__


def generate_with_vllm(
    base: Path,
    adapter: Path | None,
    tokenizer: Any,
    prompts: list[list[int]],
    batches: list[list[int]],
    max_new_tokens: int,
    stops: list[int],
    dtype: torch.dtype,
    limits: dict[str, Any],
) -> Iterator[tuple[int, str]]:
    """(index, generated text) for the prompts, given as token ids, that each batch names by their indices.

    Args:
        limits: vLLM's max_model_len, max_num_seqs, tensor_parallel_size, gpu_memory_utilization.

    Raises:
        CheckpointError: base or adapter is damaged, or vLLM cannot serve them.
    """
    check_config(base)
    with BaseFiles(base):  # headers are checked before a library that checks less opens the files
        pass
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    leave_torchruns_store()
    # It would show a traceback for having no tokenizer to try a chat template with. vLLM resets levels, not filters.
    logging.getLogger("vllm.renderers.base").addFilter(lambda record: record.levelno >= logging.ERROR)
    with _as_lora(adapter) as lora:
        request = None
        if lora is not None:
            rank = vllm_rank(read_description(lora).lora_rank)
            limits = {**limits, "enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
            request = LoRARequest("adapter", 1, str(lora))
        with _named(base):
            llm = LLM(
                model=str(base.resolve()),
                dtype=str(dtype).removeprefix("torch."),
                load_format="safetensors",
                trust_remote_code=False,
                skip_tokenizer_init=True,  # ids go in and come out; no chat template is run
                generation_config="vllm",  # and not the base's own penalties and beams
                **limits,
            )
        greedy = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, stop_token_ids=stops, detokenize=False)
        for chosen in batches:
            asked = [{"prompt_token_ids": prompts[index]} for index in chosen]
            with _named(base):
                outputs = llm.generate(asked, greedy, lora_request=request, use_tqdm=False)
            texts = tokenizer.batch_decode([out.outputs[0].token_ids for out in outputs], skip_special_tokens=True)
            yield from zip(chosen, texts, strict=True)


@contextmanager
def _as_lora(adapter: Path | None) -> Iterator[Path | None]:
    """The directory of the adapter's LoRA form; from LoHa it is made for as long as it is needed."""
    if adapter is None or read_description(adapter).format == "lora":
        if adapter is not None:
            verify_adapter(adapter)
        yield adapter
        return
    description, factors = read_factors(adapter)
    with tempfile.TemporaryDirectory(prefix="abba-lora-") as scratch:
        lora = Path(scratch) / "adapter"
        # bf16 is what vLLM would round it to.
        write_adapter(lora, replace(description, format="lora"), factors.__getitem__, torch.bfloat16)
        del factors
        yield lora


@contextmanager
def _named(base: Path) -> Iterator[None]:
    """Whatever vLLM raises, as one line with the way out."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{base}: vLLM cannot serve it: {first_line(error)}; choose the engine transformers"
        ) from None
