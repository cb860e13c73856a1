"""Saving the engine's state: every rank writes its slices, all agree, one commits. Nothing is gathered."""

import shutil
import time
from collections.abc import Callable, Mapping
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
    entries: list[FileEntry] = []

    def make_room() -> None:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def write_own_shard() -> None:
        entries.append(format.write_shard(temporary, ranks.rank, ranks.world_size, _state_of_this_rank(engine)))

    def commit() -> None:
        if ranks.is_main:
            shapes = {name: tuple(parameter.ds_shape) for name, parameter in trainable_parameters(engine)}
            whole = {**state, "step": step, "world_size": ranks.world_size, "tensors": shapes}
            format.commit(final, whole, shards)
            format.rotate(root, keep)

    try:
        _together(make_room, final, engine.device)
        _together(write_own_shard, final, engine.device)
        shards = _gather_entries(entries[0], engine.device)
        _together(commit, final, engine.device)
    except CheckpointError:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return {"save_seconds": time.monotonic() - started, "save_bytes": sum(shard.size for shard in shards)}


def _together(work: Callable[[], None], final: Path, device: torch.device) -> None:
    """Do one's part of the work; go on only if every rank could. No rank is left waiting for one that failed."""
    failure = None
    try:
        work()
    except CheckpointError as error:
        failure = error
    except OSError as error:
        failure = CheckpointError(f"{final}: cannot be written: {error.strerror}")
    failed = torch.tensor([failure is not None], dtype=torch.int32, device=device)
    dist.all_reduce(failed)
    if failure is not None:
        raise failure
    if failed.item():
        raise CheckpointError(
            f"{final}: {int(failed.item())} other ranks could not write their part; see their messages"
        )


def _state_of_this_rank(engine: deepspeed.DeepSpeedEngine):
    yield from local_slices(engine)
    yield "rng/cpu", torch.get_rng_state()
    if engine.device.type == "cuda":
        yield "rng/cuda", torch.cuda.get_rng_state(engine.device)


def _gather_entries(entry: FileEntry, device: torch.device) -> list[FileEntry]:
    """Every rank's entry, on every rank; as plain bytes, because object collectives unpickle what peers send."""
    data = entry.size.to_bytes(8, "little") + bytes.fromhex(entry.sha256)
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    raw = [bytes(part.cpu().tolist()) for part in gathered]
    return [FileEntry(int.from_bytes(part[:8], "little"), part[8:].hex()) for part in raw]
