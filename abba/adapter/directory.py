"""The directory of a finished adapter or merged model: what its abba_config.json says, and how it gets its name.

abba_config.json marks it as ours: what PEFT and transformers have no field for, and what made it.
"""

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from abba.adapter.config import AdapterConfig, MethodConfig, config_from
from abba.errors import CheckpointError, RecipeError
from abba.prepared import remove_leftovers
from abba.storage import is_file, is_there, make_directory, publish_directory, read_json, write_json

WEIGHTS, PEFT_CONFIG, ABBA_CONFIG, CARD = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "abba_config.json",
    "README.md",
)
ADAPTER_FORMATS, MERGED, FULL = ("loha", "lora", "dora", "hira"), "merged", "full"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class KeptEnergy:
    """Share of ||delta W||_F^2 that a truncated LoRA keeps: over all modules, and where it keeps least."""

    overall: float
    worst: float
    worst_module: str


@dataclass(frozen=True)
class AdapterDescription:
    """abba_config.json: everything about an adapter but its numbers."""

    config: MethodConfig
    format: str  # one of ADAPTER_FORMATS, MERGED, or FULL: a model that was trained whole
    modules: dict[str, tuple[int, int]]  # name -> (out, in)
    base_model: str | None
    rank: int | None = None  # of a LoRA that was truncated; None: r1*r2, exact
    dtype: str | None = None  # of what is stored; None in a merged model: as in the base
    kept_energy: KeptEnergy | None = None  # of a truncated LoRA
    provenance: dict[str, Any] | None = None  # step, fingerprint, recipe; see FactorSource

    @property
    def lora_rank(self) -> int:
        return self.rank or self.config.lora_rank

    @property
    def base_revision(self) -> str | None:
        """The one that the training's recipe pinned, of the base that it names."""
        model = ((self.provenance or {}).get("recipe") or {}).get("model") or {}
        return model.get("revision") if model.get("name_or_path") == self.base_model else None


def write_description(directory: Path, description: AdapterDescription) -> None:
    write_json(
        directory / ABBA_CONFIG,
        {"format_version": FORMAT_VERSION, **asdict(description), **_scale(description.config)},
    )


def _scale(config: MethodConfig) -> dict[str, float]:
    return {"scale": config.scale} if isinstance(config, AdapterConfig) else {}


def read_description(directory: Path) -> AdapterDescription:
    """Raises CheckpointError when the directory is no adapter of ours."""
    if not is_file(directory / ABBA_CONFIG):
        raise CheckpointError(
            f"{directory}: is not an ABBA adapter: it has no {ABBA_CONFIG} (a run's adapter is RUN/adapter)"
        )
    raw = read_json(directory / ABBA_CONFIG)
    formats = (*ADAPTER_FORMATS, MERGED, FULL)
    try:
        if raw["format_version"] != FORMAT_VERSION or raw["format"] not in formats:
            raise CheckpointError(
                f"{directory / ABBA_CONFIG}: version {raw['format_version']}, form {raw['format']!r}; "
                f"this program reads version {FORMAT_VERSION}, {' or '.join(formats)}"
            )
        config = config_from(raw["config"])
        rank, kept = raw.get("rank"), raw.get("kept_energy")
        if raw["format"] not in forms_of(config):
            raise ValueError(f"{config.method} in {raw['format']} form")
        if not isinstance(raw["base_model"], str | None):
            raise ValueError(f"base_model {raw['base_model']!r}")
        if rank is not None and not (isinstance(config, AdapterConfig) and 1 <= rank <= config.lora_rank):
            raise ValueError(f"rank {rank}")
        return AdapterDescription(
            config,
            raw["format"],
            {str(name): (int(out), int(into)) for name, (out, into) in raw["modules"].items()},
            raw["base_model"],
            rank,
            raw.get("dtype"),
            KeptEnergy(**kept) if kept is not None else None,
            _checked_provenance(raw.get("provenance")),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecipeError) as error:
        raise CheckpointError(f"{directory / ABBA_CONFIG}: does not describe an adapter: {error!r}") from error


def _checked_provenance(raw: Any) -> dict[str, Any] | None:
    """As a run writes it, where it says anything: sections, which recipe and fingerprint are made of too."""
    parts = [(raw or {}).get(key) for key in ("recipe", "fingerprint")]
    sections = [raw, *parts, *((part or {}).get(key) for part in parts for key in ("model", "data"))]
    if not all(section is None or isinstance(section, dict) for section in sections):
        raise ValueError("its provenance is not made of sections")
    return raw


def forms_of(config: MethodConfig) -> tuple[str, ...]:
    """The forms that a method's result can have, the one that a run leaves first."""
    return ("loha", "lora", MERGED) if isinstance(config, AdapterConfig) else (config.default_format,)


def refuse_occupied(directory: Path, overwrite: bool) -> None:
    """
    Raises:
        CheckpointError: `directory` holds what is no adapter, or is not to be replaced, or cannot be read; or it is a
            mount point, which cannot be renamed.
    """
    if os.path.ismount(directory):
        raise CheckpointError(f"adapter directory {directory}: is a mount point; name a directory inside it")
    try:
        if not is_there(directory) or (directory.is_dir() and not any(directory.iterdir())):
            return
    except OSError as error:
        reason = f"cannot be read: {error.strerror}; choose another or change its permissions"
        raise CheckpointError(f"adapter directory {directory}: {reason}") from error
    if not is_file(directory / ABBA_CONFIG):
        raise CheckpointError(
            f"adapter directory {directory}: holds something that is no adapter; move it away, or choose another"
        )
    if not overwrite:
        way_out = "choose another or pass --force (in Python overwrite=True)"
        raise CheckpointError(f"adapter directory {directory}: is not empty; {way_out}")


@contextmanager
def written_whole(directory: Path, overwrite: bool) -> Iterator[Path]:
    """A directory beside `directory` to write into; it takes that name if the block succeeds and is deleted if not.

    What killed processes left of such directories, each perhaps as large as a model, is deleted first.

    Args:
        overwrite: replace an adapter or a model that is there by then.

    Raises:
        CheckpointError: something cannot be written, or see `refuse_occupied`.
    """
    directory = directory.resolve()
    make_directory(directory.parent, "adapter directory")
    # Two processes can have one id, in two containers or on two nodes.
    temporary = directory.with_name(f".{directory.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    remove_leftovers(directory.parent, f".{glob.escape(directory.name)}.tmp-[0-9]*")
    try:
        temporary.mkdir()
        yield temporary
        refuse_occupied(directory, overwrite)  # it may have come meanwhile
        publish_directory(temporary, directory)
    except OSError as error:
        raise CheckpointError(f"adapter directory {directory}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
