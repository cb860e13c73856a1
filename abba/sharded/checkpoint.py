"""Saving the engine's state: every rank writes its slices, all agree, one commits. Nothing is gathered."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from abba.checkpoint import format
from abba.errors import CheckpointError
from abba.sharded.engine import local_slices, trainable_parameters
from abba.sharded.ranks import Ranks
from abba.storage import FileEntry

_FAILED = FileEntry(-1, "00" * 32)


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine, root: Path, state: Mapping[str, Any], keep: int, ranks: Ranks, step: int
) -> dict[str, float]:
    """Write `root/step-N` after N steps and delete all but the newest `keep`. Collective.

    Args:
        state: what goes into state.json besides the step, the world size and the tensor shapes.

    Returns:
        For the metrics: seconds it took, bytes of all shards.

    Raises:
        CheckpointError: some rank could not write; on every rank, and no directory of that name exists then.
    """
    started = time.monotonic()
    final = format.step_directory(root, step)
    temporary = format.temporary_directory(final)
    if ranks.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    failure = None
    try:
        entry = format.write_shard(temporary, ranks.rank, ranks.world_size, _state_of_this_rank(engine))
    except CheckpointError as error:
        entry, failure = _FAILED, error
    shards = _agree(entry, engine.device)
    lost = [rank for rank, shard in enumerate(shards) if shard == _FAILED]
    if lost:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise failure or CheckpointError(f"{final}: rank {lost[0]} could not write its shard; see its message")
    if ranks.is_main:
        shapes = {name: tuple(parameter.ds_shape) for name, parameter in trainable_parameters(engine)}
        format.commit(final, {**state, "step": step, "world_size": ranks.world_size, "tensors": shapes}, shards)
        format.rotate(root, keep)
    dist.barrier()
    return {"save_seconds": time.monotonic() - started, "save_bytes": sum(shard.size for shard in shards)}


def _state_of_this_rank(engine: deepspeed.DeepSpeedEngine):
    yield from local_slices(engine)
    yield "rng/cpu", torch.get_rng_state()
    if engine.device.type == "cuda":
        yield "rng/cuda", torch.cuda.get_rng_state(engine.device)


def _agree(entry: FileEntry, device: torch.device) -> list[FileEntry]:
    """Every rank's entry, on every rank; as plain bytes, because object collectives unpickle what peers send."""
    data = entry.size.to_bytes(8, "little", signed=True) + bytes.fromhex(entry.sha256)
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    raw = [bytes(part.cpu().tolist()) for part in gathered]
    return [FileEntry(int.from_bytes(part[:8], "little", signed=True), part[8:].hex()) for part in raw]
