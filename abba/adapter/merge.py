"""A base and its adapter as one ordinary model: W + delta W, one tensor in memory at a time.

The base is read as files, never built, so merging 70B needs the memory of one weight. delta W is computed in blocks of
rows and added in fp32; the sum is rounded once, to the dtype that is stored.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abba.adapter.card import model_card
from abba.adapter.directory import (
    ABBA_CONFIG,
    CARD,
    MERGED,
    AdapterDescription,
    read_description,
    refuse_occupied,
    write_description,
    written_whole,
)
from abba.adapter.files import AdapterSummary, opened
from abba.adapter.functional import delta_weight
from abba.adapter.initialize import Factors
from abba.base_files import INDEX, SINGLE_FILE, BaseFiles
from abba.errors import CheckpointError
from abba.storage import Spec, read_json, write_json, write_safetensors

CONFIG = "config.json"
MERGEABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_ELEMENTS = 1 << 20  # 4 MiB in fp32: what is held beside the tensor that is being made
# What transformers and vLLM read beside the weights, and what a licence asks to pass on. No code, no pickles.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
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


@dataclass(frozen=True)
class MergeSummary(AdapterSummary):
    """What merging and re-opening showed; `changes_nothing`: every stored weight came out as in the base."""

    unchanged: int = 0  # targets whose stored weight is the base's, bit for bit
    rounding: float = 0.0  # ||stored - exact||_F / ||delta W||_F over all targets


def write_merged(
    directory: Path,
    base: Path,
    description: AdapterDescription,
    load: Callable[[str], Factors],
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    scores: Mapping[str, Any] | None = None,
) -> MergeSummary:
    """Write the whole model, re-open and check it, then give it its name.

    Args:
        load: the factors of a module by its name.
        dtype: what every floating-point tensor is stored as; None keeps the dtype of each, and then whatever is not a
            target is copied bit for bit.

    Raises:
        CheckpointError: the base lacks a target, has it in another shape, quantised or tied; `directory` is not
            empty or cannot be written; the result is not finite. Nothing is left behind then.
    """
    refuse_occupied(directory, overwrite)
    with BaseFiles(base) as files:
        config = _read_config(base)
        _check_targets(files, description, config)
        layouts = {
            name: {key: Spec(stored.shape, _stored_dtype(stored.dtype, dtype)) for key, stored in file.tensors.items()}
            for name, file in files.files.items()
        }
        merge = _Merge(files, description, load)
        with written_whole(directory) as temporary:
            for name, layout in layouts.items():
                metadata = {"format": "pt", **files.files[name].metadata}  # transformers asks for the format
                write_safetensors(temporary / name, layout, merge.tensors(layout), metadata)
            if SINGLE_FILE not in layouts:
                write_json(temporary / INDEX, _index(layouts))
            dtype_name = str(dtype).removeprefix("torch.") if dtype else None
            write_json(temporary / CONFIG, _with_dtype(config, dtype_name) if dtype_name else config)
            _copy_companions(base, temporary)
            description = replace(description, format=MERGED, dtype=dtype_name)
            write_description(temporary, description)
            (temporary / CARD).write_text(model_card(description, scores))
            verify_merged(temporary, layouts)
            return merge.summary(layouts)


def verify_merged(directory: Path, layouts: Mapping[str, Mapping[str, Spec]] | None = None) -> None:
    """Re-open a merged model with the safetensors library: every target there, of its shape; every tensor finite.

    Args:
        layouts: file -> tensor -> shape and dtype, if that is known; nothing may be missing or extra then.

    Raises:
        CheckpointError: names the first thing that is wrong.
    """
    description = read_description(directory)
    if description.format != MERGED:
        raise CheckpointError(f"{directory}: is an adapter in {description.format} form and no merged model")
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


class _Merge:
    """Makes the tensors of a merged model, and keeps count of what that did to the targets."""

    def __init__(self, files: BaseFiles, description: AdapterDescription, load: Callable[[str], Factors]) -> None:
        self._files, self._description, self._load = files, description, load
        self._unchanged, self._delta_energy, self._rounding_energy = 0, 0.0, 0.0

    def tensors(self, layout: Mapping[str, Spec]) -> Iterator[Tensor]:
        targets = {f"{name}.weight": name for name in self._description.modules}
        for key, spec in layout.items():
            yield self._merged(key, targets[key], spec) if key in targets else self._copied(key, spec)

    def summary(self, layouts: Mapping[str, Mapping[str, Spec]]) -> MergeSummary:
        specs = [spec for layout in layouts.values() for spec in layout.values()]
        size = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)
        rounding = math.sqrt(self._rounding_energy / self._delta_energy) if self._delta_energy else 0.0
        nothing = self._unchanged == len(self._description.modules)
        return MergeSummary(len(specs), size, nothing, unchanged=self._unchanged, rounding=rounding)

    def _copied(self, key: str, spec: Spec) -> Tensor:
        copy = torch.empty(math.prod(spec.shape), dtype=spec.dtype)
        for start in range(0, copy.numel(), BLOCK_ELEMENTS):
            stop = min(start + BLOCK_ELEMENTS, copy.numel())
            copy[start:stop] = self._files.read(key, start, stop)
        return copy.view(spec.shape)

    @torch.no_grad()
    def _merged(self, key: str, module: str, spec: Spec) -> Tensor:
        a1_RI, b1_OR, a2_QI, b2_OQ = (factor.detach().float() for factor in self._load(module))
        out_features, in_features = spec.shape
        merged_OI, changed = torch.empty(spec.shape, dtype=spec.dtype), False
        rows = max(1, BLOCK_ELEMENTS // in_features)
        for first in range(0, out_features, rows):
            stop = min(first + rows, out_features)
            base = self._files.read(key, first * in_features, stop * in_features).view(-1, in_features)
            exact = delta_weight(a1_RI, b1_OR[first:stop], a2_QI, b2_OQ[first:stop], self._description.config.scale)
            self._delta_energy += _energy(exact)
            exact.add_(base.float())
            stored = merged_OI[first:stop].copy_(exact)
            self._rounding_energy += _energy(exact.sub_(stored.float()))
            changed = changed or not torch.equal(stored, base.to(spec.dtype))
        self._unchanged += not changed
        return merged_OI


def _check_targets(files: BaseFiles, description: AdapterDescription, config: Mapping[str, Any]) -> None:
    if "quantization_config" in config:
        raise CheckpointError(f"{files.directory}: is quantised; merge into the base that it was made from")
    tied = config.get("tie_word_embeddings", True)  # a family's own default may be true
    for name, shape in description.modules.items():
        key = f"{name}.weight"
        if tied and name.rpartition(".")[2] == "lm_head":
            raise CheckpointError(
                f"{files.directory}: {key} is tied to the input embedding (tie_word_embeddings), "
                "which merging would change too; convert with --format loha"
            )
        if key not in files.names:
            raise CheckpointError(f"{files.directory}: has no {key}, which the adapter changes; give its own base")
        stored = files.stored(key)
        if stored.shape != shape:
            raise CheckpointError(
                f"{files.directory}: {key} is {stored.shape}, the adapter was made for {shape}; give its own base"
            )
        if stored.dtype not in MERGEABLE_DTYPES:
            raise CheckpointError(f"{files.directory}: {key} is stored as {stored.dtype}; give a base in bf16 or fp32")


def _read_config(base: Path) -> dict[str, Any]:
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


def _index(layouts: Mapping[str, Mapping[str, Spec]]) -> dict[str, Any]:
    specs = [spec for layout in layouts.values() for spec in layout.values()]
    size = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)
    weight_map = {key: name for name, layout in layouts.items() for key in layout}
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}


def _copy_companions(base: Path, target: Path) -> None:
    for source in sorted(path for pattern in COMPANIONS for path in base.glob(pattern) if path.is_file()):
        copy = target / source.relative_to(base)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, copy)
        with open(copy, "rb") as file:
            os.fsync(file.fileno())


def _energy(values: Tensor) -> float:
    return torch.linalg.vector_norm(values, dtype=torch.float64).item() ** 2


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    return all(part.float().isfinite().all() for part in tensor.flatten().split(BLOCK_ELEMENTS))
