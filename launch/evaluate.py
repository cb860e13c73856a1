#!/usr/bin/env python
"""Score a base model, with or without an adapter: greedy generation, exact match, every generation kept.

python launch/evaluate.py --model meta-llama/Llama-3.1-8B --task gsm8k --output runs/gsm8k/base
python launch/evaluate.py --adapter runs/gsm8k --task gsm8k --output runs/gsm8k/score
python launch/evaluate.py --adapter runs/gsm8k/checkpoints/step-000200 --task math --output runs/gsm8k/math
torchrun --nproc_per_node 8 launch/evaluate.py --adapter adapters/mine --task commonsense \\
        --data LLM-Adapters/dataset --output runs/mine/commonsense

The same command continues an evaluation that was killed. With several ranks each needs the whole model on its own GPU.
"""

import argparse
import sys
from functools import partial

from common import argument_parser, count, local_path, name_or_path, positive, run_program

from abba.errors import ArgumentError
from abba.sharded.ranks import Ranks, go_alone, ranks_from_environment
from abba.text.graders import HARNESS, SUITES
from abba.text.prompt import PROMPT_NAMES


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--model",
        type=name_or_path,
        help="the base: a directory, or a Hub name that is in the cache; default: the adapter's",
    )
    parser.add_argument("--revision", help="of a Hub model")
    parser.add_argument(
        "--adapter",
        type=local_path,
        help="an adapter directory, a checkpoint, or a run: its newest valid one; without it the bare base is scored",
    )
    parser.add_argument("--any-base", action="store_true", help="score an adapter on a base that it was not trained on")
    parser.add_argument("--task", required=True, help=f"{', '.join(SUITES)}, or lm-eval:TASK of lm-evaluation-harness")
    parser.add_argument(
        "--data",
        type=name_or_path,
        help="a .jsonl, .json or .parquet file instead of the Hub's test split; for commonsense the directory of "
        "TASK/test.json; for lm-eval one of task definitions",
    )
    parser.add_argument("--limit", type=positive, help="only the first N rows of each task")
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--max-new-tokens", type=positive, help="default: gsm8k 512, math 1024, commonsense 32")
    parser.add_argument("--prompt", choices=PROMPT_NAMES, help="default: that of the training, or alpaca")
    parser.add_argument(
        "--max-ungraded",
        type=count,
        default=0,
        metavar="N",
        help="rows that no grader can decide and that count as wrong",
    )
    parser.add_argument(
        "--engine",
        choices=["auto", "vllm", "transformers"],
        default="auto",
        help="what generates; auto: vllm where it is installed, serves the adapter and finds GPUs, else transformers",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float32"],
        default="auto",
        help="auto: bfloat16, where the processor can",
    )
    parser.add_argument(
        "--output",
        type=local_path,
        required=True,
        help="for scores.json and generations.jsonl; replaced there",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    return parser.parse_args()


def score(arguments: argparse.Namespace, ranks: Ranks) -> None:
    # Imported here because it takes seconds, and after the GPU is chosen.
    from abba.base_model import DTYPES, choose_dtype
    from abba.evaluation.harness import run_harness
    from abba.evaluation.score import evaluate, headline
    from abba.evaluation.subject import opened
    from abba.evaluation.tasks import question_sources

    say = partial(print, flush=True) if ranks.is_main else lambda line: None
    dtype, note = choose_dtype(arguments.dtype)
    if note:
        say(f"model: {note}")
    is_harness = arguments.task.startswith(HARNESS)
    if not is_harness:
        question_sources(arguments.task, arguments.data)
    elif arguments.prompt is not None:
        raise ArgumentError(f"task {arguments.task}: has its own prompts; leave --prompt out")
    named = (arguments.model, arguments.revision, arguments.adapter, arguments.prompt, arguments.any_base, say)
    wanted = ("limit", "batch_size", "max_new_tokens", "engine", "max_ungraded")
    settings = {name: getattr(arguments, name) for name in wanted}
    with opened(*named) as subject:
        task = (subject, arguments.task, arguments.data, arguments.output)
        run = run_harness if is_harness else evaluate
        scores = run(*task, dtype=DTYPES[dtype], ranks=ranks, say=say, **settings)
    if scores is not None:
        print(f"{scores['headline'] if is_harness else headline(scores)}; {arguments.output}/scores.json")


def score_as_rank(arguments: argparse.Namespace) -> int:
    ranks = ranks_from_environment()

    def work() -> None:
        go_alone(ranks)
        score(arguments, ranks)

    prefix = f"rank {ranks.rank}: " if ranks.rank else ""
    goes_on = "" if arguments.task.startswith(HARNESS) else "the same command goes on with the rows that are missing"
    return run_program(work, prefix, goes_on)


def main() -> int:
    arguments = parse_arguments()
    return run_program(lambda: score_as_rank(arguments))


if __name__ == "__main__":
    sys.exit(main())
