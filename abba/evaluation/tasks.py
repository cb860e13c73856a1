"""What is asked and when an answer is right. A task's prompt and extraction are those of training (abba.text)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from abba.errors import DataError, RecipeError, first_line
from abba.text.answers import extract_answer, same_answer


@dataclass(frozen=True)
class Task:
    """Where a task's rows come from by default, their fields, and the grading of (generated, reference)."""

    hub_path: str
    hub_name: str | None
    split: str
    instruction_field: str
    response_field: str
    extract: Callable[[str], str | None]
    correct: Callable[[str, str], bool]


TASKS = {
    "gsm8k": Task("openai/gsm8k", "main", "test", "question", "answer", extract_answer, same_answer),
}


def load_questions(name: str, path: str | None, limit: int | None) -> list[tuple[str, str]]:
    """(instruction, reference) pairs of a task, from `path` or else from the Hub.

    Raises:
        RecipeError: no such task. DataError: the file or dataset cannot be used.
    """
    import datasets

    if name not in TASKS:
        raise RecipeError(f"task {name!r}: is unknown; there is {', '.join(TASKS)}")
    task = TASKS[name]
    datasets.disable_progress_bars()
    try:
        if path is not None:
            if not Path(path).is_file():
                raise DataError(f"{path}: no such file")
            kind = "parquet" if path.endswith(".parquet") else "json"
            rows = datasets.load_dataset(kind, data_files=path, split="train")
        else:
            rows = datasets.load_dataset(task.hub_path, task.hub_name, split=task.split)
    except DataError:
        raise
    except Exception as error:  # datasets raises errors of arrow, the Hub client, fsspec and its own
        cause = first_line(error.__cause__ or error)
        raise DataError(
            f"{path or task.hub_path}: cannot be read ({cause}); give --data FILE.jsonl, or on a machine with access "
            f"run: hf download --repo-type dataset {task.hub_path}"
        ) from None
    for field in (task.instruction_field, task.response_field):
        if field not in rows.column_names:
            raise DataError(
                f"{path or task.hub_path}: rows have no field {field!r}, only {', '.join(rows.column_names)}"
            )
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if not len(rows):
        raise DataError(f"{path or task.hub_path}: has no rows")
    return list(zip(rows[task.instruction_field], rows[task.response_field], strict=True))
