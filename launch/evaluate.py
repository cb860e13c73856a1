#!/usr/bin/env python
"""Score a base model, with or without an adapter: greedy generation, exact match, every generation kept.

python launch/evaluate.py --model meta-llama/Llama-3.1-8B --task gsm8k --output runs/gsm8k/base
python launch/evaluate.py --model meta-llama/Llama-3.1-8B --adapter runs/gsm8k/adapter \\
        --task gsm8k --output runs/gsm8k/score
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from common import positive

from abba.errors import AbbaError, exit_with


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the base: a directory, or a Hub name that is in the cache")
    parser.add_argument("--revision", help="of a Hub model")
    parser.add_argument("--adapter", type=Path, help="an adapter directory; without it the bare base is scored")
    parser.add_argument("--task", required=True, help="gsm8k")
    parser.add_argument("--data", help="a .jsonl, .json or .parquet file instead of the Hub's test split")
    parser.add_argument("--limit", type=positive, help="only the first N rows")
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--max-new-tokens", type=positive, default=512)
    parser.add_argument(
        "--engine",
        choices=["auto", "vllm", "transformers"],
        default="auto",
        help="what generates; auto: vllm where it is installed, serves the adapter and finds GPUs, else transformers",
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--output", type=Path, required=True, help="directory for scores.json and generations.jsonl; replaced there"
    )
    arguments = parser.parse_args()
    try:
        from abba.base_model import DTYPES, find_base
        from abba.evaluation.score import evaluate

        scores = evaluate(
            find_base(arguments.model, arguments.revision),
            arguments.adapter,
            arguments.task,
            arguments.data,
            arguments.output,
            limit=arguments.limit,
            engine=arguments.engine,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            dtype=DTYPES[arguments.dtype],
            say=partial(print, flush=True),
        )
    except AbbaError as error:
        return exit_with(error)
    print(
        f"{scores['task']}: exact match {scores['exact_match']:.1f}% of {scores['n']}; {arguments.output}/scores.json"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
