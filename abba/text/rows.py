"""Rows of a dataset, from the Hub or a local file: instruction and response, or conversations; bad ones counted."""

import json
import logging
import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from abba.errors import AbbaError, DataError, first_line
from abba.hub import HubRepository
from abba.storage import hash_file, is_there, open_regular
from abba.text.chat import Message, read_conversation

CHUNK = 1000
LOCAL_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# Anything shorter can be the name of a builder of the library, such as pandas, which reads what lies in this directory.
HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
SAMPLE = 4096  # bytes of a file's start
MAX_REASONS = 20
OTHER_REASONS = "other reasons"


class MissingFieldError(DataError):
    """Rows lack a field that is wanted; who wants it knows the way out."""

    def __init__(self, source: "RowSource", field: str, has: list[str]) -> None:
        super().__init__(f"{source.path}: rows have no field {field!r}, only {', '.join(has)}")
        self.field = field


@dataclass(frozen=True)
class RowSource:
    """Where rows come from and how they become examples; see the recipe's `data` section.

    With `messages_field` rows hold conversations, and instruction_field and response_field are None.
    """

    path: str
    name: str | None
    revision: str | None
    split: str
    instruction_field: str | None
    input_field: str | None
    response_field: str | None
    max_rows: int | None
    messages_field: str | None = None


class BadRows:
    """Rows that cannot be trained on: how many for which reason, and the first of them; and what no row is used for.

    A reason may hold words of the row, so that there can be as many as rows: those beyond MAX_REASONS count together.
    """

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self._first: tuple[int, str] | None = None
        self.unused_fields: list[str] = []

    def add(self, row: int, reason: str) -> None:
        if self._first is None or row < self._first[0]:  # they come in no order: some are found when tokenised
            self._first = (row, reason)
        known = reason in self.reasons or len(self.reasons) < MAX_REASONS
        self.reasons[reason if known else OTHER_REASONS] += 1

    @property
    def first(self) -> str:
        return f"the first is row {self._first[0] + 1}: {self._first[1]}" if self._first else ""


def usable_rows(source: RowSource, bad: BadRows) -> Iterator[tuple[list[int], list[str], list[str]]]:
    """(row numbers, instructions, responses) of usable rows; the others are counted by reason."""
    wanted = [source.instruction_field, source.response_field, *([source.input_field] if source.input_field else [])]
    for first, rows in _chunks(source, wanted, bad):
        numbers, instructions, responses = [], [], []
        for row, (instruction, response, *inputs) in enumerate(rows, first):
            extra = inputs[0] if inputs else None
            reason = _why_bad(wanted[:2], [instruction, response])
            if extra is not None:  # a row may have none
                reason = reason or _why_no_text(source.input_field, extra)
            if reason:
                bad.add(row, reason)
                continue
            numbers.append(row)
            instructions.append(f"{instruction}\n{extra}" if extra and extra.strip() else instruction)
            responses.append(response)
        if numbers:
            yield numbers, instructions, responses


def usable_conversations(source: RowSource, bad: BadRows) -> Iterator[tuple[int, list[Message]]]:
    """(row number, messages) of usable rows; the others are counted by reason."""
    for first, rows in _chunks(source, [source.messages_field], bad):
        for row, (messages,) in enumerate(rows, first):
            try:
                yield row, read_conversation(messages, source.messages_field)
            except ValueError as error:
                bad.add(row, str(error))


def _chunks(source: RowSource, wanted: list[str], bad: BadRows) -> Iterator[tuple[int, list[tuple[Any, ...]]]]:
    """(number of the first, rows as the values of the `wanted` fields), some rows at a time."""
    dataset = _open(source)
    missing = [field for field in wanted if field not in dataset.column_names]
    if missing:
        raise MissingFieldError(source, missing[0], dataset.column_names)
    bad.unused_fields = [field for field in dataset.column_names if field not in wanted]
    dataset = dataset.select_columns(list(dict.fromkeys(wanted)))  # or the library would decode every picture too
    count = min(len(dataset), source.max_rows or len(dataset))
    for first in range(0, count, CHUNK):
        rows = range(first, min(first + CHUNK, count))
        try:
            chunk = dataset[rows.start : rows.stop]
        except UnicodeDecodeError:
            raise DataError(
                f"{source.path}: row {_not_utf8(dataset, rows) + 1} is not UTF-8 text; convert it"
            ) from None
        yield first, list(zip(*(chunk[field] for field in wanted), strict=True))


def _not_utf8(dataset: Any, rows: range) -> int:
    for row in rows:
        try:
            dataset[row]
        except UnicodeDecodeError:
            return row
    return rows.start


def _why_bad(fields: list[str], values: list[Any]) -> str | None:
    for field, value in zip(fields, values, strict=True):
        if value is None:
            return f"{field} is missing"
        if reason := _why_no_text(field, value):
            return reason
        if not value.strip():
            return f"{field} is empty"
    return None


def _why_no_text(field: str, value: Any) -> str | None:
    if isinstance(value, datetime):
        return f"{field} was read as a date, because all of them look like one; give the rows as Parquet with text"
    return None if isinstance(value, str) else f"{field} is {type(value).__name__}, not text"


def _check_content(local: Path) -> None:
    """Refuse what only has the suffix: the library unpacks archives, whatever they are called, into its cache."""
    with os.fdopen(open_regular(local), "rb") as file:
        start = file.read(SAMPLE)
    if not start.strip():
        raise DataError(f"{local}: is empty")
    if LOCAL_FORMATS[local.suffix] == "parquet":
        right = start.startswith(b"PAR1")
    else:
        right = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")
    if not right or tarfile.is_tarfile(local) or zipfile.is_zipfile(local):  # both can start like another format
        raise DataError(f"{local}: cannot be read: its content is not that of a {local.suffix} file")


def hub_dataset(source: RowSource) -> HubRepository | None:
    """The repository that a user means, or None for a file.

    Raises:
        DataError: it is neither a dataset file nor a name that a repository can have.
    """
    local = Path(source.path)
    if local.suffix in LOCAL_FORMATS:
        if not is_there(local, DataError):
            raise DataError(f"{source.path!r}: no such file (seen from {Path.cwd()})")
        return None
    if is_there(local, DataError):
        known = ", ".join(LOCAL_FORMATS)
        raise DataError(f"{source.path!r}: is no dataset file; give one that ends in {known}")
    if not HUB_NAME.fullmatch(source.path):
        raise DataError(f"{source.path!r}: is no file here and no Hub dataset, whose names are OWNER/NAME")
    return HubRepository("dataset", source.path, source.revision)


def find_dataset(source: RowSource) -> Path:
    """The file, or the repository's snapshot in the Hub cache, whose name is the commit. No network.

    Raises:
        DataError: there is none; says how to fetch it.
    """
    repository = hub_dataset(source)
    found = Path(source.path) if repository is None else repository.find()
    if found is None:
        raise DataError(
            f"{source.path!r} is neither a file here nor whole in the Hub cache; fetch it first: {repository.command}, "
            "or give a .jsonl file"
        )
    return found


def content_of(source: RowSource) -> list[str | None]:
    """What tells the rows of `source` from others, wherever they lie: a file's hash, or a repository's commit."""
    found = find_dataset(source)
    if hub_dataset(source) is None:
        return [found.suffix, hash_file(found).sha256]
    return [source.path, source.name, found.name]


def _open(source: RowSource) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it says itself, and raises, what is said here
    found, is_file = find_dataset(source), hub_dataset(source) is None
    try:
        if is_file:
            _check_content(found)
            # Named by its content: the library's cache knows a file by its path and time alone.
            named = {"name": hash_file(found).sha256[:16], "data_files": str(found)}
            return datasets.load_dataset(LOCAL_FORMATS[found.suffix], **named, split=source.split)
        return datasets.load_dataset(str(found), source.name, split=source.split)
    except AbbaError:
        raise
    except Exception as error:  # datasets raises errors of arrow, pandas, fsspec and its own
        cause = (is_file and _broken_line(found)) or first_line(error.__cause__ or error)
        if "corresponds to no data" in cause:
            raise DataError(f"{source.path}: is empty") from None
        raise DataError(f"{source.path}: cannot be read: {cause}") from None


def _broken_line(local: Path) -> str | None:
    """The first line of a .jsonl file that is not JSON: the library counts from the start of what it reads at once."""
    if local.suffix != ".jsonl":
        return None
    with os.fdopen(open_regular(local), "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    json.loads(line)
            except ValueError as error:  # of UTF-8 too
                return f"line {number} is not JSON: {first_line(error)}"
    return None
