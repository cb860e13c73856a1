"""A training checkpoint on disk, and when it counts.

    checkpoints/step-000100/
        shard-00000-of-00002.safetensors   one per rank: its slice of every trainable tensor, flattened, as
        shard-00001-of-00002.safetensors   `master/NAME` in fp32 and the Adam moments `exp_avg/NAME`, `exp_avg_sq/NAME`;
                                           the rank's random state as `rng/cpu`, `rng/cuda`
        state.json                         step, adapter, tensor shapes, fingerprints
        manifest.json                      size and SHA-256 of every other file, and of itself; written last

Written into step-000100.tmp/ and renamed when every file is on disk, so that a directory of that name is whole. The
frozen base is never in it.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abba.adapter.config import FullConfig, MethodConfig, config_from, factors_of
from abba.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    STATE,
    STEP_NAME,
    read_manifest,
    shard_name,
    write_manifest,
)
from abba.checkpoint.slices import overlapping, slice_bounds
from abba.errors import CheckpointError, RecipeError
from abba.names import inside
from abba.storage import (
    FileEntry,
    SafetensorsFile,
    Spec,
    hash_file,
    publish_directory,
    read_json,
    sync_directory,
    write_json,
    write_safetensors,
)

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
KINDS = (MASTER, *MOMENTS)


def step_directory(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def temporary_directory(final: Path) -> Path:
    return final.with_name(final.name + ".tmp")


def write_shard(directory: Path, rank: int, world_size: int, slices: Iterable[tuple[str, Tensor]]) -> FileEntry:
    """Write one rank's slices, as `KIND/NAME` and a 1-D tensor each; on disk when it returns."""
    tensors = dict(slices)
    layout = {key: Spec(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    metadata = {"format": "abba-slices", "rank": str(rank), "world_size": str(world_size)}
    return write_safetensors(directory / shard_name(rank, world_size), layout, tensors.values(), metadata)


def commit(final: Path, state: Mapping[str, Any], shards: list[FileEntry]) -> list[Path]:
    """Called by one rank once every rank's shard is on disk: state, manifest, rename.

    One of that name did not verify when the run was resumed before it; see `rotate`. Gives what it is called now.
    """
    temporary = temporary_directory(final)
    world_size = len(shards)
    files = {shard_name(rank, world_size): entry for rank, entry in enumerate(shards)}
    files[STATE] = write_json(temporary / STATE, {"format_version": FORMAT_VERSION, **state})
    write_manifest(temporary, state["step"], world_size, files)
    aside = [_set_aside(final)] if final.exists() else []
    publish_directory(temporary, final)
    return aside


def verify(directory: Path, rank: int = 0, world_size: int = 1) -> None:
    """Check the files of a checkpoint against its manifest; each of several ranks hashes its share.

    Raises:
        CheckpointError: names the file that is missing, extra or changed.
    """
    files = read_manifest(directory)
    for name in (MANIFEST, *files):
        inside(directory, directory / name)
    present = {path.name for path in directory.iterdir()}
    for name in sorted(present ^ (files.keys() | {MANIFEST})):
        raise CheckpointError(f"{directory / name}: {'is not in the manifest' if name in present else 'is missing'}")
    for name, entry in list(files.items())[rank::world_size]:
        actual = hash_file(directory / name)
        if actual != entry:
            what = f"{actual.size} bytes, not {entry.size}" if actual.size != entry.size else "its SHA-256 differs"
            raise CheckpointError(f"{directory / name}: is damaged: {what}")


def newest_valid(root: Path, report: Callable[[str], None]) -> Path | None:
    """The checkpoint of the highest step that verifies; each newer one that does not is reported by name."""
    for directory in reversed(list_checkpoints(root)):
        try:
            verify(directory)
            return directory
        except CheckpointError as error:
            report(f"skipped {directory.name}: {error}")
    return None


def list_checkpoints(root: Path) -> list[Path]:
    """Committed checkpoint directories in the order of their steps, verified or not."""
    return [path for _, path in _numbered(root)]


def rotate(root: Path, keep: int, newest: int) -> list[Path]:
    """Delete all but the last `keep` checkpoints up to the one of step `newest`, which was just committed.

    Those of later steps did not verify when this run was resumed before them: counted as newer, they would push out
    the valid one. They are renamed and returned, not deleted: perhaps it was the disk's bad day.
    """
    present = {directory: step for step, directory in _numbered(root)}
    kept = [directory for directory, step in present.items() if step <= newest][-keep:]
    later = [directory for directory, step in present.items() if step > newest]
    aside = [_set_aside(directory) for directory in later]
    for directory in present.keys() - {*kept, *later}:
        # Renamed first: a name that is listed always stands for a whole checkpoint.
        doomed = temporary_directory(directory)
        if doomed.exists():
            _remove(doomed)
        directory.rename(doomed)
        _remove(doomed)
    sync_directory(root)
    return aside


def remove_leftovers(root: Path) -> list[Path]:
    """Delete what killed saves and rotations left behind; returns it. Only for the owner of the run directory."""
    leftovers = [path for path in _children(root) if path.suffix == ".tmp" and STEP_NAME.fullmatch(path.stem)]
    for path in leftovers:
        _remove(path)
    return leftovers


@dataclass(frozen=True)
class CheckpointState:
    """state.json: what a checkpoint holds and what made it."""

    step: int
    world_size: int
    seed: int
    base_model: str
    adapter: MethodConfig
    modules: dict[str, tuple[int, int]]  # name -> (out, in)
    tensors: dict[str, tuple[int, ...]]  # trainable tensor -> full shape
    fingerprint: dict[str, Any]  # what must not change when the run goes on
    recipe: dict[str, Any]  # as resolved; for people and model cards


def read_state(directory: Path) -> CheckpointState:
    """Raises CheckpointError when the directory is no checkpoint of this format."""
    if not (directory / MANIFEST).is_file():
        raise CheckpointError(f"{directory}: is no checkpoint: it has no {MANIFEST}")
    raw = read_json(directory / STATE)
    try:
        if raw.pop("format_version") != FORMAT_VERSION:
            raise ValueError(f"only version {FORMAT_VERSION} can be read")
        raw["modules"] = {name: tuple(shape) for name, shape in raw["modules"].items()}
        raw["tensors"] = {name: tuple(shape) for name, shape in raw["tensors"].items()}
        raw["adapter"] = config_from(raw["adapter"])
        state = CheckpointState(**raw)
        _check_state(state)
        return state
    except (KeyError, TypeError, ValueError, AttributeError, RecipeError) as error:
        raise CheckpointError(f"{directory / STATE}: does not describe a checkpoint: {error}") from error


def _check_state(state: CheckpointState) -> None:
    """Hashes only prove that files are those of the manifest; whoever can write one can write both."""
    shapes = [*state.modules.values(), *state.tensors.values()]
    numbers = [state.step, state.world_size, *(n for shape in shapes for n in shape)]
    if any(type(n) is not int or not 0 <= n < 2**40 for n in numbers) or state.world_size < 1:
        raise ValueError("step, world_size, a module's size or a tensor's is no such number")
    if not isinstance(state.base_model, str):
        raise ValueError("base_model is no text")
    if isinstance(state.adapter, FullConfig):
        if state.modules or not state.tensors:
            raise ValueError("its tensors are not those of a whole model")
    elif state.tensors != factors_of(state.adapter, state.modules) or not state.tensors:
        raise ValueError("its tensors are not the factors of its modules")


class ShardReader:
    """Full tensors, or any range of them, from the shards of a checkpoint; one preadv per shard and range."""

    def __init__(self, directory: Path, state: CheckpointState) -> None:
        self._state = state
        with ExitStack() as stack:
            self._shards = [
                stack.enter_context(SafetensorsFile(directory / shard_name(rank, state.world_size)))
                for rank in range(state.world_size)
            ]
            self._check_layout()
            self._close = stack.pop_all()

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._close.close()

    def read(self, kind: str, name: str) -> Tensor:
        """The full fp32 tensor `name`; `kind` is one of KINDS."""
        shape = self._state.tensors[name]
        return self.read_range(kind, name, 0, torch.Size(shape).numel()).view(shape)

    def read_range(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""
        numel = torch.Size(self._state.tensors[name]).numel()
        pieces = overlapping(numel, self._state.world_size, start, stop)
        if not pieces:  # a rank's part of a tensor that has fewer elements than there are ranks, or not many more
            return torch.empty(0)
        return torch.cat([self._shards[rank].read(f"{kind}/{name}", low, high) for rank, low, high in pieces])

    def random_state(self, rank: int, device_type: str) -> Tensor:
        """What torch.get_rng_state gave on `rank` when the checkpoint was written; uint8."""
        try:
            return self._shards[rank].read(f"rng/{device_type}")
        except KeyError:
            raise CheckpointError(
                f"{self._shards[rank].path}: holds no random state of a {device_type} device; "
                "continue on the kind of device that it was saved on"
            ) from None

    def _check_layout(self) -> None:
        for rank, shard in enumerate(self._shards):
            for kind in KINDS:
                for name, shape in self._state.tensors.items():
                    low, high = slice_bounds(torch.Size(shape).numel(), rank, self._state.world_size)
                    stored = shard.tensors.get(f"{kind}/{name}")
                    if stored is None or stored.numel != high - low or stored.dtype != torch.float32:
                        raise CheckpointError(
                            f"{shard.path}: {kind}/{name} should hold {high - low} fp32 values, it has {stored}"
                        )


def remove_checkpoints(root: Path) -> None:
    """Delete every checkpoint of `root`, and what killed saves left behind; nothing else."""
    for path in list(_children(root)):
        if STEP_NAME.fullmatch(path.name.removesuffix(".tmp")):
            _remove(path)


def _set_aside(directory: Path) -> Path:
    target = directory.with_name(f"{directory.name}.damaged")
    if target.exists():
        _remove(target)
    return directory.rename(target)


def _remove(directory: Path) -> None:
    """A link is removed, what it leads to is not."""
    if directory.is_symlink():
        directory.unlink()
    else:
        shutil.rmtree(directory)


def _numbered(root: Path) -> list[tuple[int, Path]]:
    return sorted((int(match[1]), path) for path in _children(root) if (match := STEP_NAME.fullmatch(path.name)))


def _children(root: Path) -> Iterator[Path]:
    return iter(root.iterdir()) if root.is_dir() else iter(())
