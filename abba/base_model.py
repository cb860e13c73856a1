"""Where a base model lies, its tokenizer and its architecture; loads no weights."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.utils.logging import disable_progress_bar

from abba.errors import CheckpointError, first_line

# Deprecations inside libraries that their next release settles; a user can do nothing about them.
for _module in ("transformers", "torch.distributed"):
    warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{_module}\b")
disable_progress_bar()

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
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
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        # transformers would make up an empty tokenizer, which turns every text into nothing.
        raise CheckpointError(f"{directory}: has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: its tokenizer cannot be loaded: {first_line(error)}") from None


def load_config(directory: Path) -> PretrainedConfig:
    """The architecture. Code that a model directory may bring along is never run."""
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory}: its config.json cannot be used: {first_line(error)}") from None


def choose_attention(config: PretrainedConfig, wanted: str, device_type: str) -> tuple[str, str]:
    """(implementation, why) for `wanted`, which may be "auto"."""
    if wanted != "auto":
        return wanted, "the recipe says so"
    if device_type == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2", "flash-attn is installed"
    if getattr(config, "attn_logit_softcapping", None):
        return "eager", "this architecture caps attention logits, which sdpa would leave out"
    return "sdpa", "flash-attn is not installed" if device_type == "cuda" else "there is no GPU"
