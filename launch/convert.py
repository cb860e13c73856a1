#!/usr/bin/env python
"""Turn a sharded training checkpoint into a standalone adapter that stock PEFT loads, or into a merged model.

    python launch/convert.py runs/gsm8k/checkpoints/step-000200 adapters/gsm8k
    python launch/convert.py runs/gsm8k adapters/gsm8k-lora --format lora --dtype bfloat16
    python launch/convert.py runs/gsm8k adapters/gsm8k-r64 --format lora --rank 64
    python launch/convert.py adapters/gsm8k adapters/gsm8k-lora --format lora
    python launch/convert.py runs/gsm8k models/gsm8k --format merged --base meta-llama/Llama-3.1-8B
    python launch/convert.py runs/gsm8k adapters/gsm8k --verify --base meta-llama/Llama-3.1-8B
    python launch/convert.py deepspeed_output/global_step100 adapters/gsm8k --alpha 24 --base meta-llama/Llama-3.1-8B

Needs neither deepspeed nor a GPU; only what becomes a whole model (--format merged, full fine-tuning) reads the base,
tensor by tensor, and only --verify with --base loads it, to compare logits.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from common import argument_parser, local_path, name_or_path, run_program

from abba.errors import ArgumentError, CheckpointError

WHOLE = ("merged", "full")
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}  # of the largest logit; bf16 rounds the factors or their products


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "source",
        type=local_path,
        metavar="SRC",
        help="a checkpoint, a run directory: its newest valid one, an ABBA adapter in LoHa form, or a ZeRO-3 "
        "checkpoint that DeepSpeed wrote itself",
    )
    parser.add_argument("destination", type=local_path, metavar="DST", help="the directory to create")
    parser.add_argument(
        "--format",
        choices=["loha", "lora", "merged"],
        help="of an ABBA adapter; loha (default): exact, for PEFT; lora: rank r1*r2, exact, for vLLM too; merged: a "
        "full model. What another method has trained has one form, its own in PEFT: leave this out",
    )
    parser.add_argument(
        "--rank", type=int, metavar="K", help="with lora: truncate to rank K; prints the energy it keeps"
    )
    parser.add_argument(
        "--base",
        type=name_or_path,
        help="the base model, a directory or a Hub name in the cache: for merged and after full fine-tuning, to "
        "compare with --verify, and to name the base of DeepSpeed's checkpoints",
    )
    parser.add_argument("--revision", help="of a base on the Hub. Default: that of the training, if it is that base")
    parser.add_argument("--any-base", action="store_true", help="take a base that the adapter was not trained on")
    parser.add_argument("--alpha", type=float, help="of the adapter in a checkpoint of DeepSpeed's; ours know theirs")
    parser.add_argument(
        "--dtype",
        choices=list(TOLERANCE),
        help="of what is stored. Default: float32; for merged what each tensor of the base is stored as, and if given, "
        "it is that of every floating-point tensor",
    )
    parser.add_argument("--force", action="store_true", help="replace DST if it holds an adapter or a merged model")
    parser.add_argument("--verify", action="store_true", help="refuse a result that changes nothing; see --base")
    parser.add_argument("--strict", action="store_true", help="refuse a run whose newest checkpoint is damaged")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    return run_program(lambda: convert(arguments))


def convert(arguments: argparse.Namespace) -> None:
    from abba.base_model import DTYPES
    from abba.checkpoint.convert import Form, convert_source, refuse_overlap
    from abba.checkpoint.deepspeed_files import is_deepspeed_checkpoint
    from abba.checkpoint.source import open_source, refuse_missing
    from abba.evaluation.trained_base import trained_base

    refuse_missing(arguments.source)
    refuse_overlap(arguments.destination, arguments.source, "SRC")
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    given = (arguments.strict, arguments.alpha, arguments.base)
    with open_source(arguments.source, lambda line: print(line, file=sys.stderr), *given) as source:
        whole = (arguments.format or source.config.default_format) in WHOLE
        refuse_senseless(arguments, whole, names_base=is_deepspeed_checkpoint(arguments.source))
        base = None
        if arguments.base and (whole or arguments.verify):
            named = (arguments.base, arguments.revision, arguments.any_base, "--base")
            base = trained_base(arguments.source, source.base_model, source.provenance, *named)
        if whole and arguments.any_base:
            source = replace(source, base_model=arguments.base)  # what the result is made of, for its card
        form = Form(arguments.format, arguments.rank, dtype, base if whole else None)
        found: list[str] = []
        check = partial(verify, source, arguments.dtype, base, found.append) if arguments.verify else None
        description, summary = convert_source(source, arguments.destination, form, arguments.force, check)
        size = f"{summary.tensors} tensors, {summary.bytes:,} bytes, re-opened"
        print(f"{source.directory} -> {arguments.destination}: {size}")
        tell_what_was_lost(description, summary)
        for line in found:
            print(line)


def refuse_senseless(arguments: argparse.Namespace, whole: bool, names_base: bool) -> None:
    for option, given in (("--revision", arguments.revision), ("--any-base", arguments.any_base)):
        if given and not (arguments.base and (arguments.verify or whole)):
            raise ArgumentError(f"{option}: is of a --base that is read: whole models, --verify; leave it out")
    if arguments.base and not (arguments.verify or whole or names_base):
        raise ArgumentError(f"--base {arguments.base}: is used by --verify alone; add --verify or leave it out")


def tell_what_was_lost(description, summary) -> None:
    from abba.adapter.export import vllm_advice

    if description.format == "lora":
        print(vllm_advice(description))
    if kept := summary.kept_energy:
        least = f"least in {kept.worst_module}: {kept.worst:.2%}"
        print(f"rank {description.rank} keeps {kept.overall:.2%} of ||delta W||_F^2; {least}")
    if description.format == "merged":
        print(
            f"rounding of what is stored: {summary.rounding:.1%} of ||delta W||_F; {summary.unchanged} of "
            f"{len(description.modules)} targets came out as in the base"
        )


def verify(source, dtype: str | None, base: Path | None, say, result: Path, description, summary) -> None:
    """Look at a result before it gets its name, and replaces what has it.

    Raises:
        CheckpointError: it is not the trained function, or changes nothing.
    """
    from abba.adapter.export import why_nothing_changes
    from abba.adapter.files import verify_adapter
    from abba.adapter.model_files import verify_model
    from abba.evaluation.parity import merged_difference, peft_difference

    merged = description.format == "merged"
    whole = description.format in WHOLE
    (verify_model if whole else verify_adapter)(result)
    if summary.changes_nothing:
        why = why_nothing_changes(description)
        raise CheckpointError(f"{source.directory}: {why}, so it changes nothing; was the learning rate 0?")
    found = f"verified: {len(description.modules)} targets, all tensors of their shapes and finite"
    if description.format == "full":
        say(f"verified: {summary.tensors} tensors, of their shapes and finite")
        return
    if base is None:
        say(f"{found}; logits are not compared without --base")
        return
    if description.rank is not None:
        say(f"{found}; logits are not compared: at rank {description.rank} it is another function, see what it keeps")
        return
    compare = merged_difference if merged else peft_difference
    difference, largest = compare(base, result, source.all_factors())
    rounded = summary.rounding > 0 if merged else dtype == "bfloat16"
    limit = TOLERANCE["bfloat16" if rounded else "float32"] * max(1.0, largest)
    who = "the merged model's" if merged else "stock PEFT's"
    line = f"{who} logits differ from the native ones by at most {difference:.1e} (largest {largest:.1f})"
    if not difference <= limit:
        advice = "is --base its base? Without --verify it is written all the same"
        raise CheckpointError(f"{source.directory}: {line}, above {limit:.1e}; {advice}")
    say(f"{found}; {line}")


if __name__ == "__main__":
    sys.exit(main())
