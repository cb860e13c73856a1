"""Files that are whole or absent: safetensors written and read in pieces, JSON, fsync and rename.

The safetensors library's own writer holds a whole file in memory and its reader hides where bytes lie; sharded
checkpoints need neither. The format is the library's, to the byte: https://github.com/huggingface/safetensors#format
"""

import errno
import hashlib
import json
import math
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abba.errors import AbbaError, CheckpointError
from abba.parsing import MAX_JSON_BYTES, STORED_DTYPES, StoredTensor, parse_header, parse_json

DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
_NO_PATH = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)  # nothing is there, or can be


class Spec(NamedTuple):
    """Shape and dtype of a tensor that is about to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class FileEntry(NamedTuple):
    """Size in bytes and SHA-256 of a file, computed while it was written."""

    size: int
    sha256: str


class _HashingFile:
    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  closed by __exit__
        self._digest, self._size = hashlib.sha256(), 0

    def __enter__(self) -> "_HashingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes | memoryview) -> None:
        data = memoryview(data).cast("B")
        self._digest.update(data)
        self._size += len(data)
        while data:  # a raw file may take less than it is given
            data = data[self._file.write(data) :]

    def synced(self) -> FileEntry:
        """What was written, once it is on disk."""
        os.fsync(self._file.fileno())
        return FileEntry(self._size, self._digest.hexdigest())


def write_safetensors(
    path: Path, layout: Mapping[str, Spec], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> FileEntry:
    """Write tensors one at a time, in the order of `layout`, hashing on the way; the file is on disk on return."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in layout.items():
        stop = offset + math.prod(spec.shape) * spec.dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _HashingFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, spec), tensor in zip(layout.items(), tensors, strict=True):
            if tuple(tensor.shape) != tuple(spec.shape) or tensor.dtype != spec.dtype:
                raise ValueError(f"{name}: got {tuple(tensor.shape)} {tensor.dtype}, the layout says {spec}")
            if tensor.numel():
                file.write(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
        return file.synced()


class SafetensorsFile:
    """A safetensors file whose header was checked before anything is allocated; reads ranges with one preadv each.

    Raises:
        CheckpointError: the file is missing, truncated, or its header does not describe exactly its bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = open_regular(path)
        try:
            size = os.fstat(self._descriptor).st_size
            self.metadata, self.tensors = self._parse_header(size)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of the flattened tensor `name`, as a new 1-D tensor on the CPU."""
        stored = self.tensors[name]
        stop = stored.numel if stop is None else stop
        values = torch.empty(stop - start, dtype=stored.dtype)
        left, offset = memoryview(values.view(torch.uint8).numpy()), stored.offset + start * stored.dtype.itemsize
        while left:  # Linux reads at most 2 GiB in one call
            with _readable(self.path):
                count = os.preadv(self._descriptor, [left], offset)
            if count == 0:
                raise CheckpointError(f"{self.path}: ends inside tensor {name}; the file is truncated, fetch it again")
            left, offset = left[count:], offset + count
        return values

    def read_full(self, name: str) -> Tensor:
        return self.read(name).view(self.tensors[name].shape)

    def _parse_header(self, size: int) -> tuple[dict[str, str], dict[str, StoredTensor]]:
        with _readable(self.path):
            length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if size < 8 or length > min(MAX_JSON_BYTES, size - 8):
            raise CheckpointError(
                f"{self.path}: is truncated or no safetensors file ({size} bytes, its header would need {length + 8})"
            )
        try:
            with _readable(self.path):
                header = os.pread(self._descriptor, length, 8)
            return parse_header(header, size - 8 - length)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: has a damaged header: {error}; fetch the file again") from error


def json_bytes(value: Any) -> bytes:
    """A JSON value as `write_json` writes it: there is one way, so that every changed byte can be noticed."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_json(path: Path, value: Any) -> FileEntry:
    with _HashingFile(path) as file:
        file.write(json_bytes(value))
        return file.synced()


def read_json(path: Path) -> Any:
    """Raises CheckpointError when the file cannot be read, is not JSON, or is more than any of ours would be."""
    with _readable(path), os.fdopen(open_regular(path), "rb") as file:
        try:
            return parse_json(file.read(MAX_JSON_BYTES + 1))
        except ValueError as error:
            raise CheckpointError(f"{path}: is not JSON that can be used: {error}") from error


def hash_file(path: Path) -> FileEntry:
    """Raises CheckpointError when the file cannot be read."""
    digest, size = hashlib.sha256(), 0
    with _readable(path), os.fdopen(open_regular(path), "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return FileEntry(size, digest.hexdigest())


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """A disk or a network file system that fails while an open file is read: the error alone would name no file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def open_regular(path: Path) -> int:
    """A descriptor for reading. A pipe in a file's place would be waited for, a directory or device read.

    Raises:
        CheckpointError: it cannot be opened or is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: cannot be opened: {reason}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: is no regular file")
    return descriptor


def sync_directory(path: Path) -> None:
    """Make renames and new names inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_directory(temporary: Path, final: Path) -> None:
    """Give a finished directory its name; one that stands there already is replaced.

    That one's name until it is deleted is of those that `abba.prepared.remove_leftovers` finds after a kill.
    """
    sync_directory(temporary)
    displaced = None
    if final.exists():
        displaced = final.with_name(f".{final.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        os.rename(final, displaced)
    os.rename(temporary, final)
    sync_directory(final.parent)
    if displaced is not None:
        shutil.rmtree(displaced)


def free_bytes(path: Path) -> int:
    """What a user may still write on the file system of `path`; 0 when it is gone."""
    try:
        status = os.statvfs(path)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def in_gb(size: int) -> str:
    """A size for people: 1.23 GB, 4.5 MB, 678 kB."""
    if size >= 1e8:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def is_there(path: Path, error: type[AbbaError] = CheckpointError) -> bool:
    """Whether a user's path exists; one that no file can have does not. Raises `error` if it may not be looked at."""
    try:
        path.stat()
    except (OSError, ValueError) as failure:  # a ValueError for a NUL
        if isinstance(failure, OSError) and failure.errno not in _NO_PATH:
            way_out = "change its permissions or give another path"
            raise error(f"{path}: cannot be looked at: {failure.strerror}; {way_out}") from failure
        return False
    return True


def is_file(path: Path, error: type[AbbaError] = CheckpointError) -> bool:
    """Whether it is there and a regular file; raises as `is_there`, where Path.is_file raises an OSError."""
    return is_there(path, error) and path.is_file()


def make_directory(path: Path, purpose: str) -> None:
    """Create a directory that we are about to write to.

    Raises:
        CheckpointError: it cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{purpose} {path}: cannot be written: {reason}; choose another place or change its permissions"
        ) from error
