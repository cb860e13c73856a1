#!/usr/bin/env python
"""Fetch and tokenise what a recipe names, ahead of a training job; run it where the Hub can be reached.

    python launch/prepare.py --recipe gsm8k.yaml
    python launch/prepare.py --recipe gsm8k.yaml data.max_length=512 train.per_device_train_batch_size=8
    HF_HUB_OFFLINE=1 python launch/prepare.py --recipe quickstart.yaml       # all of it is here already

The job then starts without the Hub and without tokenising. Needs no GPU. The initial factors take the weights, and the
device that the job has: the first job on a base adds them to data.prepared_path.
"""

import sys
from functools import partial

from common import RECIPES, argument_parser, run_program

from abba.training.recipe import Recipe, load_recipe


def prepare_run(recipe: Recipe) -> None:
    # Imported here because it takes seconds: a mistake in the recipe is shown at once.
    import torch

    from abba.base_model import choose_attention, load_config
    from abba.evaluation.tasks import load_questions, question_sources
    from abba.sharded.ranks import Ranks
    from abba.training.attention import line_tokens
    from abba.training.data_report import data_report
    from abba.training.prepare import fetch, plan_batches, prepare

    say = partial(print, flush=True)
    score = recipe.evaluate
    fetch(recipe, question_sources(score.task, score.path).values() if score is not None else (), say)
    base, _, data = prepare(recipe, Ranks(), say)
    if score is not None:
        questions = load_questions(score.task, score.path, score.limit)
        say(f"evaluate: {len(questions):,} problems")
    plan, _, steps = plan_batches(recipe, data)
    attention, _ = choose_attention(load_config(base), recipe.model.attn_implementation, "cpu", torch.float32)
    packed = line_tokens(attention, recipe.data.max_length) if recipe.data.packing else None
    print(*data_report(data, plan, steps, packed), sep="\n")


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--recipe", required=True, help="a YAML file, or a name in recipes/ with or without .yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values, such as data.max_length=512")
    arguments = parser.parse_intermixed_args()
    return run_program(
        lambda: prepare_run(load_recipe(arguments.recipe, arguments.overrides, RECIPES)),
        after_interrupt="the same command goes on with what is missing",
    )


if __name__ == "__main__":
    sys.exit(main())
