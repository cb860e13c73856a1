"""From a sharded training checkpoint to a standalone adapter or a merged model, one module in memory at a time.

Needs neither torch.distributed nor deepspeed; the base model is needed for merging alone, and then as files.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from abba.adapter.directory import MERGED, AdapterDescription, refuse_occupied
from abba.adapter.files import AdapterSummary, write_adapter
from abba.adapter.merge import write_merged
from abba.checkpoint.source import CHECKPOINTS, FactorSource, open_checkpoint
from abba.errors import CheckpointError, RecipeError


@dataclass(frozen=True)
class Form:
    """What to make of the factors.

    format: loha, lora or merged.
    rank: with lora: truncate to it; None keeps r1*r2, which is exact.
    dtype: of what is stored. None: fp32, and in a merged model what each of the base's tensors is stored as.
    base: with merged: the base's directory.
    """

    format: str = "loha"
    rank: int | None = None
    dtype: torch.dtype | None = None
    base: Path | None = None


def convert(
    checkpoint: Path,
    destination: Path,
    format: str = "loha",
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> tuple[AdapterDescription, AdapterSummary]:
    """Write the fp32 masters of a verified checkpoint as a standalone adapter, and re-open it.

    Raises:
        CheckpointError: the checkpoint's files disagree, or `destination` cannot be used; nothing is written then.
    """
    with open_checkpoint(checkpoint) as source:
        return convert_source(source, destination, Form(format, dtype=dtype), overwrite)


def convert_source(
    source: FactorSource, destination: Path, form: Form, overwrite: bool = False
) -> tuple[AdapterDescription, AdapterSummary]:
    """Write an opened checkpoint in `form`, and re-open it.

    Raises:
        RecipeError: a rank that the adapter cannot have.
        CheckpointError: see `write_adapter` and `write_merged`; nothing is written then.
    """
    refuse_overlap(destination, source.directory, "the checkpoint")
    if source.run is not None:
        _refuse_inside(destination, source.run / CHECKPOINTS)
    if form.base is not None:
        refuse_overlap(destination, form.base, "the base")
    refuse_occupied(destination, overwrite)
    description = AdapterDescription(
        source.config, form.format, source.modules, source.base_model, form.rank, provenance=source.provenance
    )
    highest = source.config.r1 * source.config.r2
    if form.rank is not None and not 1 <= form.rank <= highest:
        raise RecipeError(f"--rank {form.rank}: is not between 1 and r1*r2 = {highest}, the rank of the adapter")
    scores = source.scores()
    if form.format == MERGED:
        summary = write_merged(destination, form.base, description, source.factors, form.dtype, overwrite, scores)
    else:
        dtype = form.dtype or torch.float32
        summary = write_adapter(destination, description, source.factors, dtype, overwrite, scores)
    return description, summary


def refuse_overlap(destination: Path, other: Path, what: str) -> None:
    """Raises CheckpointError when one of the two lies in the other."""
    inner, outer = other.resolve(), destination.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise CheckpointError(f"adapter directory {destination}: overlaps {what} {other}; choose another")


def _refuse_inside(destination: Path, checkpoints: Path) -> None:
    if checkpoints in destination.resolve().parents:
        raise CheckpointError(f"adapter directory {destination}: lies among the checkpoints of a run; choose another")
