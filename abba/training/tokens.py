"""Rows to tokens, once for all ranks and all runs on the same data.

The tokens of a source lie in one safetensors file, which says its own hash: `input_ids`, all rows joined; `supervised`,
whether each is learned (1) or of a prompt (0); and for each row its `stops` (end in `input_ids`), `sources` (its number
in the dataset) and `uncut` (tokens before max_length cut it).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abba.errors import CheckpointError, DataError
from abba.parsing import parse_json
from abba.prepared import content_digest, write_prepared
from abba.storage import SafetensorsFile, free_bytes, in_gb, make_directory
from abba.text.examples import Example, examples, prompt_content
from abba.text.prompt import DEFAULT_PROMPT
from abba.text.rows import BadRows, MissingFieldError, RowSource, content_of

FORMAT_VERSION = 4
LAYOUT = {
    "input_ids": torch.int32,
    "supervised": torch.uint8,
    "stops": torch.int64,
    "sources": torch.int64,
    "uncut": torch.int64,
}


def tokens_path(
    source: RowSource,
    max_length: int,
    max_bad_rows: int,
    tokenizer: Any,
    directory: Path,
    prompt: str = DEFAULT_PROMPT,
) -> Path:
    """Where the tokens of `source` belong: named by a hash of everything that they depend on, and of nothing else.

    Raises:
        DataError: the dataset cannot be found.
        RecipeError: a chat template is needed, and the tokenizer has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    fields = [source.instruction_field, source.input_field, source.response_field, source.messages_field]
    taken = [source.split, *fields, source.max_rows]
    limits = (max_length, max_bad_rows)
    parts = [FORMAT_VERSION, content_of(source), taken, limits]
    parts += [vocabulary, tokenizer.eos_token_id, prompt_content(source, tokenizer, prompt)]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return directory / f"tokens-{digest[:20]}.safetensors"


def prepare_tokens(
    source: RowSource,
    max_length: int,
    max_bad_rows: int,
    tokenizer: Any,
    path: Path,
    prompt: str = DEFAULT_PROMPT,
    section: str = "data",
) -> list[str]:
    """Tokenise every row of `source` into the file `path`; one process of a run does this. The fields left unused.

    Args:
        section: of the recipe, where the fields of this source are named.

    Raises:
        DataError: the dataset cannot be read, lacks the fields, is empty, or has more bad rows than allowed.
        RecipeError: a chat template is needed, and the tokenizer has none.
        CheckpointError: `path` cannot be written.
    """
    make_directory(path.parent, "data.prepared_path")
    bad, total = BadRows(), 0
    too_long = f"all labels are masked: the prompt alone fills data.max_length={max_length} tokens"
    ids: list[np.ndarray] = []
    supervised: list[np.ndarray] = []
    columns: dict[str, list[int]] = {"stops": [], "sources": [], "uncut": []}
    for example in _examples(source, tokenizer, prompt, bad, section):
        if example.learned[0][0] >= max_length:
            bad.add(example.row, too_long)
            continue
        mask = np.zeros(len(example.ids), dtype=np.uint8)
        for start, stop in example.learned:
            mask[start:stop] = 1
        ids.append(np.asarray(example.ids[:max_length], dtype=np.int32))
        supervised.append(mask[:max_length])
        total += len(ids[-1])
        for name, value in zip(columns, (total, example.row, len(example.ids)), strict=True):
            columns[name].append(value)
    if bad.reasons.total() > max_bad_rows:
        mend = f"raise data.max_length for {bad.reasons[too_long]} of them" if too_long in bad.reasons else "mend them"
        allow = f", or allow as many with data.max_bad_rows={bad.reasons.total()}" if ids else ""  # not all of them
        raise DataError(f"{source.path}: {bad.reasons.total()} rows cannot be trained on ({bad.first}); {mend}{allow}")
    if not ids:
        raise DataError(f"{source.path}: has no row to train on")
    tensors = {name: torch.tensor(values) for name, values in columns.items()}
    tensors |= {"input_ids": torch.from_numpy(np.concatenate(ids))}
    tensors |= {"supervised": torch.from_numpy(np.concatenate(supervised))}
    write_tokens(path, tensors, bad.reasons)
    return bad.unused_fields


def _examples(source: RowSource, tokenizer: Any, prompt: str, bad: BadRows, section: str) -> Iterator[Example]:
    """Raises DataError where rows lack a field, with the keys that name the fields."""
    try:
        yield from examples(source, tokenizer, prompt, bad)
    except MissingFieldError as error:
        keys = f"{section}.instruction_field and {section}.response_field"
        way_out = f"set {keys}, or {section}.messages_field where rows are conversations"
        for key in ("messages_field", "input_field"):
            if getattr(source, key) == error.field:
                way_out = f"set {section}.{key} to one of them"
        raise DataError(f"{error.reason}; {way_out}") from None


def write_tokens(path: Path, tensors: Mapping[str, Tensor], left_out: Mapping[str, int]) -> None:
    """Write a tokens file. It appears whole or not at all; of two that write it at once the later one stays.

    Args:
        left_out: rows that are not in it, counted by reason.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        write_prepared(path, tensors, {"left_out": json.dumps(left_out)})
    except OSError as error:
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise CheckpointError(
            f"data.prepared_path {path.parent}: {path.name}, {in_gb(size)}, cannot be written: {error.strerror}; "
            f"{in_gb(free_bytes(path.parent))} are free; make room, or choose another place"
        ) from error


class Rows:
    """Tokenised rows, by their numbers from 0: how long each is, and what is learned of it. Shapes: (rows,)."""

    lengths: Tensor  # tokens
    learned: Tensor  # tokens
    uncut: Tensor  # tokens before max_length cut them

    def __len__(self) -> int:
        return len(self.lengths)

    def length(self, row: int) -> int:
        return int(self.lengths[row])

    def tokens(self, rows: list[int]) -> int:
        return int(self.lengths[torch.tensor(rows)].sum())

    def supervised_tokens(self, rows: list[int]) -> int:
        return int(self.learned[torch.tensor(rows)].sum())

    @property
    def cut(self) -> int:
        """Rows that max_length has cut."""
        return int((self.uncut > self.lengths).sum())


class TokenizedRows(Rows):
    """The rows of a tokens file, verified and read into memory: 5 bytes a token.

    Raises:
        CheckpointError: the file is damaged, or is no tokens file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with SafetensorsFile(path) as file:
            found = {name: (stored.dtype, len(stored.shape)) for name, stored in file.tensors.items()}
            if found != {name: (dtype, 1) for name, dtype in LAYOUT.items()}:
                raise CheckpointError(f"{path}: is no tokens file: it should hold {', '.join(LAYOUT)}; delete it")
            tensors = {name: file.read_full(name) for name in LAYOUT}
            said, self.sha256 = file.metadata.get("left_out", ""), file.metadata.get("sha256", "")
        if content_digest(tensors, {"left_out": said}) != self.sha256:
            raise CheckpointError(f"{path}: is damaged: its SHA-256 is another one than it says; delete it")
        self._ids, self._supervised, self._stops, self.sources, self.uncut = tensors.values()
        self._starts = torch.cat([self._stops.new_zeros(1), self._stops[:-1]])
        self.lengths = self._stops - self._starts
        rows = {len(tensors[name]) for name in ("stops", "sources", "uncut")}
        if len(rows) > 1 or not len(self) or self._stops[-1] != len(self._ids) or self._ids.min() < 0:
            raise CheckpointError(f"{path}: its tensors do not belong together; delete it")
        if (self.lengths < 1).any():
            raise CheckpointError(f"{path}: has rows that end before they start; delete it")
        self._check_supervised()
        if (self.uncut < self.lengths).any():
            raise CheckpointError(f"{path}: has rows that are longer than they were; delete it")
        try:
            left_out = parse_json(said.encode())
            self.left_out = {str(reason): int(count) for reason, count in left_out.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: what it says of rows left out is damaged: {error}; delete it") from error

    @property
    def largest_id(self) -> int:
        return int(self._ids.max())

    @property
    def notes(self) -> list[str]:
        """What was left out or cut, in words."""
        notes = [f"left out {count} rows: {reason}" for reason, count in self.left_out.items()]
        if self.cut:
            notes.append(f"cut {self.cut} of {len(self)} rows to data.max_length={self.lengths.max()} tokens")
        return notes

    def input_ids(self, row: int) -> Tensor:
        return self._ids[self._starts[row] : self._stops[row]]

    def supervised(self, row: int) -> Tensor:
        """The places of what is learned of a row, ascending; never its first token, which nothing predicts."""
        return self._supervised[self._starts[row] : self._stops[row]].nonzero().flatten()

    def row_name(self, row: int) -> str:
        """The number of a row in its dataset, counted from 1."""
        return str(int(self.sources[row]) + 1)

    def _check_supervised(self) -> None:
        wrong = len(self._supervised) != len(self._ids) or self._supervised.max() > 1
        if wrong or self._supervised[self._starts].any():
            raise CheckpointError(f"{self.path}: has tokens that are supervised and cannot be; delete it")
        counted = np.add.reduceat(self._supervised.numpy(), self._starts.numpy(), dtype=np.int64)
        self.learned = torch.from_numpy(counted)  # tokens of each row
        if (self.learned < 1).any():
            raise CheckpointError(f"{self.path}: has rows of which nothing is learned; delete it")
