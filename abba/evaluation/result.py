"""What an evaluation leaves: scores.json, and every generation with how it was graded."""

import json
from pathlib import Path
from typing import Any

from abba.errors import CheckpointError
from abba.layout import GENERATIONS, SCORES
from abba.prepared import remove_leftovers, replacing
from abba.storage import write_json


def write_result(output: Path, records: list[dict[str, Any]], scores: dict[str, Any]) -> None:
    """Both files, each whole or not at all; scores.json last.

    Raises:
        CheckpointError: they cannot be written.
    """
    try:
        for name in (GENERATIONS, SCORES):
            remove_leftovers(output, f".{name}.tmp-*")
        with replacing(output / GENERATIONS) as temporary:
            temporary.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        with replacing(output / SCORES) as temporary:
            write_json(temporary, scores)
    except OSError as error:
        raise CheckpointError(f"{output}: cannot be written: {error.strerror}; the same command tries again") from error
