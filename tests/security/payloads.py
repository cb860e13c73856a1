"""Files that run code when they are opened carelessly: what they run leaves a canary."""

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import torch

from abba.checkpoint.manifest import write_manifest
from abba.storage import hash_file


class _Touch:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


def raw(canary: Path) -> bytes:
    return pickle.dumps(_Touch(canary), protocol=0)


def binary(canary: Path) -> bytes:
    return pickle.dumps({"state_dict": _Touch(canary)}, protocol=4)


def torch_zip(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2), "hook": _Touch(canary)}, buffer)
    return buffer.getvalue()


def torch_legacy(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save([_Touch(canary)], buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def numpy_object(canary: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([_Touch(canary)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


PICKLES = {
    "pickle": raw,
    "pickle-4": binary,
    "torch-zip": torch_zip,
    "torch-legacy": torch_legacy,
    "numpy": numpy_object,
}


def open_carelessly(data: bytes) -> None:
    """What none of our programs does."""
    if data.startswith(b"\x93NUMPY"):
        np.load(io.BytesIO(data), allow_pickle=True)
    elif data.startswith(b"PK"):
        torch.load(io.BytesIO(data), weights_only=False)
    else:
        stream = io.BytesIO(data)
        while stream.tell() < len(data):  # torch's old format is several pickles in a row
            pickle.load(stream)


def seal(checkpoint: Path) -> None:
    """Make a checkpoint's manifest true of its files, as someone who can write there would."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = {name: hash_file(checkpoint / name) for name in manifest["files"]}
    write_manifest(checkpoint, manifest["step"], manifest["world_size"], files)


def tree(root: Path) -> list[str]:
    """Every name below `root`."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))
