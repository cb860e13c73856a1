#!/usr/bin/env python
"""Answer a prompt with the base model and, side by side, with an adapter.

    python launch/generate.py --model recipes/assets/tiny-llama --adapter runs/quickstart/adapter \\
        --prompt "Tom had some pens. Then Tom bought 6 more. Now Tom has 15 pens. How many pens did Tom have at first?"

Without --prompt it reads one from each line of standard input.
"""

import argparse
import sys
from collections.abc import Iterator

from common import argument_parser, end_with_reader, local_path, name_or_path, positive, run_program

from abba.errors import DataError
from abba.text.prompt import PROMPT_NAMES


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--model",
        type=name_or_path,
        help="the base: a directory, or a Hub name that is in the cache; default: the adapter's",
    )
    parser.add_argument("--revision", help="of a Hub model")
    parser.add_argument("--adapter", type=local_path, help="an adapter directory, a checkpoint, or a run")
    parser.add_argument("--any-base", action="store_true", help="take a base that the adapter was not trained on")
    parser.add_argument("--prompt", help="the instruction; the recipe's data.prompt is put around it")
    parser.add_argument(
        "--template", choices=PROMPT_NAMES, help="data.prompt of an adapter that does not remember it; default alpaca"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=256)
    parser.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float32"],
        default="auto",
        help="auto: bfloat16, where the processor can",
    )
    arguments = parser.parse_args()
    return run_program(lambda: answer(arguments))


def answer(arguments: argparse.Namespace) -> None:
    from abba.adapter.linear import bypass
    from abba.base_model import DTYPES, choose_dtype, load_tokenizer
    from abba.evaluation.engine import visible_gpus
    from abba.evaluation.generate import generate_greedy, load_for_generation, stop_ids
    from abba.evaluation.subject import opened
    from abba.text.encode import encode_prompt

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    gpus = visible_gpus()
    dtype, note = choose_dtype(arguments.dtype)
    named = (arguments.model, arguments.revision, arguments.adapter, arguments.template, arguments.any_base, say)
    with opened(*named) as subject:
        if note:
            say(f"model: {note}")
        tokenizer = load_tokenizer(subject.base)
        memory = dict.fromkeys(range(gpus.count), gpus.usable)
        model = load_for_generation(subject.base, subject.adapter, DTYPES[dtype], memory)
        stops = stop_ids(subject.base, tokenizer, subject.prompt)
    end_with_reader()  # from here on it only prints
    for prompt in [arguments.prompt] if arguments.prompt is not None else typed():
        asked = (encode_prompt(tokenizer, [prompt], subject.prompt), [[0]], arguments.max_new_tokens, stops)
        with bypass(model):
            (_, plain), *_ = generate_greedy(model, tokenizer, *asked)
        print(f"--- base\n{plain}")
        if arguments.adapter is not None:
            (_, adapted), *_ = generate_greedy(model, tokenizer, *asked)
            print(f"--- {arguments.adapter}\n{adapted}")


def typed() -> Iterator[str]:
    """Lines of standard input that are not blank.

    Raises:
        DataError: one is not UTF-8.
    """
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            prompt = line.decode().strip()
        except UnicodeDecodeError:
            raise DataError(f"standard input: line {number} is not UTF-8 text") from None
        if prompt:
            yield prompt


if __name__ == "__main__":
    sys.exit(main())
