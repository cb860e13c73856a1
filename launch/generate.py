#!/usr/bin/env python
"""Answer a prompt with the base model and, side by side, with an adapter.

    python launch/generate.py --model recipes/assets/tiny-llama --adapter runs/quickstart/adapter \\
        --prompt "Ann had some pens. Then Ann bought 5 more. Now Ann has 17 pens. How many pens did Ann have at first?"

Without --prompt it reads one from each line of standard input.
"""

import argparse
import sys
from pathlib import Path

from common import positive

from abba.errors import AbbaError, exit_with


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the base: a directory, or a Hub name that is in the cache")
    parser.add_argument("--revision", help="of a Hub model")
    parser.add_argument("--adapter", type=Path, help="an adapter directory")
    parser.add_argument("--prompt", help="the instruction; the recipe's template is put around it")
    parser.add_argument("--max-new-tokens", type=positive, default=256)
    parser.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float32"],
        default="auto",
        help="auto: bfloat16, where the processor can",
    )
    arguments = parser.parse_args()
    try:
        answer(arguments)
    except AbbaError as error:
        return exit_with(error)
    return 0


def answer(arguments: argparse.Namespace) -> None:
    from abba.adapter.linear import bypass
    from abba.base_model import DTYPES, choose_dtype, find_base, load_tokenizer
    from abba.evaluation.engine import visible_gpus
    from abba.evaluation.generate import generate_greedy, load_for_generation
    from abba.evaluation.subject import trained_prompt
    from abba.text.encode import encode_prompt

    base, template = find_base(arguments.model, arguments.revision), trained_prompt(arguments.adapter)
    tokenizer, gpus = load_tokenizer(base), visible_gpus()
    dtype, note = choose_dtype(arguments.dtype)
    model = load_for_generation(base, arguments.adapter, DTYPES[dtype], dict.fromkeys(range(gpus.count), gpus.usable))
    if note:
        print(f"model: {note}", file=sys.stderr)
    prompts = [arguments.prompt] if arguments.prompt is not None else map(str.strip, sys.stdin)
    for prompt in prompts:
        asked = (encode_prompt(tokenizer, [prompt], template), [[0]], arguments.max_new_tokens)
        with bypass(model):
            (_, plain), *_ = generate_greedy(model, tokenizer, *asked)
        print(f"--- base\n{plain}")
        if arguments.adapter is not None:
            (_, adapted), *_ = generate_greedy(model, tokenizer, *asked)
            print(f"--- {arguments.adapter}\n{adapted}")


if __name__ == "__main__":
    sys.exit(main())
