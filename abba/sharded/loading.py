"""Base weights under ZeRO-3: every rank reads its own slice of every tensor, and nobody sends or holds a whole model.

A parameter is partitioned the moment it is created, uninitialised; then rank r of N fills its partition with elements
[r*part, (r+1)*part) of the flattened tensor, which are one contiguous range of the safetensors file.

With hierarchical partitioning (zero_hpz_partition_size) the ranks of each node hold a further copy of every weight
between them, from which forward and backward gather. It is read from disk in the same way.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import Init
from torch import Tensor, nn

from abba.base_files import BaseFiles
from abba.checkpoint.slices import slice_bounds
from abba.errors import CheckpointError

BLOCK = 2**21  # elements read at a time: what a rank needs beyond its partition does not grow with the tensors
TRAINABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class _PartitionWithoutBroadcast(Init):
    """zero.Init sends rank 0's uninitialised values of every new parameter to all; ours are read from disk instead."""

    def _zero_init_param(self, param: nn.Parameter) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()


@contextmanager
def partitioned_from_birth(engine_config: dict) -> Iterator[None]:
    """Parameters created within are ZeRO-3 partitions with undefined values, in the dtype of `engine_config`."""
    # zero.Init has a dtype argument of its own, which it ignores on devices without fp16.
    with _PartitionWithoutBroadcast(config_dict_or_path=engine_config):
        yield


@dataclass(frozen=True)
class LoadReport:
    """What was read. Tensors, elements and checksum over all ranks; bytes by this rank; how many ranks hold a further
    copy between them, or 0; tensors that have no use."""

    tensors: int
    elements: int
    checksum: int
    bytes_read: int
    copy_ranks: int
    ignored: tuple[str, ...]


def load_base(model: nn.Module, directory: Path, rank: int, world_size: int) -> LoadReport:
    """Fill this rank's partitions of a partitioned model from the safetensors files in `directory`.

    Every tensor of the files is consumed exactly once or named in the report. The checksum of what is resident, summed
    over ranks, must equal that of what was read; it is the same at any world size and identifies the base. The further
    copies of hierarchical partitioning must add up to it too, once for each node.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape; a file is truncated; tied weights
            differ; the checksums differ.
    """
    with BaseFiles(directory) as checkpoint:
        places = _match_names(model, checkpoint)
        read_sum, bytes_read, elements, untied = 0, 0, 0, 0

        def read(name: str, start: int, stop: int) -> Tensor:
            nonlocal bytes_read, untied
            values = checkpoint.read(name, start, stop)
            bytes_read += values.nbytes
            for alias in places.aliases.get(name, ()):
                same = checkpoint.read(alias, start, stop)
                bytes_read += same.nbytes
                untied += not torch.equal(same, values)
            return values

        for name, parameter in places.parameters.items():
            count, bits = _fill(_shares(parameter, rank, world_size), partial(read, name))
            elements += count
            read_sum += bits
        for name, buffer in places.buffers.items():
            buffer.copy_(checkpoint.read(name, 0, buffer.numel()).view(buffer.shape))
    held = [_shares(parameter, rank, world_size) for parameter in places.parameters.values()]
    resident_sum = sum(_bit_sum(place.data[: stop - start]) for *_, (place, start, stop) in held)
    copies_sum = sum(_bit_sum(place.data[: stop - start]) for *copy, _ in held for place, start, stop in copy)
    device = next(model.parameters()).device
    totals = torch.tensor([elements, read_sum, resident_sum, copies_sum, untied], device=device)
    dist.all_reduce(totals)
    elements, read_sum, resident_sum, copies_sum, untied = totals.tolist()
    if untied:
        pairs = "; ".join(f"{name} and {', '.join(others)}" for name, others in places.aliases.items())
        raise CheckpointError(
            f"{directory}: config.json ties weights that differ in the files ({pairs}); "
            "set tie_word_embeddings to false in config.json"
        )
    expected = sum(p.ds_numel for p in places.parameters.values())
    any_one = next(iter(places.parameters.values()))
    copy_ranks = any_one.ds_secondary_tensor_group_size if any_one.ds_secondary_tensor is not None else 0
    checksum, on_nodes = resident_sum % 2**64, world_size // copy_ranks if copy_ranks else 0
    if elements != expected or read_sum != resident_sum or copies_sum % 2**64 != on_nodes * checksum % 2**64:
        raise CheckpointError(
            f"{directory}: {elements} of {expected} elements were loaded, with checksum {resident_sum} instead of "
            f"{read_sum} as read, and {copies_sum} in {on_nodes} further copies; the memory of a node is faulty"
        )
    return LoadReport(len(places.parameters), elements, checksum, bytes_read, copy_ranks, tuple(places.ignored))


def _shares(parameter: nn.Parameter, rank: int, world_size: int) -> list[tuple[Tensor, int, int]]:
    """(where, start, stop) of what a rank holds of a flattened parameter; its slice of the one whole copy comes last.

    With zero_hpz_partition_size, its slice of the node's copy comes first: as many elements as those of so many
    consecutive ranks as there are nodes.
    """
    shares = [(parameter.ds_tensor, *slice_bounds(parameter.ds_numel, rank, world_size))]
    if parameter.ds_secondary_tensor is not None:
        nodes = parameter.ds_secondary_tensor_num_of_groups
        first = rank % parameter.ds_secondary_tensor_group_size * nodes
        start, _ = slice_bounds(parameter.ds_numel, first, world_size)
        _, stop = slice_bounds(parameter.ds_numel, first + nodes - 1, world_size)
        shares.insert(0, (parameter.ds_secondary_tensor, start, stop))
    return shares


def _fill(shares: list[tuple[Tensor, int, int]], read: Callable[[int, int], Tensor]) -> tuple[int, int]:
    """Fill each share, and its padding with zeros; (elements, checksum as read) of the last."""
    elements = checksum = 0
    for start, stop in _blocks(shares):
        values = read(start, stop).to(shares[-1][0].dtype)
        for place, low, high in shares:
            mine = values[max(low - start, 0) : max(high - start, 0)]
            place.data[max(start - low, 0) :][: mine.numel()].copy_(mine)
        elements += mine.numel()
        checksum += _bit_sum(mine)
    for place, low, high in shares:
        place.data[high - low :].zero_()
    return elements, checksum


def _blocks(shares: list[tuple[Tensor, int, int]]) -> Iterator[tuple[int, int]]:
    """(start, stop) of what to read at a time. Shares are whole slices: one lies within another or apart from it."""
    low = high = 0
    for _, first, last in shares:
        if not low <= first <= last <= high:
            for start in range(first, last, BLOCK):
                yield start, min(start + BLOCK, last)
            low, high = first, last


@dataclass
class _Places:
    parameters: dict[str, nn.Parameter]  # by the name in the file
    aliases: dict[str, list[str]]  # further names of a tied parameter in the files
    buffers: dict[str, Tensor]
    ignored: list[str]


def _match_names(model: nn.Module, checkpoint: BaseFiles) -> _Places:
    """Pair the model's parameters with the files' tensors, and account for every one of both."""
    aliases: dict[int, list[str]] = {}  # tied parameters have several names
    by_id: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
        by_id[id(parameter)] = parameter
    left, places, missing = checkpoint.names, _Places({}, {}, {}, []), []
    for key, names in aliases.items():
        found = [name for name in names if name in left]
        if not found:
            missing.append(names[0])
            continue
        _check_shape(checkpoint, found[0], by_id[key].ds_shape)
        places.parameters[found[0]] = by_id[key]
        if found[1:]:
            places.aliases[found[0]] = found[1:]
            for alias in found[1:]:
                _check_shape(checkpoint, alias, by_id[key].ds_shape)
        places.ignored += [f"{name} (the same as {found[0]}, to which it is tied)" for name in found[1:]]
        left -= set(found)
    for name, buffer in _persistent_buffers(model).items():
        if name in left:
            _check_shape(checkpoint, name, buffer.shape)
            places.buffers[name] = buffer
            left.discard(name)
    if missing:
        raise CheckpointError(
            f"{checkpoint.directory}: {len(missing)} tensors of the model are missing, such as {missing[0]}; "
            "the files are incomplete or of another architecture"
        )
    harmless = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    harmless.append(re.compile(r"rotary_emb\.inv_freq$"))  # recomputed; written by early Llama conversions
    for name in sorted(left):
        if not any(pattern.search(name) for pattern in harmless):
            raise CheckpointError(
                f"{checkpoint.directory}: {len(left)} tensors have no place in the model, such as {name}; "
                "config.json is of another architecture"
            )
        places.ignored.append(f"{name} (not used by this architecture)")
    return places


def _check_shape(checkpoint: BaseFiles, name: str, shape: torch.Size) -> None:
    stored = checkpoint.stored(name)
    if tuple(stored.shape) != tuple(shape):
        raise CheckpointError(
            f"{checkpoint.directory}: {name} is {stored.shape} in the file and {tuple(shape)} in the model; "
            "config.json and the weights do not belong together"
        )
    if stored.dtype not in TRAINABLE_DTYPES:
        raise CheckpointError(
            f"{checkpoint.directory}: {name} is stored as {stored.dtype}; only bf16, fp16 and fp32 bases can be trained"
        )


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _bit_sum(values: Tensor) -> int:
    """Sum of the values' bit patterns as integers: exact, and the same in any order."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    parts = values.detach().view(whole).split(2**17)  # a CPU makes int64 of what it adds up, four times as much
    return int(sum(part.sum(dtype=torch.int64) for part in parts))
