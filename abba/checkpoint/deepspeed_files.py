"""DeepSpeed's own ZeRO-3 checkpoints (`engine.save_checkpoint`), read without deepspeed and one tensor at a time.

    latest                                              the name of the newest directory beside it
    global_step100/
        zero_pp_rank_0_mp_rank_00_model_states.pt       one per rank: names and shapes, step, parts of frozen parameters
        bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt  one per rank: its part of the fp32 masters and the Adam moments;
                                                        without `bf16_` where the model was fp16 or fp32

A rank's masters are one flat tensor per group of `param_shapes`, parameter after parameter. Each takes
ceil(numel / world_size) elements on every rank, so that the padding is at the end of each parameter, on the last ranks.
"""

import itertools
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from abba.checkpoint.deepspeed_archive import RankMasters, RankModel, Shapes, read_masters, read_model
from abba.checkpoint.slices import slice_bounds
from abba.errors import CheckpointError

_FILE = re.compile(r"(?:\w+_)?zero_pp_rank_(\d{1,9})_mp_rank_(\d{1,9})_(optim|model)_states\.pt", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def is_deepspeed_checkpoint(directory: Path) -> bool:
    """Whether DeepSpeed saved into `directory`, or into the one beside a `latest` in it that this names."""
    try:
        _tag_directory(directory)
    except CheckpointError:  # DeepSpeedCheckpoint says why
        return False
    return True


class DeepSpeedCheckpoint:
    """The fp32 masters of a checkpoint; its files stay mapped until it is closed.

    Attributes:
        directory: the one that holds the ranks' files.
        tensors: trainable parameter, as the model names it, -> full shape; a leading "module." is removed.
        frozen: the same of frozen parameters, where they were saved.
        step: steps at the save (`global_steps`).
        world_size: ranks that saved it.

    Raises:
        CheckpointError: names the file that is missing, extra, damaged or of another save, or that would run code.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = _tag_directory(directory)
        found = _rank_files(self.directory, "optim")
        first = read_masters(found[min(found)])
        self.world_size = first.world_size
        _refuse_incomplete(self.directory, "optim", found, self.world_size)
        masters = [first if path == first.path else read_masters(path) for _, path in sorted(found.items())]

        found = _rank_files(self.directory, "model")
        _refuse_incomplete(self.directory, "model", found, self.world_size)
        models = [read_model(path) for _, path in sorted(found.items())]

        _refuse_mixed(masters, models)
        _refuse_other_sizes(masters, models[0])
        self.step = models[0].step
        self.tensors = _model_names(models[0].path, models[0].groups)
        self.frozen = _model_names(models[0].path, [models[0].frozen])
        self._places = _places(models[0].groups, self.world_size)
        self._masters = masters

    def __enter__(self) -> "DeepSpeedCheckpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self._masters = []

    def read(self, name: str) -> Tensor:
        """The full fp32 master of a trainable parameter, as a tensor of its own.

        Raises:
            CheckpointError: it has values that are NaN or infinite.
        """
        shape = self.tensors[name]
        group, offset = self._places[name]
        full = torch.empty(math.prod(shape), dtype=torch.float32)
        for rank in range(self.world_size):
            start, stop = slice_bounds(full.numel(), rank, self.world_size)
            full[start:stop] = self._masters[rank].groups[group][offset : offset + stop - start]
            # torch.isfinite would need memory of its own, as much as the tensor
            if stop > start and not all(bound.isfinite() for bound in torch.aminmax(full[start:stop])):
                path = self._masters[rank].path
                raise CheckpointError(
                    f"{path}: {name!r:.200} has values that are NaN or infinite; take an earlier save"
                )
        return full.view(shape)


def _tag_directory(directory: Path) -> Path:
    if _holds_masters(directory):
        return directory
    latest = directory / "latest"
    if not latest.is_file():
        raise CheckpointError(f"{directory}: holds no zero_pp_rank_*_optim_states.pt, and no `latest` that names them")
    try:
        with open(latest, "rb") as file:
            tag = file.read(256).decode().strip()
    except OSError as error:
        raise CheckpointError(f"{latest}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{latest}: does not name a directory: {error}") from None
    if not _TAG.fullmatch(tag) or ".." in tag:
        raise CheckpointError(f"{latest}: {tag[:80]!r} is not the name of a directory beside it")
    found = directory / tag
    if found.resolve().parent != directory.resolve():
        raise CheckpointError(f"{latest}: {tag!r} is a link out of {directory}; give the directory itself")
    if not _holds_masters(found):
        raise CheckpointError(f"{latest}: names {tag!r}, which holds no zero_pp_rank_*_optim_states.pt")
    return found


def _names(directory: Path) -> list[str]:
    try:
        return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror}") from None


def _holds_masters(directory: Path) -> bool:
    return any((match := _FILE.fullmatch(name)) and match[3] == "optim" for name in _names(directory))


def _rank_files(directory: Path, kind: str) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for match in filter(None, map(_FILE.fullmatch, _names(directory))):
        if match[3] != kind:
            continue
        path, rank = directory / match[0], int(match[1])
        if int(match[2]) != 0:
            raise CheckpointError(f"{path}: is of a model-parallel run; only data-parallel ones can be read")
        if rank in found:
            raise CheckpointError(f"{path}: is the second file of rank {rank}, beside {found[rank].name}")
        found[rank] = path
    return found


def _refuse_incomplete(directory: Path, kind: str, found: dict[int, Path], world_size: int) -> None:
    if extra := [path for rank, path in found.items() if rank >= world_size]:
        raise CheckpointError(f"{extra[0]}: is of no rank of this checkpoint, which {world_size} ranks saved")
    if len(found) < world_size:
        missing = next(rank for rank in range(world_size) if rank not in found)
        pattern = min((path.name for path in found.values()), default=f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt")
        name = re.sub(r"pp_rank_\d+", f"pp_rank_{missing}", pattern)
        raise CheckpointError(f"{directory / name}: is missing; {world_size} ranks saved this checkpoint")


def _refuse_mixed(masters: list[RankMasters], models: list[RankModel]) -> None:
    """A save into a directory that had one already, and that was cut short, leaves files of both."""
    first, world_size = models[0], masters[0].world_size
    for rank in (*masters, *models):
        if rank.world_size != world_size:
            raise CheckpointError(
                f"{rank.path}: was saved by {rank.world_size} ranks, {masters[0].path.name} by {world_size}"
            )
    for model in models:
        if model.step != first.step:
            raise CheckpointError(f"{model.path}: is of step {model.step}, {first.path.name} of step {first.step}")
        # dictionaries are equal in any order, but the order is part of the layout
        if [[*group.items()] for group in model.groups] != [[*group.items()] for group in first.groups]:
            raise CheckpointError(f"{model.path}: lists other parameters or shapes than {first.path.name}")
        if model.frozen != first.frozen:
            raise CheckpointError(f"{model.path}: lists other frozen parameters than {first.path.name}")
    for rank in masters:
        if rank.steps != masters[0].steps:
            raise CheckpointError(
                f"{rank.path}: is of optimizer step {_listed(rank.steps)}, {masters[0].path.name} of "
                f"{_listed(masters[0].steps)}"
            )
    # Fewer is sound: a run can go on with a new optimizer.
    if first.step is not None and max(masters[0].steps, default=0) > first.step:
        raise CheckpointError(
            f"{masters[0].path}: is of optimizer step {_listed(masters[0].steps)}, "
            f"{first.path.name} of step {first.step}"
        )


def _listed(steps: tuple[float, ...]) -> str:
    return " and ".join(f"{step:g}" for step in steps) or "0"


def _refuse_other_sizes(masters: list[RankMasters], model: RankModel) -> None:
    expected = [sum(_part(shape, masters[0].world_size) for shape in group.values()) for group in model.groups]
    for rank in masters:
        sizes = [group.numel() for group in rank.groups]
        for index, (size, wanted) in enumerate(itertools.zip_longest(sizes, expected, fillvalue=0)):
            if size != wanted:
                nvme = "" if size else "; masters offloaded to NVMe are not in it"
                raise CheckpointError(
                    f"{rank.path}: has {size} masters in group {index} where the shapes in {model.path.name} make "
                    f"{wanted}{nvme}"
                )


def _part(shape: tuple[int, ...], world_size: int) -> int:
    return -(-math.prod(shape) // world_size)


def _places(groups: list[Shapes], world_size: int) -> dict[str, tuple[int, int]]:
    """Parameter -> (group, where it starts in the group's flat tensor), the same on every rank."""
    places = {}
    for index, group in enumerate(groups):
        offset = 0
        for name, shape in group.items():
            places[name.removeprefix("module.")] = (index, offset)
            offset += _part(shape, world_size)
    return places


def _model_names(path: Path, groups: list[Shapes]) -> Shapes:
    named: Shapes = {}
    for name, shape in (item for group in groups for item in group.items()):
        if (short := name.removeprefix("module.")) in named:
            raise CheckpointError(f"{path}: lists {short!r:.200} twice")
        named[short] = shape
    return named
