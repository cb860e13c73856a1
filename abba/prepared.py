"""Files written beside their place and put there whole, and what killed writers leave; files that say their own hash,
which one start makes and later ones use, of any run.
"""

import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from abba.storage import Spec, write_safetensors

KILLED_WHILE_WRITING_SECONDS = 3600  # what was last written so long ago has no writer any more


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to be written within: at the end it takes the place of `path`, or after an error is gone."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError, ValueError):  # the first error says more
            temporary.unlink(missing_ok=True)
        raise


def write_prepared(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that can be verified. It appears whole or not at all; of two writers the later stays.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    layout = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    remove_leftovers(path.parent, f".{path.name.partition('-')[0]}-*.tmp-*")
    with replacing(path) as temporary:
        write_safetensors(
            temporary, layout, tensors.values(), {**metadata, "sha256": content_digest(tensors, metadata)}
        )


def content_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The SHA-256 that a prepared file says of itself: of its metadata's values and its tensors' bytes."""
    found = hashlib.sha256("".join(metadata.values()).encode())
    for name in sorted(tensors):
        found.update(memoryview(tensors[name].contiguous().flatten().view(torch.uint8).numpy()))
    return found.hexdigest()


def remove_leftovers(parent: Path, pattern: str) -> None:
    """Delete the temporary files and directories in `parent`, of names like `pattern`, whose writers were killed."""
    for old in parent.glob(pattern):
        with suppress(OSError):  # another start removes them too, or they are another user's
            if not _has_writer(old):
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()


def _has_writer(temporary: Path) -> bool:
    """By its last write and, where the name has one (.NAME.tmp-PID-...), by whether such a process lives here."""
    process = temporary.name.rpartition(".tmp-")[2].partition("-")[0]
    if process.isdecimal() and Path("/proc", process).exists():  # it may be stopped, or read what it has written
        return True
    written = max(path.lstat().st_mtime for path in (temporary, *temporary.rglob("*")))
    return time.time() - written <= KILLED_WHILE_WRITING_SECONDS
