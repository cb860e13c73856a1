"""What a run's directory says of the run, read without believing it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abba.errors import CheckpointError
from abba.layout import GENERATIONS, METRICS, RECIPE, SCORES
from abba.parsing import MAX_JSON_BYTES, parse_json
from abba.storage import open_regular, read_json

LARGEST = 1e300  # that can be drawn: the distance of two such numbers is still one

Record = dict[str, Any]


class NothingYetError(CheckpointError):
    """A run that has not begun."""


@dataclass(frozen=True)
class Score:
    """A directory of launch/evaluate.py: scores.json, and the first of its generations."""

    name: str
    values: Record
    samples: list[Record]


@dataclass(frozen=True)
class Run:
    """metrics.jsonl in the order of its lines, recipe.yaml as it is, scores below it, and what had to be left out."""

    name: str
    records: list[Record]
    recipe: str
    scores: list[Score]
    warnings: list[str] = field(default_factory=list)

    def points(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of every record that has a finite number under `key`."""
        return [(r["step"], r[key]) for r in self.records if _is_number(r.get(key))]

    def last(self, key: str) -> float | None:
        found = self.points(key)
        return found[-1][1] if found else None


def read_run(path: Path, samples: int) -> Run:
    """
    Args:
        path: a run's output_dir.
        samples: generations to keep of each score.

    Raises:
        NothingYetError: nothing was measured yet.
        CheckpointError: it is no run's directory, or a file in it is damaged. Only the last line of metrics.jsonl may
            be half-written, as a kill leaves it: it is left out, and `warnings` says so.
    """
    if not _is_directory(path):
        raise CheckpointError(f"{path}: is no directory that can be read; give the output_dir of a run")
    if not (path / METRICS).exists():
        raise NothingYetError(
            f"{path}: has no {METRICS}; wait for the run's first steps, or give the output_dir of a run"
        )
    records, warnings = _metrics(path / METRICS)
    if not any("loss" in record for record in records):
        raise NothingYetError(f"{path / METRICS}: holds no step yet; wait for the run's first steps")
    with os.fdopen(open_regular(path / RECIPE), "rb") as file:
        recipe = file.read(MAX_JSON_BYTES).decode(errors="replace")
    scores = [_score(found.parent, path, samples) for found in sorted(path.glob(f"*/{SCORES}"))]
    return Run(str(path), records, recipe, scores, warnings)


def _metrics(path: Path) -> tuple[list[Record], list[str]]:
    records, warnings = [], []
    for number, line in enumerate(_lines(path), 1):
        if not line.endswith(b"\n"):
            warnings.append(f"{path}: its last line is half-written and left out")
            break
        record = _parsed(line, path, number)
        if type(record.get("step")) is not int:
            raise CheckpointError(f"{path}: line {number} has no step; delete that line")
        records.append(record)
    return records, warnings


def _score(directory: Path, run: Path, samples: int) -> Score:
    values = read_json(directory / SCORES)
    if not isinstance(values, dict):
        raise CheckpointError(f"{directory / SCORES}: is no JSON object; score again")
    path, kept = directory / GENERATIONS, []
    if samples and path.exists():
        for number, line in enumerate(_lines(path), 1):
            kept.append(_parsed(line, path, number))
            if number == samples:
                break
    return Score(str(directory.relative_to(run)), values, kept)


def _lines(path: Path) -> Iterator[bytes]:
    with os.fdopen(open_regular(path), "rb") as file:
        while line := file.readline(MAX_JSON_BYTES):
            yield line


def _parsed(line: bytes, path: Path, number: int) -> Record:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise CheckpointError(f"{path}: line {number} is not JSON: {error}; delete that line") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: line {number} is no JSON object; delete that line")
    return record


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir() and os.access(path, os.R_OK | os.X_OK)
    except (OSError, ValueError):  # too long, or with a NUL
        return False
