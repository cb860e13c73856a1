"""Tasks of lm-evaluation-harness, with its own prompts, extraction and metrics, on a model that we load."""

import importlib.util
import json
import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from abba.base_model import load_tokenizer
from abba.errors import ArgumentError, DataError, first_line
from abba.evaluation.engine import visible_gpus
from abba.evaluation.generate import load_for_generation, stop_ids
from abba.evaluation.grading import Z_95
from abba.evaluation.result import write_result
from abba.evaluation.subject import Subject
from abba.sharded.ranks import Ranks
from abba.storage import make_directory
from abba.text.encode import padding_id
from abba.text.graders import HARNESS


def run_harness(
    subject: Subject,
    task: str,
    data: str | None,
    output: Path,
    *,
    limit: int | None,
    batch_size: int,
    max_new_tokens: int | None,
    engine: str,
    max_ungraded: int,
    dtype: torch.dtype,
    ranks: Ranks,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Score `subject` on lm-eval:TASK, or on several with commas; write `scores.json` and `generations.jsonl`.

    Args:
        data: a directory of task definitions beside the harness's own. Functions that they name are run.

    Raises:
        ArgumentError: lm_eval is not installed, or is given what it does not take; or too much for the GPU's memory.
        DataError: it has no such task, or cannot read its data.
        CheckpointError: base or adapter is damaged, or `output` cannot be written.
    """
    _refuse(task, data, engine, max_ungraded, ranks)
    names = task.removeprefix(HARNESS).split(",")
    manager = _task_manager(names, data)
    make_directory(output, "output directory")
    tokenizer, gpus = load_tokenizer(subject.base), visible_gpus()
    model = load_for_generation(subject.base, subject.adapter, dtype, dict.fromkeys(range(gpus.count), gpus.usable))
    # The harness itself ends an answer of a batch at the longest one's stop, and would grade what follows EOS.
    stops, padding = stop_ids(subject.base, tokenizer, None), padding_id(tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=padding)
    say(f"{task}: by lm_eval {version('lm_eval')}, with its prompts; it does not continue when killed")
    found = _evaluate(model, tokenizer, names, manager, limit, batch_size, max_new_tokens)
    scores = {
        "task": task,
        "headline": _headline(found["results"]),
        "results": {name: _with_intervals(result) for name, result in found["results"].items()},
        "n": {name: samples["effective"] for name, samples in found["n-samples"].items()},
        "versions": found["versions"],
        "lm_eval": version("lm_eval"),
        "data": data,
        "model": str(subject.base),
        "adapter": str(subject.given) if subject.given else None,
        "step": subject.step,
        **subject.contents(),
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
    }
    samples = [{"task": name, **sample} for name, rows in found["samples"].items() for sample in rows]
    # Samples and results of a task may hold what only Python knows.
    write_result(output, *json.loads(json.dumps([samples, scores], default=str)))
    return scores


def _refuse(task: str, data: str | None, engine: str, max_ungraded: int, ranks: Ranks) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ArgumentError(f"task {task}: lm_eval is not installed; pip install lm-eval==0.4.13")
    if ranks.world_size > 1:
        raise ArgumentError(f"task {task}: runs on one rank, not {ranks.world_size}; it takes all GPUs of the node")
    if engine == "vllm":
        raise ArgumentError(f"task {task}: runs with transformers; leave --engine out")
    if max_ungraded:
        raise ArgumentError(f"task {task}: grades every row; leave --max-ungraded out")
    if data is not None and not Path(data).is_dir():
        raise DataError(f"{data}: is no directory of task definitions, which --data is for {HARNESS}TASK")


def _task_manager(tasks: list[str], data: str | None) -> Any:
    """The harness's own list of tasks, after a look at it: a model takes minutes to load."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=data)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise DataError(f"{HARNESS}{unknown[0]}: lm_eval has no such task; `lm_eval ls tasks` shows them")
    return manager


def _evaluate(
    model: Any,
    tokenizer: Any,
    tasks: list[str],
    manager: Any,
    limit: int | None,
    batch_size: int,
    max_new_tokens: int | None,
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        return simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=tasks,
            limit=limit,
            gen_kwargs={"max_gen_toks": max_new_tokens} if max_new_tokens else None,
            task_manager=manager,
            log_samples=True,
        )
    except torch.OutOfMemoryError as error:
        raise ArgumentError(f"out of GPU memory: {first_line(error)}; use a smaller batch size") from None
    except Exception as error:  # of datasets, the Hub, jinja, a task's own functions
        raise DataError(f"{HARNESS}{','.join(tasks)}: lm_eval: {type(error).__name__}: {first_line(error)}") from error


def _headline(results: dict[str, dict[str, Any]]) -> str:
    shown = []
    for name, result in results.items():
        metrics = []
        for key, value in result.items():
            metric, _, chosen = key.partition(",")  # by which filter of the answers, of which a task may have several
            if chosen and isinstance(value, int | float) and not metric.endswith("_stderr"):
                metrics.append(f"{metric}{'' if chosen == 'none' else f' ({chosen})'} {value:.4f}")
        shown.append(f"{HARNESS}{name}: {', '.join(metrics)}")
    return "; ".join(shown)


def _with_intervals(result: dict[str, Any]) -> dict[str, Any]:
    """The harness's metrics, and 95% intervals from its standard errors, as `METRIC_95,FILTER`."""
    intervals = {}
    for key, value in result.items():
        metric, _, chosen = key.partition(",")
        error = result.get(f"{metric}_stderr,{chosen}")
        if isinstance(value, float) and isinstance(error, float):
            intervals[f"{metric}_95,{chosen}"] = [value - Z_95 * error, value + Z_95 * error]
    return {**result, **intervals}
