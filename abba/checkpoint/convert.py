"""From a sharded training checkpoint to a standalone adapter, one module in memory at a time.

Needs neither torch.distributed nor deepspeed nor the base model.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from abba.adapter.files import AdapterDescription, AdapterSummary, refuse_occupied, write_adapter
from abba.adapter.initialize import Factors
from abba.checkpoint.format import MANIFEST, ShardReader, newest_valid, read_state, verify
from abba.errors import CheckpointError


def find_checkpoint(source: Path, report: Callable[[str], None]) -> Path:
    """A checkpoint directory itself, or the newest valid checkpoint of a run directory; verified by hash.

    Raises:
        CheckpointError: `source` is neither, or holds no valid checkpoint.
    """
    if (source / MANIFEST).is_file():
        verify(source)
        return source
    for root in (source / "checkpoints", source):
        if root.is_dir() and (found := newest_valid(root, report)) is not None:
            return found
    if not source.is_dir():
        raise CheckpointError(f"{source}: does not exist; give a checkpoint (runs/NAME/checkpoints/step-N) or a run")
    raise CheckpointError(f"{source}: holds no valid checkpoint; give a checkpoint directory or the run that has it")


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
    inner, outer = checkpoint.resolve(), destination.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise CheckpointError(f"adapter directory {destination}: overlaps the checkpoint {checkpoint}; choose another")
    refuse_occupied(destination, overwrite)
    state = read_state(checkpoint)
    description = AdapterDescription(state.adapter, format, state.modules, state.base_model)
    with ShardReader(checkpoint, state) as reader:
        return description, write_adapter(destination, description, partial(_factors, reader), dtype, overwrite)


def read_checkpoint_factors(checkpoint: Path) -> dict[str, Factors]:
    """The fp32 masters of a verified checkpoint, all in memory."""
    state = read_state(checkpoint)
    with ShardReader(checkpoint, state) as reader:
        return {name: _factors(reader, name) for name in state.modules}


def _factors(reader: ShardReader, name: str) -> Factors:
    return Factors(*(reader.read("master", f"{name}.{factor}") for factor in Factors._fields))
