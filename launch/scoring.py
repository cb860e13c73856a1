"""The score at the end of a run, as launch/train.py takes it."""

from collections.abc import Callable
from pathlib import Path

from abba.training.recipe import Recipe


def refuse_score(recipe: Recipe) -> None:
    """Before the training and not after it: problems that cannot be used, an engine that cannot serve this adapter."""
    if recipe.evaluate is None:
        return
    from abba.base_model import DTYPES, choose_dtype
    from abba.evaluation.engine import require_engine
    from abba.evaluation.tasks import load_questions

    dtype, _ = choose_dtype(recipe.model.dtype)
    require_engine(recipe.evaluate.engine, recipe.adapter.config().lora_rank, DTYPES[dtype])
    load_questions(recipe.evaluate.task, recipe.evaluate.path, recipe.evaluate.limit)


def score(recipe: Recipe, base: Path, adapter: Path | None, output: Path, say: Callable[[str], None]) -> None:
    from abba.adapter.files import rewrite_card
    from abba.base_model import DTYPES
    from abba.evaluation.score import evaluate, headline
    from abba.evaluation.subject import Subject

    wanted, dtype = recipe.evaluate.model_dump(), DTYPES[recipe.model.dtype]
    subject = Subject(base, adapter, recipe.data.prompt, adapter)
    named = (subject, wanted.pop("task"), wanted.pop("path"), output)
    scores = evaluate(*named, dtype=dtype, replace=True, say=say, **wanted)
    rewrite_card(adapter or base, scores)
    say(f"score: {headline(scores)}; {output}/scores.json")
