"""The engine's state to files and back: every rank writes its slices, all agree, one commits. Nothing is gathered."""

import errno
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from abba.checkpoint import format
from abba.checkpoint.format import CheckpointState, ShardReader
from abba.errors import CheckpointError
from abba.sharded.engine import local_slices, trainable_parameters
from abba.sharded.ranks import Ranks
from abba.sharded.together import agree, share
from abba.storage import FileEntry, free_bytes, in_gb

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    root: Path,
    state: Mapping[str, Any],
    keep: int,
    ranks: Ranks,
    confirm: Callable[[], None],
    step: int,
) -> dict[str, Any]:
    """Write `root/step-N` after N steps and delete all but the newest `keep`. Collective.

    Args:
        state: what goes into state.json besides the step, the world size and the tensor shapes.
        confirm: called on rank 0 before anything is touched; ends the rank, and so all, when the directory is no longer
            this run's.

    Returns:
        For the metrics: seconds it took, bytes of all shards; and what went wrong in deleting old ones, if anything.

    Raises:
        CheckpointError: some rank could not write; on every rank, and no directory of that name exists then.
    """
    started = time.monotonic()
    final = format.step_directory(root, step)
    temporary = format.temporary_directory(final)
    slices = dict(_state_of_this_rank(engine))
    own_bytes = sum(tensor.numel() * tensor.element_size() for tensor in slices.values())
    entries: list[FileEntry] = []
    aside: list[Path] = []

    def make_room() -> None:
        if ranks.is_main:
            confirm()
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def write_own_shard() -> None:
        entries.append(format.write_shard(temporary, ranks.rank, ranks.world_size, slices.items()))

    def commit() -> None:
        if ranks.is_main:
            shapes = {name: tuple(parameter.ds_shape) for name, parameter in trainable_parameters(engine)}
            whole = {**state, "step": step, "world_size": ranks.world_size, "tensors": shapes}
            confirm()
            aside.extend(format.commit(final, whole, shards))

    def part(work: Callable[[], None]) -> None:
        agree(lambda: _explained(work, final, own_bytes * ranks.world_size), engine.device)

    try:
        part(make_room)
        part(write_own_shard)
        shards = _gather_entries(entries[0], engine.device)
        part(commit)
    except CheckpointError:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    notes = _rotated(root, keep, step, aside) if ranks.is_main else {}
    return {"save_seconds": time.monotonic() - started, "save_bytes": sum(shard.size for shard in shards), **notes}


def _rotated(root: Path, keep: int, step: int, aside: list[Path]) -> dict[str, str]:
    warnings = []
    try:
        aside = [*aside, *format.rotate(root, keep, step)]
    except OSError as error:
        warnings.append(f"an old checkpoint cannot be deleted: {error}")
    if aside:
        warnings.append(f"did not verify, and set aside: {', '.join(map(str, aside))}")
    return {"save_warning": "; ".join(warnings)} if warnings else {}


def newest_valid_together(
    candidates: list[Path], ranks: Ranks, device: torch.device, passed_over: Callable[[str], None]
) -> Path | None:
    """The last of `candidates`, the same on every rank, that verifies; each rank hashes its share. Collective.

    Args:
        passed_over: told of each later one that does not verify, and of the file at fault.
    """
    for directory in reversed(candidates):
        try:
            agree(lambda where=directory: format.verify(where, ranks.rank, ranks.world_size), device)
            return directory
        except CheckpointError as error:
            passed_over(f"{directory}: {error.reason}")
    return None


def restore_random_state(directory: Path, state: CheckpointState, ranks: Ranks, device: torch.device) -> bool:
    """Continue this rank's random streams; False at another world size, where there are none to continue."""
    if state.world_size != ranks.world_size:
        return False
    with ShardReader(directory, state) as reader:
        torch.set_rng_state(reader.random_state(ranks.rank, "cpu"))
        if device.type == "cuda":
            torch.cuda.set_rng_state(reader.random_state(ranks.rank, "cuda"), device)
    return True


def _explained(work: Callable[[], None], final: Path, needed: int) -> None:
    try:
        work()
    except OSError as error:
        if error.errno in NO_SPACE:
            partial = sum(path.stat().st_size for path in format.temporary_directory(final).glob("*"))
            raise CheckpointError(
                f"{final}: no space: this save needs {in_gb(needed)}, "
                f"{in_gb(free_bytes(final.parent) + partial)} are free; "
                "delete something, or lower checkpoint.save_total_limit"
            ) from error
        raise CheckpointError(f"{final}: cannot be written: {error.strerror or error}") from error


def _state_of_this_rank(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    yield from local_slices(engine)
    yield "rng/cpu", torch.get_rng_state()
    if engine.device.type == "cuda":
        yield "rng/cuda", torch.cuda.get_rng_state(engine.device)


def _gather_entries(entry: FileEntry, device: torch.device) -> list[FileEntry]:
    return [FileEntry(*json.loads(text)) for text in share(json.dumps(entry).encode(), device)]
