"""The base that an adapter was trained on: where it lies, and whether the one that a user gives is it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abba.base_model import find_base, load_tokenizer
from abba.errors import CheckpointError
from abba.storage import hash_file
from abba.text.chat import ChatTemplate


def trained_base(
    given: Path,
    base_model: str | None,
    provenance: Mapping[str, Any],
    wanted: str | None,
    revision: str | None,
    any_base: bool,
    option: str,
) -> Path | None:
    """The directory of the base to use with what was trained, checked; None if nobody knows which.

    Args:
        given: the adapter, checkpoint or run, as the user names it.
        base_model, provenance: what it remembers of its training.
        wanted: the base that the user names with `option`; None: the one that it was trained on.
        revision: of a Hub model; None: for the one that it was trained on that of the recipe.
        any_base: do not ask whether it was trained on this base.

    Raises:
        CheckpointError: the base cannot be found, or is another one.
    """
    name = wanted or base_model
    if name is None:
        return None
    if revision is None and name == base_model:
        revision = ((provenance.get("recipe") or {}).get("model") or {}).get("revision")
    base = find_base(name, revision, option)
    if not any_base:
        _refuse_other_base(given, base_model, provenance.get("fingerprint") or {}, base, option)
    return base


def _refuse_other_base(
    given: Path, base_model: str | None, recorded: Mapping[str, Any], base: Path, option: str
) -> None:
    """By config.json and the chat template, whose hashes a run records; shapes are compared when tensors are read.

    Raises:
        CheckpointError: they are not those of the training.
    """
    config = (recorded.get("model") or {}).get("config")
    template = (recorded.get("data") or {}).get("chat_template")  # of runs with the prompt chat
    other = None
    if config is not None and config != hash_file(base / "config.json").sha256:
        other = "config.json"
    elif template is not None and template != ChatTemplate(load_tokenizer(base)).digest:
        other = "chat template"
    if other is not None:
        raise CheckpointError(
            f"{given}: was trained on {base_model}, whose {other} is not that of {base}; give that base with {option}, "
            "or --any-base if you mean this one"
        )
