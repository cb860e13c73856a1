"""From a sharded training checkpoint to a standalone adapter or a whole model, one module in memory at a time.

Needs neither torch.distributed nor deepspeed; the base model is needed for a whole model alone (merging, full
fine-tuning), and then as files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from abba.adapter.config import AdapterConfig, MethodConfig
from abba.adapter.directory import FULL, MERGED, AdapterDescription, forms_of, refuse_occupied, written_whole
from abba.adapter.files import AdapterSummary, write_adapter
from abba.adapter.full import write_full
from abba.adapter.merge import write_merged
from abba.checkpoint.source import FactorSource, open_checkpoint
from abba.errors import ArgumentError, CheckpointError
from abba.layout import CHECKPOINTS


@dataclass(frozen=True)
class Form:
    """What to make of the factors.

    format: one of the method's forms; None: the one that a run leaves. ABBA has loha, lora and merged, others one.
    rank: with lora: truncate to it; None keeps r1*r2, which is exact.
    dtype: of what is stored. None: fp32, and in a merged model what each of the base's tensors is stored as.
    base: of a whole model (merged, full): the base's directory.
    """

    format: str | None = None
    rank: int | None = None
    dtype: torch.dtype | None = None
    base: Path | None = None


def convert(
    checkpoint: Path, destination: Path, form: Form = Form(), overwrite: bool = False
) -> tuple[AdapterDescription, AdapterSummary]:
    """Write the fp32 masters of a verified checkpoint as a standalone adapter, and re-open it.

    Raises:
        CheckpointError: the checkpoint's files disagree, or `destination` cannot be used; nothing is written then.
    """
    with open_checkpoint(checkpoint) as source:
        return convert_source(source, destination, form, overwrite)


def convert_source(
    source: FactorSource,
    destination: Path,
    form: Form,
    overwrite: bool = False,
    check: Callable[[Path, AdapterDescription, AdapterSummary], None] | None = None,
) -> tuple[AdapterDescription, AdapterSummary]:
    """Write an opened checkpoint in `form`, and re-open it.

    Args:
        check: looks at the finished directory before it takes the name `destination`; what it raises prevents that.

    Raises:
        ArgumentError: a form or a rank that the adapter cannot have, or no base where a whole model is wanted.
        CheckpointError: see `write_adapter` and `write_merged`; nothing is written then.
    """
    refuse_overlap(destination, source.directory, "the checkpoint")
    if source.run is not None:
        _refuse_inside(destination, source.run / CHECKPOINTS)
    if form.base is not None:
        refuse_overlap(destination, form.base, "the base")
    refuse_occupied(destination, overwrite)
    _refuse_form(source.config, form)
    description = AdapterDescription(
        source.config,
        form.format or source.config.default_format,
        source.modules,
        source.base_model,
        form.rank,
        provenance=source.provenance,
    )
    if check is None:
        return description, _write(source, destination, form, description, overwrite)
    with written_whole(destination, overwrite) as result:
        summary = _write(source, result, form, description, overwrite)
        check(result, description, summary)
    return description, summary


def _write(
    source: FactorSource, destination: Path, form: Form, description: AdapterDescription, overwrite: bool
) -> AdapterSummary:
    scores = source.scores()
    if form.format == MERGED:
        return write_merged(destination, form.base, description, source.factors, form.dtype, overwrite, scores)
    if description.format == FULL:
        trained = (source.tensors, source.read)
        return write_full(destination, form.base, description, *trained, form.dtype, overwrite, scores)
    dtype = form.dtype or torch.float32
    return write_adapter(destination, description, source.factors, dtype, overwrite, scores)


def _refuse_form(config: MethodConfig, form: Form) -> None:
    forms, made = forms_of(config), form.format or config.default_format
    if form.format is not None and form.format not in forms:
        raise ArgumentError(
            f"--format {form.format}: is no form of {config.method}, which has {' and '.join(forms)}; leave it out"
        )
    if form.base is None and made in (MERGED, FULL):
        raise ArgumentError(f"--base: is needed for a whole model, {made}; give the one that was trained")
    if form.rank is None:
        return
    if not isinstance(config, AdapterConfig):
        raise ArgumentError(f"--rank {form.rank}: truncates ABBA alone, and this is {config.method}; leave it out")
    if made != "lora":
        raise ArgumentError(f"--rank {form.rank}: has a meaning for --format lora alone; leave it out")
    if not 1 <= form.rank <= config.lora_rank:
        raise ArgumentError(
            f"--rank {form.rank}: is not between 1 and r1*r2 = {config.lora_rank}, the rank of the adapter"
        )


def refuse_overlap(destination: Path, other: Path, what: str) -> None:
    """Raises CheckpointError when one of the two lies in the other."""
    inner, outer = other.resolve(), destination.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise CheckpointError(f"adapter directory {destination}: overlaps {what} {other}; choose another")


def _refuse_inside(destination: Path, checkpoints: Path) -> None:
    if checkpoints in destination.resolve().parents:
        raise CheckpointError(f"adapter directory {destination}: lies among the checkpoints of a run; choose another")
