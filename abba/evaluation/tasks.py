"""What is asked. A task's prompt, extraction and comparison are those of training (abba.text)."""

from dataclasses import dataclass
from pathlib import Path

from abba.errors import DataError, RecipeError
from abba.storage import is_there
from abba.text.expressions import require_math_verify
from abba.text.graders import COMMONSENSE, SUITES, members, reference_answer
from abba.text.rows import LOCAL_FORMATS, BadRows, MissingFieldError, RowSource, usable_rows

LLM_ADAPTERS = "dataset/ of https://github.com/AGI-Edgerunners/LLM-Adapters"


@dataclass(frozen=True)
class Task:
    """Where a task's rows come from by default, their fields, and how many tokens an answer takes at most."""

    hub_path: str | None
    hub_name: str | None
    instruction_field: str
    response_field: str
    max_new_tokens: int
    input_field: str | None = None


_CHOICE = Task(None, None, "instruction", "output", 32, "input")  # 32: as in LLM-Adapters
TASKS = {
    "gsm8k": Task("openai/gsm8k", "main", "question", "answer", 512),
    "math": Task("HuggingFaceH4/MATH-500", None, "problem", "solution", 1024),
    **dict.fromkeys(COMMONSENSE, _CHOICE),
}


@dataclass(frozen=True)
class Question:
    """A row of a task: what is asked, the reference solution, and the answer that it gives."""

    task: str
    row: int
    instruction: str
    reference: str
    answer: str


def tasks_of(name: str) -> tuple[str, ...]:
    """Raises RecipeError when no task has this name."""
    found = members(name)
    if not found:
        raise RecipeError(
            f"task {name!r}: is unknown; there are {', '.join(SUITES)}, and lm-eval:TASK for launch/evaluate.py; "
            "commas may join tasks of commonsense"
        )
    return found


def question_sources(name: str, path: str | None, limit: int | None = None) -> dict[str, RowSource]:
    """Task -> where its rows are.

    Raises:
        RecipeError: no such task. DataError: nothing says where the rows are, or some files are missing.
    """
    tasks = tasks_of(name)
    if tasks[0] not in COMMONSENSE:
        return {name: _source(TASKS[name], path, limit)}
    if path is None:
        where = f"--data, evaluate.path in a recipe: the directory {LLM_ADAPTERS}"
        raise DataError(f"{name}: has no place on the Hub; give {where}")
    if len(tasks) == 1 and Path(path).suffix in LOCAL_FORMATS:
        return {name: _source(_CHOICE, path, limit)}
    files = {task: Path(path) / task / "test.json" for task in tasks}
    missing = [task for task, file in files.items() if not is_there(file, DataError)]
    if missing:
        there = [task for task in tasks if task not in missing]
        only = f", or score {','.join(there)} alone" if there else ""
        raise DataError(
            f"{path}: has no {missing[0]}/test.json; missing are {', '.join(missing)}; "
            f"get them from {LLM_ADAPTERS}{only}"
        )
    return {task: _source(_CHOICE, str(file), limit) for task, file in files.items()}


def load_questions(name: str, path: str | None, limit: int | None) -> list[Question]:
    """The questions of every task that `name` stands for, from `path` or else from the Hub; `limit` of each.

    Raises:
        RecipeError: no such task, or what it needs is not installed. DataError: a file or dataset cannot be used.
    """
    sources = question_sources(name, path, limit)
    if name == "math":
        require_math_verify()
    return [question for task, source in sources.items() for question in _load(task, source)]


def _source(task: Task, path: str | None, limit: int | None) -> RowSource:
    is_file = path is not None and Path(path).suffix in LOCAL_FORMATS  # whose only split is called train
    return RowSource(
        path=path or task.hub_path,
        name=task.hub_name if path in (None, task.hub_path) else None,
        revision=None,
        split="train" if is_file else "test",
        instruction_field=task.instruction_field,
        input_field=task.input_field,
        response_field=task.response_field,
        max_rows=limit,
    )


def _load(task: str, source: RowSource) -> list[Question]:
    bad, questions = BadRows(), []
    try:
        for rows, instructions, references in usable_rows(source, bad):
            for row, instruction, reference in zip(rows, instructions, references, strict=True):
                answer = reference_answer(task, reference)
                if answer is None:
                    bad.add(row, f"{source.response_field} gives no answer that {task} could compare")
                    continue
                questions.append(Question(task, row, instruction, reference, answer))
    except MissingFieldError as error:
        needed = filter(None, (source.instruction_field, source.response_field, source.input_field))
        raise DataError(f"{error.reason}; rows of {task} need the fields {', '.join(needed)}") from None
    if bad.reasons or not questions:
        raise DataError(
            f"{source.path}: {bad.reasons.total()} of its rows cannot be scored; {bad.first or 'it has none'}"
        )
    return questions
