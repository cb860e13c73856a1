"""The model that full fine-tuning leaves: every tensor of the base, replaced by what was trained."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abba.adapter.directory import AdapterDescription, refuse_occupied
from abba.adapter.files import AdapterSummary
from abba.adapter.model_files import WRITABLE_DTYPES, bytes_of, copied, read_config, write_model
from abba.base_files import BaseFiles
from abba.errors import CheckpointError
from abba.storage import Spec

HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight")  # Llama's and others'


def write_full(
    directory: Path,
    base: Path,
    description: AdapterDescription,
    trained: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    scores: Mapping[str, Any] | None = None,
) -> AdapterSummary:
    """Write the whole model with the base's configuration and tokenizer, re-open and check it, then give it its name.

    Args:
        trained: name and shape of every trained tensor.
        read: a trained tensor in fp32 by its name; called once for each.
        dtype: what every tensor is stored as; None: as in the base.

    Raises:
        CheckpointError: the base is another one; `directory` is not empty or cannot be written; the result is not
            finite. Nothing is left behind then.
    """
    refuse_occupied(directory, overwrite)
    with BaseFiles(base) as files:
        places = _places(files, trained, read_config(base))
        unchanged = True

        def make(key: str, spec: Spec) -> Tensor:
            nonlocal unchanged
            before = copied(files, key, spec)
            if key not in places:  # a buffer, or what the architecture has no use for
                return before
            after = read(places[key]).to(spec.dtype)
            unchanged = unchanged and torch.equal(after, before)
            return after

        return AdapterSummary(
            *bytes_of(write_model(directory, files, description, make, dtype, scores, overwrite)), unchanged
        )


def _places(files: BaseFiles, trained: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> dict[str, str]:
    """Name in the files -> name of the trained tensor; that of a tied head is the embedding."""
    places = {key: key for key in files.names if key in trained}
    if HEAD in files.names - trained.keys() and config.get("tie_word_embeddings", True):
        embeddings = [name for name in trained if name.endswith(EMBEDDINGS)]
        if len(embeddings) != 1:
            raise CheckpointError(
                f"{files.directory}: holds {HEAD}, which was not trained, and it cannot be told to which tensor it is "
                "tied; take it out of the base's files"
            )
        places[HEAD] = embeddings[0]
    for name in trained.keys() - places.values():
        raise CheckpointError(f"{files.directory}: has no {name}, which was trained; give its own base")
    for key, name in places.items():
        stored = files.stored(key)
        if stored.shape != trained[name] or stored.dtype not in WRITABLE_DTYPES:
            raise CheckpointError(
                f"{files.directory}: {key} is {stored.shape} {stored.dtype}, {trained[name]} was trained; "
                "give its own base, in bf16 or fp32"
            )
    return places
