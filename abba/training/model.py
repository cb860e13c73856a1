"""The base model and its tokenizer: where they lie, which attention they use, an empty architecture to fill."""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import prevent_arange_dtype_change

from abba.errors import CheckpointError
from abba.sharded.loading import load_base, partitioned_from_birth
from abba.sharded.ranks import Ranks

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def find_base(name_or_path: str, revision: str | None) -> Path:
    """The directory of a base model: as given, or its snapshot in the Hub cache.

    Training never downloads a model: on a cluster that would be every node at once, or none for lack of a network.

    Raises:
        CheckpointError: it is neither a directory nor in the Hub cache; says how to fetch it.
    """
    directory = Path(name_or_path)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise CheckpointError(f"model.name_or_path: {directory} is no model directory: it has no config.json")
        return directory
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise CheckpointError(f"model.name_or_path: {name_or_path!r} is no directory; give one, or a Hub name")
    try:
        found = snapshot_download(name_or_path, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        fetch = f"hf download {name_or_path}" + (f" --revision {revision}" if revision else "")
        raise CheckpointError(
            f"model.name_or_path: {name_or_path!r} is neither a directory here nor in the Hub cache; "
            f"fetch it first: {fetch} --exclude 'original/*'"
        ) from None
    return Path(found)


def load_tokenizer(directory: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}") from None


def load_config(directory: Path) -> PretrainedConfig:
    """The architecture. Code that a model directory may bring along is never run."""
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory}: its config.json cannot be used: {str(error).splitlines()[0]}") from None


def choose_attention(config: PretrainedConfig, wanted: str, device_type: str) -> tuple[str, str]:
    """(implementation, why) for `wanted`, which may be "auto"."""
    if wanted != "auto":
        return wanted, "the recipe says so"
    if device_type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2", "flash-attn is installed"
    if getattr(config, "attn_logit_softcapping", None):
        return "eager", "this architecture caps attention logits, which sdpa would leave out"
    return "sdpa", "flash-attn is not installed" if device_type == "cuda" else "there is no GPU"


def load_partitioned(
    directory: Path,
    dtype: torch.dtype,
    attention: str,
    engine_config: dict,
    device: torch.device,
    ranks: Ranks,
    say: Callable[[str], None],
) -> PreTrainedModel:
    """The base model under ZeRO-3, filled by every rank from its own slices of the files. Collective.

    Args:
        attention: an implementation by name, or "auto".

    Raises:
        CheckpointError: see `load_base`.
    """
    started = time.monotonic()
    config = load_config(directory)
    attention, why = choose_attention(config, attention, device.type)
    # The order matters: entered after zero.Init, the first would leave RoPE's inv_freq in bf16.
    with prevent_arange_dtype_change(), no_init_weights(), partitioned_from_birth(engine_config, dtype):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()  # from_config leaves it to the weight initialisation that was skipped
    loaded = load_base(model, directory, ranks.rank, ranks.world_size)
    say(f"model: {directory}, {config.model_type}, {dtype}, {attention} attention because {why}")
    say(
        f"model: {loaded.elements:,} parameters in {loaded.tensors} tensors; each rank read its 1/{ranks.world_size}, "
        f"rank 0 {loaded.bytes_read:,} bytes, in {time.monotonic() - started:.1f} s; checksum {loaded.checksum:x}"
    )
    for ignored in loaded.ignored:
        say(f"model: passed over {ignored}")
    return model


def enable_checkpointing(model: PreTrainedModel, mode: str) -> None:
    """Gradient checkpointing of every decoder layer: `non_reentrant`, `reentrant` or `none`."""
    if mode == "none":
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": mode == "reentrant"})
    if mode == "reentrant":  # it needs an input with a gradient, and the embeddings are frozen
        model.enable_input_require_grads()
