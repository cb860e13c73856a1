"""Rows to tokens, once for all ranks.

The tokens of a run lie in one safetensors file: `input_ids`, all rows joined, and for each row its `stops` (end in
`input_ids`), `prompts` (tokens of the prompt, which are not trained on) and `sources` (row number in the dataset).
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abba.errors import CheckpointError, DataError
from abba.parsing import parse_json
from abba.storage import SafetensorsFile, Spec, hash_file, is_there, write_safetensors
from abba.text.encode import encode_prompt, encode_response
from abba.text.prompt import INSTRUCTION_PROMPT
from abba.text.rows import BadRows, RowSource, usable_rows

FORMAT_VERSION = 1
LAYOUT = {"input_ids": torch.int32, "stops": torch.int64, "prompts": torch.int64, "sources": torch.int64}


def tokens_path(source: RowSource, max_length: int, max_bad_rows: int, tokenizer: Any, directory: Path) -> Path:
    """Where the tokens of `source` belong: named by a hash of everything that they depend on."""
    local = Path(source.path)
    content = hash_file(local).sha256 if is_there(local) and local.is_file() else None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    limits = (max_length, max_bad_rows)
    parts = [FORMAT_VERSION, source.__dict__, limits, content, vocabulary, tokenizer.eos_token_id, INSTRUCTION_PROMPT]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return directory / f"tokens-{digest[:20]}.safetensors"


def prepare_tokens(source: RowSource, max_length: int, max_bad_rows: int, tokenizer: Any, path: Path) -> None:
    """Tokenise every row of `source` into the file `path`; one process of a run does this.

    Raises:
        DataError: the dataset cannot be read, lacks the fields, is empty, or has more bad rows than allowed.
    """
    bad, truncated, total = BadRows(), 0, 0
    ids, stops, prompts, sources = [], [], [], []
    for numbers, instructions, responses in usable_rows(source, bad):
        encoded = zip(
            numbers, encode_prompt(tokenizer, instructions), encode_response(tokenizer, responses), strict=True
        )
        for row, prompt, response in encoded:
            if len(prompt) >= max_length:
                bad.add(row, f"all labels are masked: the prompt alone fills data.max_length={max_length} tokens")
                continue
            example = [*prompt, *response]
            truncated += len(example) > max_length
            example = example[:max_length]
            ids.append(np.asarray(example, dtype=np.int32))
            total += len(example)
            stops.append(total)
            prompts.append(len(prompt))
            sources.append(row)
    if bad.reasons.total() > max_bad_rows:
        raise DataError(
            f"{source.path}: {bad.reasons.total()} rows cannot be trained on ({bad.first}); "
            f"mend them, or allow as many with data.max_bad_rows={bad.reasons.total()}"
        )
    if not ids:
        raise DataError(f"{source.path}: has no row to train on")
    notes = [f"left out {count} rows: {reason}" for reason, count in bad.reasons.items()]
    if truncated:
        notes.append(f"cut {truncated} of {len(ids)} rows to data.max_length={max_length} tokens")
    tensors = {
        "input_ids": torch.from_numpy(np.concatenate(ids)),
        "stops": torch.tensor(stops),
        "prompts": torch.tensor(prompts),
        "sources": torch.tensor(sources),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    layout = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors(temporary, layout, tensors.values(), {"notes": json.dumps(notes)})
    os.replace(temporary, path)


class TokenizedRows:
    """The rows of a tokens file, read into memory: 4 bytes a token.

    Raises:
        CheckpointError: the file is damaged, or is no tokens file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with SafetensorsFile(path) as file:
            found = {name: (stored.dtype, len(stored.shape)) for name, stored in file.tensors.items()}
            if found != {name: (dtype, 1) for name, dtype in LAYOUT.items()}:
                raise CheckpointError(f"{path}: is no tokens file: it should hold {', '.join(LAYOUT)}; delete it")
            self._ids, self._stops, self._prompts, self.sources = (file.read_full(name) for name in LAYOUT)
            said = file.metadata.get("notes", "[]")
        self._starts = torch.cat([self._stops.new_zeros(1), self._stops[:-1]])
        lengths = self._stops - self._starts
        rows = {len(self._stops), len(self._prompts), len(self.sources)}
        if len(rows) > 1 or not len(lengths) or self._stops[-1] != len(self._ids) or self._ids.min() < 0:
            raise CheckpointError(f"{path}: its tensors do not belong together; delete it")
        if (lengths < 1).any() or (self._prompts < 0).any() or (self._prompts >= lengths).any():
            raise CheckpointError(f"{path}: has rows that end before they start; delete it")
        try:
            notes = parse_json(said.encode())
        except ValueError as error:
            raise CheckpointError(f"{path}: its notes are damaged: {error}; delete it") from error
        self.notes = [str(note) for note in notes] if isinstance(notes, list) else []  # what was left out or cut

    @property
    def largest_id(self) -> int:
        return int(self._ids.max())

    def __len__(self) -> int:
        return len(self._stops)

    def input_ids(self, row: int) -> Tensor:
        return self._ids[self._starts[row] : self._stops[row]]

    def prompt_length(self, row: int) -> int:
        return int(self._prompts[row])

    def tokens(self, rows: list[int]) -> int:
        index = torch.tensor(rows)
        return int((self._stops[index] - self._starts[index]).sum())

    def supervised_tokens(self, rows: list[int]) -> int:
        return self.tokens(rows) - int(self._prompts[torch.tensor(rows)].sum())
