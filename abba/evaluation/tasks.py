"""What is asked and when an answer is right. A task's prompt and extraction are those of training (abba.text)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from abba.errors import DataError, RecipeError
from abba.text.answers import extract_answer, same_answer
from abba.text.rows import LOCAL_FORMATS, BadRows, RowSource, usable_rows


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
    if name not in TASKS:
        raise RecipeError(f"task {name!r}: is unknown; there is {', '.join(TASKS)}")
    task = TASKS[name]
    is_file = path is not None and Path(path).suffix in LOCAL_FORMATS  # whose only split is called train
    source = RowSource(
        path=path or task.hub_path,
        name=task.hub_name if path in (None, task.hub_path) else None,
        revision=None,
        split="train" if is_file else task.split,
        instruction_field=task.instruction_field,
        input_field=None,
        response_field=task.response_field,
        max_rows=limit,
    )
    bad = BadRows()
    questions = [
        pair
        for _, instructions, references in usable_rows(source, bad)
        for pair in zip(instructions, references, strict=True)
    ]
    if bad.reasons or not questions:
        raise DataError(
            f"{source.path}: {bad.reasons.total()} of its rows cannot be scored; {bad.first or 'it has none'}"
        )
    return questions
