"""A base and its adapter as one ordinary model: W + delta W, one tensor in memory at a time.

The base is read as files, never built, so merging 70B needs the memory of one weight. delta W is computed in blocks of
rows and added in fp32; the sum is rounded once, to the dtype that is stored.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abba.adapter.directory import MERGED, AdapterDescription, refuse_occupied
from abba.adapter.files import AdapterSummary
from abba.adapter.functional import delta_weight
from abba.adapter.initialize import Factors
from abba.adapter.model_files import (
    BLOCK_ELEMENTS,
    WRITABLE_DTYPES,
    Layouts,
    bytes_of,
    copied,
    read_config,
    write_model,
)
from abba.base_files import BaseFiles
from abba.errors import CheckpointError
from abba.storage import Spec


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
        _check_targets(files, description, read_config(base))
        merge = _Merge(files, description, load)
        described = replace(description, format=MERGED)
        return merge.summary(write_model(directory, files, described, merge.tensor, dtype, scores, overwrite))


class _Merge:
    """Makes the tensors of a merged model, and keeps count of what that did to the targets."""

    def __init__(self, files: BaseFiles, description: AdapterDescription, load: Callable[[str], Factors]) -> None:
        self._files, self._description, self._load = files, description, load
        self._unchanged, self._delta_energy, self._rounding_energy = 0, 0.0, 0.0

    def tensor(self, key: str, spec: Spec) -> Tensor:
        if key.removesuffix(".weight") in self._description.modules and key.endswith(".weight"):
            return self._merged(key, key.removesuffix(".weight"), spec)
        return copied(self._files, key, spec)

    def summary(self, layouts: Layouts) -> MergeSummary:
        rounding = math.sqrt(self._rounding_energy / self._delta_energy) if self._delta_energy else 0.0
        nothing = self._unchanged == len(self._description.modules)
        return MergeSummary(*bytes_of(layouts), nothing, unchanged=self._unchanged, rounding=rounding)

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
    if config.get("quantization_config") is not None:
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
        if stored.dtype not in WRITABLE_DTYPES:
            raise CheckpointError(f"{files.directory}: {key} is stored as {stored.dtype}; give a base in bf16 or fp32")


def _energy(values: Tensor) -> float:
    return torch.linalg.vector_norm(values, dtype=torch.float64).item() ** 2
