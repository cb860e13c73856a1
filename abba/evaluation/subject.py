"""What is scored: a bare model, or a base with an adapter, which may still be a checkpoint or a run."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from abba.adapter.config import FullConfig
from abba.adapter.directory import (
    ABBA_CONFIG,
    ADAPTER_FORMATS,
    PEFT_CONFIG,
    WEIGHTS,
    read_description,
)
from abba.base_files import BaseFiles
from abba.base_model import find_base
from abba.checkpoint.convert import convert
from abba.checkpoint.format import MANIFEST, list_checkpoints, read_state
from abba.checkpoint.source import find_checkpoint
from abba.errors import ArgumentError, CheckpointError
from abba.evaluation.trained_base import trained_base
from abba.layout import ADAPTER, CHECKPOINTS
from abba.storage import hash_file
from abba.text.prompt import DEFAULT_PROMPT

SAMPLE = 2048  # elements at the start, middle and end of a tensor that stand for all of it


@dataclass(frozen=True)
class Subject:
    """A base's directory, a standalone adapter's or None, the prompt of its training; `given`: what the user named."""

    base: Path
    adapter: Path | None
    prompt: str = DEFAULT_PROMPT
    given: Path | None = None

    @property
    def step(self) -> int | None:
        """The optimizer step that adapter or model is of, so that its score is not taken for another's."""
        return _provenance(self.adapter or self.base).get("step")

    def contents(self) -> dict[str, Any]:
        """What tells base and adapter from others, wherever they lie."""
        hashes = {"base_content": _hash_base(self.base), "adapter_content": None}
        if self.adapter is not None:
            files = [hash_file(self.adapter / name).sha256 for name in (WEIGHTS, PEFT_CONFIG)]
            hashes["adapter_content"] = hashlib.sha256("".join(files).encode()).hexdigest()[:16]
        return hashes


@contextmanager
def opened(
    model: str | None,
    revision: str | None,
    given: Path | None,
    prompt: str | None,
    any_base: bool,
    say: Callable[[str], None],
) -> Iterator[Subject]:
    """The subject that a user names.

    Args:
        model, revision: the base; None: those that the adapter was trained on.
        given: an adapter directory, a checkpoint, a run (its newest valid checkpoint), or None.
        prompt: None: that of the training of the adapter, or of a model that was trained; the default where nobody
            knows it.
        any_base: do not ask whether the adapter was trained on this base.

    Raises:
        ArgumentError: no base is known, another prompt than that of the training is wanted, or `any_base` without an
            adapter.
        CheckpointError: `given` is none of these, is a whole model, cannot be read, or was trained on another base.
    """
    if given is None:
        if model is None:
            raise ArgumentError("--model: is missing; give the base, or --adapter with a run that knows its own")
        if any_base:
            raise ArgumentError("--any-base: is of an --adapter, and none is given; leave it out")
        base = find_base(model, revision, "--model")
        yield Subject(base, None, _checked_prompt(prompt, base, base))
        return
    with tempfile.TemporaryDirectory(prefix="abba-adapter-") as scratch:
        try:
            adapter = _standalone(given, Path(scratch) / "adapter", say)
        except OSError as error:
            raise CheckpointError(f"{given}: cannot be read: {error.strerror}; change its permissions") from error
        description = read_description(adapter)
        if description.format not in ADAPTER_FORMATS:
            raise CheckpointError(f"{given}: is a whole model and no adapter; score it with --model {given}")
        named = (model, revision, any_base, "--model")
        base = trained_base(given, description.base_model, description.provenance or {}, *named)
        if base is None:
            raise ArgumentError(f"--model: is missing, and {given} does not say which base it was trained on")
        checked = _checked_prompt(prompt, adapter, given)
        if prompt is None and not _recorded_prompt(adapter):
            say(f"prompt: {checked}, because {given} does not say with which it was trained")
        yield Subject(base, adapter, checked, given)


def _provenance(trained: Path) -> dict[str, Any]:
    """What made an adapter or a model; nothing of a base that is not ours."""
    return (read_description(trained).provenance or {}) if (trained / ABBA_CONFIG).is_file() else {}


def _checked_prompt(wanted: str | None, trained: Path, given: Path) -> str:
    """That of the training, of which an adapter that was made outside a run knows nothing, or else the user's."""
    recorded = _recorded_prompt(trained)
    if recorded is not None and wanted not in (None, recorded):
        raise ArgumentError(f"prompt {wanted}: {given} was trained with the prompt {recorded}; leave the option out")
    return recorded or wanted or DEFAULT_PROMPT


def _recorded_prompt(trained: Path) -> str | None:
    return ((_provenance(trained).get("recipe") or {}).get("data") or {}).get("prompt")


def _standalone(given: Path, destination: Path, say: Callable[[str], None]) -> Path:
    """The directory of an adapter; from a checkpoint or a run it is made in `destination`."""
    if (given / ABBA_CONFIG).is_file():
        return given
    is_run = (given / CHECKPOINTS).is_dir()
    if is_run and not list_checkpoints(given / CHECKPOINTS) and (given / ADAPTER / ABBA_CONFIG).is_file():
        return given / ADAPTER
    if not is_run and not (given / MANIFEST).is_file():
        if given.is_dir():
            list(given.iterdir())  # permission is asked here
        raise CheckpointError(
            f"{given}: is not an ABBA adapter, a checkpoint or a run: it has no {ABBA_CONFIG}, {MANIFEST} or "
            f"{CHECKPOINTS}/; what DeepSpeed alone wrote goes through launch/convert.py first"
        )
    checkpoint = find_checkpoint(given, say)
    if isinstance(read_state(checkpoint).adapter, FullConfig):
        raise CheckpointError(
            f"{given}: was trained whole and has no adapter; score the model that a run leaves with --model RUN/model, "
            "or make it with launch/convert.py"
        )
    convert(checkpoint, destination)
    say(f"adapter: {checkpoint}, converted for this evaluation")
    return destination


def _hash_base(base: Path) -> str:
    """Of config.json and samples of every tensor: to hash all of a 70B takes minutes, and a merge may change few."""
    digest = hashlib.sha256((base / "config.json").read_bytes())
    with BaseFiles(base) as files:
        for name in sorted(files.names):
            stored = files.stored(name)
            digest.update(f"{name} {stored.shape} {stored.dtype}".encode())
            for start in (0, stored.numel // 2, max(0, stored.numel - SAMPLE)):
                values = files.read(name, start, min(start + SAMPLE, stored.numel))
                digest.update(memoryview(values.view(torch.uint8).numpy()))
    return digest.hexdigest()[:16]
