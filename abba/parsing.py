"""JSON and safetensors headers from files that anybody may have written: their size, form and numbers are checked
before anything of the size that they speak of is allocated.

Format: https://github.com/huggingface/safetensors#format
"""

import gc
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# JSON takes up to 30 times its size in memory. A shard of a 405B model's adapter needs 1.6 MB and 32,000 brackets.
MAX_JSON_BYTES, MAX_BRACKETS, MAX_DIGITS, MAX_DIMENSIONS = 4_000_000, 100_000, 40, 16


class StoredTensor(NamedTuple):
    """Where a tensor lies in its file: dtype, shape and the offset of its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Trees of JSON hold no cycles; looking for some while they grow takes two thirds of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_collector_paused()
def parse_json(data: bytes) -> Any:
    """Raises ValueError: too large, not JSON, nested too deeply, a key twice in an object, a number without end."""
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"{len(data)} bytes of JSON; at most {MAX_JSON_BYTES} are read")
    if data.count(b"[") + data.count(b"{") > MAX_BRACKETS:
        raise ValueError(f"more than {MAX_BRACKETS} lists and objects")
    try:
        return json.loads(data.decode(), object_pairs_hook=_without_duplicates, parse_int=_bounded_integer)
    except RecursionError:
        raise ValueError("nested too deeply") from None


@_collector_paused()
def parse_header(data: bytes, length: int) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """(metadata, tensors in the order of their bytes) of a safetensors header.

    Args:
        data: the header's JSON.
        length: bytes that follow the header; the tensors must fill them without gap or overlap.

    Raises:
        ValueError: anything else than that.
    """
    header = parse_json(data)
    if not isinstance(header, dict):
        raise ValueError("is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ does not map text to text")
    spans = sorted((*_span(name, entry), name) for name, entry in header.items())
    tensors, expected = {}, 0
    for begin, end, name in spans:
        dtype, shape = STORED_DTYPES[header[name]["dtype"]], tuple(header[name]["shape"])
        if begin != expected or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name[:200]!r} does not lie where its shape and neighbours say")
        tensors[name] = StoredTensor(dtype, shape, 8 + len(data) + begin)
        expected = end
    if expected != length:
        raise ValueError(f"it describes {expected} bytes of tensors where {length} follow; the file is truncated")
    return metadata, tensors


def _span(name: str, entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name[:200]!r} is not described by dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in STORED_DTYPES:
        raise ValueError(f"tensor {name[:200]!r} has the unknown dtype {str(entry['dtype'])[:50]!r}")
    for key, lengths in (("shape", range(MAX_DIMENSIONS + 1)), ("data_offsets", (2,))):
        value = entry[key]
        # type() and not isinstance: true is an int too
        if not isinstance(value, list) or len(value) not in lengths or any(type(n) is not int or n < 0 for n in value):
            raise ValueError(f"tensor {name[:200]!r} has no valid {key}")
    begin, end = entry["data_offsets"]
    return begin, end


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    whole = dict(pairs)
    if len(whole) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{twice[:200]!r} stands twice in one object")
    return whole


def _bounded_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
