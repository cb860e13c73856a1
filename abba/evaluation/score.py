"""A task's score: scores.json and every generation, so that each number can be looked into."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from abba.adapter.directory import read_description
from abba.evaluation.engine import answers
from abba.evaluation.tasks import TASKS, load_questions
from abba.storage import make_directory, write_json


def evaluate(
    base: Path,
    adapter: Path | None,
    task_name: str,
    data: str | None,
    output: Path,
    *,
    limit: int | None,
    engine: str = "auto",
    batch_size: int,
    max_new_tokens: int,
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Generate greedily, grade, and write `scores.json` and `generations.jsonl` into `output`.

    Returns:
        The scores: task, n, exact_match in percent, adapter, model, and how they were made, the engine included.

    Raises:
        AbbaError: see `load_questions` and `answers`; nothing is written then.
    """
    questions = load_questions(task_name, data, limit)
    make_directory(output, "output directory")
    started = time.monotonic()
    made_by, texts = answers(
        base,
        adapter,
        [instruction for instruction, _ in questions],
        engine=engine,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        say=say,
    )
    task, correct = TASKS[task_name], 0
    generations: list[str | None] = [None] * len(questions)
    for done, (index, text) in enumerate(texts, 1):
        instruction, reference = questions[index]
        right = task.correct(text, reference)
        correct += right
        record = {"row": index, "instruction": instruction, "reference": reference, "generated": text}
        generations[index] = json.dumps({**record, "extracted": task.extract(text), "correct": right})
        if done % batch_size == 0 or done == len(questions):
            seconds = time.monotonic() - started
            say(f"{task_name}: {done}/{len(questions)}, {100 * correct / done:.1f}% right, {seconds:.0f} s")
    scores = {
        "task": task_name,
        "n": len(questions),
        "exact_match": 100 * correct / len(questions),
        "adapter": str(adapter) if adapter is not None else None,
        "step": _step_of(adapter) if adapter is not None else None,
        "model": str(base),
        "data": data or task.hub_path,
        "dtype": str(dtype).removeprefix("torch."),
        "max_new_tokens": max_new_tokens,
        **made_by,
        "seconds": time.monotonic() - started,
    }
    temporary = output / f".generations.tmp-{os.getpid()}"
    temporary.write_text("".join(f"{line}\n" for line in generations))
    os.replace(temporary, output / "generations.jsonl")
    write_json(output / "scores.json", scores)
    return scores


def _step_of(adapter: Path) -> int | None:
    """The optimizer step that an adapter was converted from, so that its score is not taken for another's."""
    provenance = read_description(adapter).provenance
    return provenance.get("step") if provenance else None
