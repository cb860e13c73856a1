"""The manifest of a checkpoint: which files belong to it, their sizes and SHA-256, and its own."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abba.errors import CheckpointError
from abba.storage import FileEntry, json_bytes, read_json, write_json

FORMAT_VERSION = 2
MANIFEST, STATE = "manifest.json", "state.json"
STEP_NAME = re.compile(r"step-(\d{6,})")


def shard_name(rank: int, world_size: int) -> str:
    return f"shard-{rank:05d}-of-{world_size:05d}.safetensors"


def write_manifest(directory: Path, step: int, world_size: int, files: Mapping[str, FileEntry]) -> None:
    """Written last, when all of `files` are on disk."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "world_size": world_size,
        "files": {name: entry._asdict() for name, entry in files.items()},
    }
    write_json(directory / MANIFEST, {**manifest, "sha256": _hash_of(manifest)})


def read_manifest(directory: Path) -> dict[str, FileEntry]:
    """Size and SHA-256 of each other file.

    Raises:
        CheckpointError: there is none, or it is not as it was written.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: is no directory")
    raw = read_json(directory / MANIFEST)
    try:
        if raw["format_version"] != FORMAT_VERSION:
            raise ValueError(f"only version {FORMAT_VERSION} can be read")
        unchanged = (directory / MANIFEST).read_bytes() == json_bytes(raw)
        if raw.pop("sha256") != _hash_of(raw) or not unchanged:
            raise ValueError("it was changed after it was written")
        files = {name: FileEntry(int(entry["size"]), str(entry["sha256"])) for name, entry in raw["files"].items()}
        if len(files) != int(raw["world_size"]) + 1:  # before the names of a world that never was are built
            raise ValueError(f"it lists {len(files)} files for {raw['world_size']} shards and {STATE}")
        expected = {shard_name(rank, raw["world_size"]) for rank in range(int(raw["world_size"]))} | {STATE}
        if files.keys() != expected:
            raise ValueError(f"it does not list exactly the {raw['world_size']} shards and {STATE}")
        match = STEP_NAME.fullmatch(directory.name.removesuffix(".tmp"))
        if match and int(match[1]) != raw["step"]:
            raise ValueError(f"it belongs to step {raw['step']}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{directory / MANIFEST}: is not its manifest: {error}") from error
    return files


def _hash_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_bytes(manifest)).hexdigest()
