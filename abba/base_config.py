"""What the configuration files of a base model say, checked before a library that would act on it reads them.

transformers does more with config.json and tokenizer_config.json than to build a model: their keys name Python files to
run, kernels to fetch, other files to open. trust_remote_code=False stops some of it, silently; here each is refused by
name.
"""

import re
from pathlib import Path
from typing import Any

from abba.errors import CheckpointError
from abba.storage import is_there, read_json

CONFIG, TOKENIZER_CONFIG, ADAPTER_CONFIG = "config.json", "tokenizer_config.json", "adapter_config.json"

REFUSED = {
    "auto_map": "names Python code, which is never run here",
    "custom_generate": "names Python code, which is never run here",
    "custom_pipelines": "names Python code, which is never run here",
    "attn_implementation": "chooses code, which the recipe's model.attn_implementation does",
    "experts_implementation": "chooses code, which is never fetched here",
    "use_kernels": "fetches code, which is never run here",
    "kernel_config": "fetches code, which is never run here",
    "quantization_config": "describes a quantised model; fetch the one in bf16, fp16 or fp32",
    "transformers_weights": "names other weights than model.safetensors",
    "configuration_files": "names other files in place of this one",
    "fast_tokenizer_files": "names other files in place of tokenizer.json",
}
# Keys that start with _ are transformers' own variables; these it has written into the files of many models.
HARMLESS = {
    "_name_or_path",
    "_from_model_config",
    "_commit_hash",
    "_attn_implementation_autoset",
    "__type",
    "_remove_final_layer_norm",  # of OPT's architecture, for all its name
}
# A text that transformers writes and no longer reads.
UNUSED_FILE = "special_tokens_map_file"
# Lists of this length, and tensors of this size, are made before any weight is compared.
LIMITS = (
    (re.compile(r".*n_layers?|.*num_.*layers|.*_layers"), 1_000),
    (re.compile(r"(n|num)_.*"), 1_000_000),
    (re.compile(r".*_(size|dim)"), 10_000_000),
)


def check_config(directory: Path) -> dict[str, Any]:
    """config.json, parsed.

    Raises:
        CheckpointError: it is missing, unreadable or no JSON object, or has a key that could run code, open another
            file or exhaust the memory; or the directory holds an adapter, which transformers would follow elsewhere.
    """
    if is_there(directory / ADAPTER_CONFIG):
        raise CheckpointError(f"{directory}: has an {ADAPTER_CONFIG}, so it is an adapter and no base model")
    return _checked(directory / CONFIG)


def check_tokenizer_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, parsed; {} where there is none.

    Raises:
        CheckpointError: as `check_config`, or it names files.
    """
    path = directory / TOKENIZER_CONFIG
    if not is_there(path):
        return {}
    raw = _checked(path)
    for key, value in raw.items():
        if key.endswith("_file") and key != UNUSED_FILE and value is not None:
            raise CheckpointError(f"{path}: {key}: names a file, which only its place may do; remove this key")
    if raw.get("init_inputs"):
        raise CheckpointError(f"{path}: init_inputs: passes anything to the tokenizer; remove this key")
    return raw


def _checked(path: Path) -> dict[str, Any]:
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: is no JSON object")
    left: list[Any] = [raw]  # a list and not recursion: nested configurations are read like the outer one
    while left:
        value = left.pop()
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if isinstance(value, dict):
            for key, inner in value.items():
                _check_key(path, key, inner)
    return raw


def _check_key(path: Path, key: str, value: Any) -> None:
    if value is None:  # saved by transformers for what is not there
        return
    if key in REFUSED:
        raise CheckpointError(
            f"{path}: {key}: {REFUSED[key]}; if the model does without it, use a copy of this directory in which the "
            "key is removed"
        )
    if key.startswith("_") and key not in HARMLESS:
        raise CheckpointError(f"{path}: {key[:100]!r}: sets a variable inside transformers; remove this key")
    for pattern, most in LIMITS:
        if isinstance(value, int) and pattern.fullmatch(key) and value > most:
            raise CheckpointError(f"{path}: {key[:100]!r}: {value} is above {most}, which no model needs")
