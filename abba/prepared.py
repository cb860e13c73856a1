"""Files that one start makes and later ones use, of any run: whole or absent, and saying their own hash."""

import hashlib
import os
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from abba.storage import Spec, write_safetensors

KILLED_WHILE_WRITING_SECONDS = 3600  # a temporary file that is so old has no writer any more


def write_prepared(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that can be verified. It appears whole or not at all; of two writers the later stays.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    layout = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    try:
        _remove_leftovers(path)
        write_safetensors(
            temporary, layout, tensors.values(), {**metadata, "sha256": content_digest(tensors, metadata)}
        )
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def content_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The SHA-256 that a prepared file says of itself: of its metadata's values and its tensors' bytes."""
    found = hashlib.sha256("".join(metadata.values()).encode())
    for name in sorted(tensors):
        found.update(memoryview(tensors[name].contiguous().flatten().view(torch.uint8).numpy()))
    return found.hexdigest()


def _remove_leftovers(path: Path) -> None:
    kind = path.name.partition("-")[0]
    for old in path.parent.glob(f".{kind}-*.tmp-*"):
        with suppress(FileNotFoundError):  # another start removes them too
            if time.time() - old.stat().st_mtime > KILLED_WHILE_WRITING_SECONDS:
                old.unlink()
