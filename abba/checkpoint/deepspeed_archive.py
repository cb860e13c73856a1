"""The two files that each rank writes into a DeepSpeed ZeRO-3 checkpoint, opened without trusting them.

torch.save makes them zip archives: `data.pkl`, a pickle that describes the objects, a record of bytes per storage. A
pickle may call any function of the machine that opens it, and DeepSpeed opens its own with every call allowed. Here
torch's restricted unpickler does it: it calls those of its functions that rebuild tensors, and the stand-ins below.
"""

import contextlib
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abba.errors import CheckpointError, first_line

# Every class of its own that DeepSpeed 0.19 stores; the last is stage 2's, which is then refused for being stage 2.
DEEPSPEED_CLASSES = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
MAX_RECORD_BYTES = 100_000_000  # of what is no tensor: it is read into memory
MASTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # all become fp32 unchanged

Shapes = dict[str, tuple[int, ...]]


class StandIn:
    """Takes the place of an object of DeepSpeed's: keeps the arguments it was stored with and does nothing."""

    __slots__ = ("arguments",)

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True)
class RankMasters:
    """One rank's optim_states: a flat tensor per group of parameters, mapped from the file."""

    path: Path
    world_size: int
    steps: tuple[float, ...]  # the optimizer's own counters
    groups: list[Tensor]


@dataclass(frozen=True)
class RankModel:
    """One rank's model_states: what the flat tensors hold, in their order."""

    path: Path
    world_size: int
    step: int | None
    groups: list[Shapes]
    frozen: Shapes


def read_masters(path: Path) -> RankMasters:
    """Raises CheckpointError when the file is damaged, would run code, or is of another ZeRO stage."""
    content = _load(path, check_tensors=True)
    with _as_described(path):
        state = _field(content, "optimizer_state_dict", dict)
        stage = dict.get(state, "zero_stage")
        stage = stage.arguments[0] if isinstance(stage, StandIn) else stage
        if stage != 3:
            raise ValueError(f"it is of ZeRO stage {stage!r:.40}, only 3 can be read")
        groups = [_flat(group) for group in _field(state, "fp32_flat_groups", list)]
        return RankMasters(path, _count(state, "partition_count", 1), _optimizer_steps(state), groups)


def read_model(path: Path) -> RankModel:
    """Raises CheckpointError when the file is damaged or would run code."""
    content = _load(path, check_tensors=False)
    with _as_described(path):
        groups = [_shapes(group, 1) for group in _field(content, "param_shapes", list)]
        world_size = _count(content, "dp_world_size", 1)
        step = None if dict.get(content, "global_steps") is None else _count(content, "global_steps", 0)
        frozen = dict.get(content, "frozen_param_shapes")
        return RankModel(path, world_size, step, groups, {} if frozen is None else _shapes(frozen, 0))


def _load(path: Path, check_tensors: bool) -> Any:
    """The stored object, its tensors mapped and not copied. It can hold anything that torch rebuilds, anywhere."""
    _check_records(path, check_tensors)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(StandIn, n) for n in DEEPSPEED_CLASSES]):
            warnings.simplefilter("ignore")  # they tell how to trust the file
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a hostile file can make torch raise anything
        raise CheckpointError(f"{path}: {_reason(error)}") from None


def _check_records(path: Path, check_tensors: bool) -> None:
    """Compare the archive's own checksums: of everything, or without the tensors, which are then not read at all."""
    if not path.is_file():
        raise CheckpointError(f"{path}: is no file; fetch the whole checkpoint again")
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                root, _, name = record.filename.partition("/")
                if root not in (path.stem, "archive"):
                    raise ValueError(f"it was written as {root}.pt and renamed")
                if record.compress_type != zipfile.ZIP_STORED:  # torch compresses nothing
                    raise ValueError(f"record {name!r} is compressed")
                is_tensor = name.startswith("data/")
                if not is_tensor and record.file_size > MAX_RECORD_BYTES:
                    raise ValueError(f"record {name!r} has {record.file_size} bytes, more than {MAX_RECORD_BYTES}")
                if check_tensors or not is_tensor:
                    with archive.open(record) as file:
                        while file.read(1 << 20):  # raises at its end where the checksum differs
                            pass
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or first_line(error)}") from None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is truncated, damaged or no archive of torch.save ({first_line(error)[:200]}); fetch it again"
        ) from None


def _reason(error: Exception) -> str:
    """What torch says, without its advice to load the file with every call allowed."""
    text = str(error)
    if named := re.search(r"GLOBAL (\S+)", text):
        return (
            f"asks for {named[1]!r:.100}, which is no part of a ZeRO-3 checkpoint; refused, nothing of it was run. "
            "DeepSpeed's own zero_to_fp32.py runs what a file asks for: only if you trust where it comes from"
        )
    told = re.sub(r"\A.*(WeightsUnpickler error:|Weights only load failed\.)", "", text, flags=re.DOTALL)
    return f"is not what DeepSpeed writes: {first_line(ValueError(told))[:200]!r}; refused, nothing of it was run"


@contextlib.contextmanager
def _as_described(path: Path) -> Iterator[None]:
    try:
        yield
    except (AttributeError, IndexError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is not what DeepSpeed ZeRO-3 writes: {first_line(error)[:300]}") from None


def _field(content: Any, key: str, kind: type) -> Any:
    value = dict.get(content, key)  # not content.get: a stored OrderedDict may bring attributes of its own
    if not isinstance(value, kind):
        raise ValueError(f"{key} is {type(value).__name__}, not {kind.__name__}")
    return value


def _count(content: Any, key: str, minimum: int) -> int:
    value = dict.get(content, key)
    if type(value) is not int or value < minimum:
        raise ValueError(f"{key} is {value!r:.80}, not a whole number from {minimum} on")
    return value


def _shapes(stored: Any, minimum: int) -> Shapes:
    shapes: Shapes = {}
    for name, size in dict.items(stored):
        if type(name) is not str or not isinstance(size, tuple) or any(type(n) is not int or n < minimum for n in size):
            raise ValueError(f"parameter {name!r:.80} has the shape {size!r:.80}")
        shapes[name] = tuple(size)
    return shapes


def _flat(stored: Any) -> Tensor:
    tensor = Tensor.detach(stored)  # not stored.detach, as in _field
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError("a group of masters is no plain tensor")
    if tensor.ndim != 1 or tensor.dtype not in MASTER_DTYPES:
        raise ValueError(f"a group of masters is {tuple(tensor.shape)} {tensor.dtype}, not one flat row in fp32")
    return tensor


def _optimizer_steps(state: Any) -> tuple[float, ...]:
    """How often the optimizer has updated each group of masters, where it counts that, as every Adam does.

    Counters in `param_groups` mean something else: DeepSpeed calls the optimizer once per group of masters.
    """
    counted = dict.values(_field(_field(state, "optimizer_state_dict", dict), "state", dict))
    return tuple(sorted({float(entry["step"]) for entry in counted if "step" in entry}))
