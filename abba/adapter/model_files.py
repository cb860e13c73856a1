"""A whole model as transformers and vLLM read it: written after its base, one tensor in memory at a time; checked."""

import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abba.adapter.card import model_card
from abba.adapter.directory import (
    ABBA_CONFIG,
    CARD,
    FULL,
    MERGED,
    AdapterDescription,
    read_description,
    write_description,
    written_whole,
)
from abba.adapter.files import opened
from abba.base_files import INDEX, SINGLE_FILE, BaseFiles
from abba.errors import CheckpointError
from abba.names import inside
from abba.storage import Spec, read_json, write_json, write_safetensors

CONFIG = "config.json"
WRITABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_ELEMENTS = 1 << 20  # 4 MiB in fp32: what is held beside the tensor that is being made
# What transformers and vLLM read beside the weights, and what a licence asks to pass on. No code, no pickles.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",  # whose presence has tokenizer.json mended, see load_tokenizer
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
)


Layouts = dict[str, dict[str, Spec]]  # file -> tensor -> shape and dtype


def write_model(
    directory: Path,
    base: BaseFiles,
    description: AdapterDescription,
    make: Callable[[str, Spec], Tensor],
    dtype: torch.dtype | None,
    scores: Mapping[str, Any] | None,
    overwrite: bool,
) -> Layouts:
    """Write a model with the base's files, configuration and tokenizer, re-open and check it, then give it its name.

    Args:
        make: a tensor by its name, as its Spec says.
        dtype: what every floating-point tensor is stored as; None keeps the dtype of each.
        overwrite: replace a directory that stands there already.

    Raises:
        CheckpointError: `directory` cannot be written, or the result is not finite. Nothing is left behind then.
    """
    config, companions = read_config(base.directory), _companions(base.directory)
    layouts = {
        name: {key: Spec(stored.shape, _stored_dtype(stored.dtype, dtype)) for key, stored in file.tensors.items()}
        for name, file in base.files.items()
    }
    with written_whole(directory, overwrite) as temporary:
        for name, layout in layouts.items():
            metadata = {"format": "pt", **base.files[name].metadata}  # transformers asks for the format
            tensors = (make(key, spec) for key, spec in layout.items())
            write_safetensors(temporary / name, layout, tensors, metadata)
        if SINGLE_FILE not in layouts:
            write_json(temporary / INDEX, _index(layouts))
        dtype_name = str(dtype).removeprefix("torch.") if dtype else None
        write_json(temporary / CONFIG, _with_dtype(config, dtype_name) if dtype_name else config)
        _copy(companions, base.directory, temporary)
        description = replace(description, dtype=dtype_name)
        write_description(temporary, description)
        (temporary / CARD).write_text(model_card(description, scores), encoding="utf-8")
        verify_model(temporary, layouts)
    return layouts


def verify_model(directory: Path, layouts: Layouts | None = None) -> None:
    """Re-open a model with the safetensors library: every target there, of its shape; every tensor finite.

    Args:
        layouts: file -> tensor -> shape and dtype, if that is known; nothing may be missing or extra then.

    Raises:
        CheckpointError: names the first thing that is wrong.
    """
    description = read_description(directory)
    if description.format not in (MERGED, FULL):
        raise CheckpointError(f"{directory}: is an adapter in {description.format} form and no whole model")
    with BaseFiles(directory) as files:
        for name, shape in description.modules.items():
            key = f"{name}.weight"
            if key not in files.names or files.stored(key).shape != shape:
                raise CheckpointError(f"{directory}: {key} is not there with the shape {shape} that {ABBA_CONFIG} says")
        present = {
            name: {key: Spec(stored.shape, stored.dtype) for key, stored in file.tensors.items()}
            for name, file in files.files.items()
        }
    if SINGLE_FILE not in present and read_json(directory / INDEX) != _index(present):
        raise CheckpointError(f"{directory / INDEX}: does not say which tensors its files hold")
    if layouts is not None and present.keys() != layouts.keys():
        raise CheckpointError(f"{directory}: holds the files {sorted(present)}, not {sorted(layouts)}")
    for name, layout in (layouts or present).items():
        with opened(directory / name) as file:
            different = sorted(set(file.keys()) ^ layout.keys())
            if different:
                raise CheckpointError(f"{directory / name}: {different[0]} is missing or does not belong there")
            for key, spec in layout.items():
                tensor = file.get_tensor(key)
                if Spec(tuple(tensor.shape), tensor.dtype) != spec:
                    raise CheckpointError(
                        f"{directory / name}: {key} is {tuple(tensor.shape)} {tensor.dtype}, not {spec}"
                    )
                if not _is_finite(tensor):
                    raise CheckpointError(
                        f"{directory / name}: {key} holds NaN or infinity; so does the base, the training diverged, "
                        f"or the sum is too large for {tensor.dtype}"
                    )


def copied(base: BaseFiles, key: str, spec: Spec) -> Tensor:
    """A tensor of the base as it is to be stored."""
    copy = torch.empty(math.prod(spec.shape), dtype=spec.dtype)
    for start in range(0, copy.numel(), BLOCK_ELEMENTS):
        stop = min(start + BLOCK_ELEMENTS, copy.numel())
        copy[start:stop] = base.read(key, start, stop)
    return copy.view(spec.shape)


def bytes_of(layouts: Layouts) -> tuple[int, int]:
    """(tensors, their bytes)"""
    specs = [spec for layout in layouts.values() for spec in layout.values()]
    return len(specs), sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)


def read_config(base: Path) -> dict[str, Any]:
    config = read_json(base / CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{base / CONFIG}: is no model configuration")
    return config


def _with_dtype(value: Any, dtype_name: str) -> Any:
    """config.json with its dtype changed wherever it gives one; parts of a model have configurations of their own."""
    if not isinstance(value, dict):
        return value
    return {
        key: dtype_name
        if key in ("dtype", "torch_dtype") and isinstance(inner, str)
        else _with_dtype(inner, dtype_name)
        for key, inner in value.items()
    }


def _stored_dtype(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and stored.is_floating_point else stored


def _index(layouts: Layouts) -> dict[str, Any]:
    _, size = bytes_of(layouts)
    weight_map = {key: name for name, layout in layouts.items() for key in layout}
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}


def _companions(base: Path) -> list[Path]:
    found = sorted(path for pattern in COMPANIONS for path in base.glob(pattern) if path.is_file())
    for path in found:
        inside(base, path)  # or a link in what was downloaded would put a file of yours into the result
    return found


def _copy(companions: list[Path], base: Path, target: Path) -> None:
    for source in companions:
        copy = target / source.relative_to(base)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, copy)
        with open(copy, "rb") as file:
            os.fsync(file.fileno())


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    return all(part.float().isfinite().all() for part in tensor.flatten().split(BLOCK_ELEMENTS))
