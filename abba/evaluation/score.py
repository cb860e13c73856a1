"""A task's score: scores.json and every generation, so that each number can be looked into."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, astuple
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from abba.base_model import load_tokenizer
from abba.errors import CheckpointError
from abba.evaluation.engine import Plan, plan_answers
from abba.evaluation.generate import stop_ids
from abba.evaluation.grading import Grade, grade_all, wilson
from abba.evaluation.kept import Kept
from abba.evaluation.result import write_result
from abba.evaluation.subject import Subject
from abba.evaluation.tasks import TASKS, Question, load_questions, tasks_of
from abba.sharded.ranks import Ranks
from abba.text.encode import encode_prompt


def evaluate(
    subject: Subject,
    task: str,
    data: str | None,
    output: Path,
    *,
    limit: int | None,
    engine: str = "auto",
    batch_size: int,
    max_new_tokens: int | None,
    dtype: torch.dtype,
    max_ungraded: int = 0,
    ranks: Ranks | None = None,
    replace: bool = False,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """Generate greedily what is not generated yet, grade, and write `scores.json` and `generations.jsonl`.

    Args:
        max_new_tokens: None: the task's.
        ranks: this process among those that share the rows.
        replace: discard unfinished generations that other settings left in `output`.

    Returns:
        On rank 0 the scores: task, n, exact_match and flexible_match in percent with their intervals, those of each
        task where there are several, and how they were made. On other ranks None, once they have done their share.

    Raises:
        AbbaError: see `load_questions`, `plan_answers`, `Kept` and `grade_all`.
    """
    ranks = ranks or Ranks()
    questions = load_questions(task, data, limit)
    max_new_tokens = max_new_tokens or TASKS[questions[0].task].max_new_tokens
    tokenizer = load_tokenizer(subject.base)
    prompts = encode_prompt(tokenizer, [question.instruction for question in questions], subject.prompt)
    sizes = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "dtype": dtype}
    sizes["stops"] = stop_ids(subject.base, tokenizer, subject.prompt)
    asked = (subject.base, subject.adapter, tokenizer, prompts)
    plan = plan_answers(*asked, engine=engine, say=say, ranks=ranks.world_size, **sizes)
    settings = {"task": task, "n": len(questions), "prompt": subject.prompt, **subject.contents(), **sizes}
    settings |= {"dtype": str(dtype).removeprefix("torch."), "torch": version("torch")}
    settings |= {"rows": _hash([astuple(question) for question in questions]), "prompts": _hash(prompts)}
    settings |= {key: plan.made_by[key] for key in ("engine", "engine_version")}
    kept = Kept(output, settings, ranks, replace)
    _generate(task, plan, kept, len(questions), ranks, say)
    if not ranks.is_main:
        return None
    texts = kept.gather(len(questions))
    if not any(text.strip() for text in texts):
        raise CheckpointError(
            f"{output}: all {len(texts)} generations are empty: the model ends at once; are base, adapter and prompt "
            "those of one training?"
        )
    grades = grade_all(questions, texts, max_ungraded)
    origin = {
        "data": data or TASKS[questions[0].task].hub_path,
        "adapter": str(subject.given) if subject.given else None,
    }
    origin |= {"step": subject.step, "model": str(subject.base), "gpus": plan.made_by["gpus"]}
    scores = {**_summary(task, questions, texts, grades), **settings, **origin}
    write_result(output, _records(questions, texts, grades), scores)
    return scores


def headline(scores: dict[str, Any]) -> str:
    """The scores in a line: each task's where there are several."""
    low, high = scores["exact_match_95"]
    line = f"{scores['task']}: exact match {scores['exact_match']:.1f}% of {scores['n']} (95%: {low:.1f} to {high:.1f})"
    line += f", flexible {scores['flexible_match']:.1f}%"
    each = scores.get("tasks", {})
    return line + "".join(f"; {task} {score['exact_match']:.1f}%" for task, score in each.items())


def _generate(task: str, plan: Plan, kept: Kept, rows: int, ranks: Ranks, say: Callable[[str], None]) -> None:
    """This rank's share, row by row into `kept`."""
    if kept.discarded:
        say(kept.discarded)
    share = kept.share_of(plan.batches)
    if kept.texts:
        say(f"{task}: {len(kept.texts)} of {rows} rows are generated already, in {kept.directory}")
    if ranks.world_size > 1:
        say(f"{task}: {ranks.world_size} ranks take every {ranks.world_size}th batch of similar length")
        if len(plan.batches) < ranks.world_size:
            say(
                f"{task}: there are {len(plan.batches)} batches, so the other ranks have nothing to do; a smaller "
                "batch size makes more"
            )
    if not share:
        return
    ends, started = list(accumulate(map(len, share))), time.monotonic()
    for done, (row, text) in enumerate(plan.generate(share), 1):
        kept.add(row, text)
        if done in ends:
            say(f"{task}: {done}/{ends[-1]}, {time.monotonic() - started:.0f} s")


def _summary(task: str, questions: list[Question], texts: list[str], grades: list[Grade]) -> dict[str, Any]:
    """n, percentages and intervals; of several tasks the plain average, and each."""
    graded = list(zip(questions, texts, grades, strict=True))
    each = {name: _of_one([part for part in graded if part[0].task == name]) for name in tasks_of(task)}
    if len(each) == 1:
        return {"task": task, **each[task]}
    average: dict[str, Any] = {"task": task, "n": len(questions)}
    for key in ("exact_match", "flexible_match"):
        mean = sum(score[key] for score in each.values()) / len(each)
        # Tasks are independent: half-widths add in squares, on each side.
        sides = [sum((score[key] - score[f"{key}_95"][side]) ** 2 for score in each.values()) ** 0.5 for side in (0, 1)]
        average[key] = mean
        average[f"{key}_95"] = [mean - sides[0] / len(each), mean + sides[1] / len(each)]
    for key in ("empty", "ungraded"):
        average[key] = sum(score[key] for score in each.values())
    return {**average, "tasks": each}


def _of_one(graded: list[tuple[Question, str, Grade]]) -> dict[str, Any]:
    n = len(graded)
    strict = sum(grade.strict_right for _, _, grade in graded)
    flexible = sum(grade.flexible_right for _, _, grade in graded)
    return {
        "n": n,
        "exact_match": 100 * strict / n,
        "exact_match_95": wilson(strict, n),
        "flexible_match": 100 * flexible / n,
        "flexible_match_95": wilson(flexible, n),
        "empty": sum(not text.strip() for _, text, _ in graded),
        "ungraded": sum(grade.undecided is not None for _, _, grade in graded),
    }


def _records(questions: list[Question], texts: list[str], grades: list[Grade]) -> list[dict[str, Any]]:
    records = []
    for question, text, grade in zip(questions, texts, grades, strict=True):
        record = asdict(question) | {"generated": text}
        record |= {"extracted": grade.strict, "correct": grade.strict_right}
        record |= {"flexible": grade.flexible, "flexible_correct": grade.flexible_right}
        records.append(record | ({"undecided": grade.undecided} if grade.undecided else {}))
    return records


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
