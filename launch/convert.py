#!/usr/bin/env python
"""Turn a sharded training checkpoint into a standalone adapter that stock PEFT loads.

    python launch/convert.py runs/gsm8k/checkpoints/step-000200 adapters/gsm8k
    python launch/convert.py runs/gsm8k adapters/gsm8k-lora --format lora --dtype bfloat16
    python launch/convert.py runs/gsm8k adapters/gsm8k --verify --base meta-llama/Llama-3.1-8B

Needs neither deepspeed nor a GPU nor the base model; --verify --base loads the base and compares logits.
"""

import argparse
import sys
from pathlib import Path

from abba.errors import AbbaError, CheckpointError, RecipeError, exit_with

TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}  # of the largest logit; bf16 rounds the factors or their products


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="a checkpoint, or a run directory: its newest valid one"
    )
    parser.add_argument("destination", type=Path, metavar="DST", help="the adapter directory to create")
    parser.add_argument(
        "--format", choices=["loha", "lora"], default="loha", help="loha: exact; lora: rank r1*r2, for vLLM"
    )
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--force", action="store_true", help="replace DST if it is not empty")
    parser.add_argument("--verify", action="store_true", help="refuse an adapter that changes nothing; see --base")
    parser.add_argument(
        "--base", help="with --verify: a base model, to compare stock PEFT's logits with the native ones"
    )
    arguments = parser.parse_args()
    try:
        convert_and_verify(arguments)
    except AbbaError as error:
        return exit_with(error)
    return 0


def convert_and_verify(arguments: argparse.Namespace) -> None:
    import torch

    from abba.adapter.export import vllm_advice
    from abba.checkpoint.convert import convert, find_checkpoint

    if arguments.base and not arguments.verify:
        raise RecipeError(f"--base {arguments.base}: is used by --verify alone; add --verify or leave it out")
    checkpoint = find_checkpoint(arguments.source, report=lambda line: print(line, file=sys.stderr))
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[arguments.dtype]
    description, summary = convert(checkpoint, arguments.destination, arguments.format, dtype, arguments.force)
    print(f"{checkpoint} -> {arguments.destination}: {summary.tensors} tensors, {summary.bytes:,} bytes, re-opened")
    if arguments.format == "lora":
        print(vllm_advice(description.config))
    if arguments.verify and summary.changes_nothing:
        raise CheckpointError(
            f"{arguments.destination}: every B2 is zero, so it changes nothing; was the learning rate 0?"
        )
    if arguments.verify and arguments.base:
        compare_with_peft(checkpoint, arguments)


def compare_with_peft(checkpoint: Path, arguments: argparse.Namespace) -> None:
    from abba.base_model import find_base
    from abba.checkpoint.convert import read_checkpoint_factors
    from abba.evaluation.parity import peft_difference

    factors = read_checkpoint_factors(checkpoint)
    difference, largest = peft_difference(find_base(arguments.base, None), arguments.destination, factors)
    limit = TOLERANCE[arguments.dtype] * max(1.0, largest)
    line = f"stock PEFT's logits differ from the native ones by at most {difference:.1e} (largest {largest:.1f})"
    if not difference <= limit:
        raise CheckpointError(f"{arguments.destination}: {line}, above {limit:.1e}; is --base its base? DST is kept")
    print(line)


if __name__ == "__main__":
    sys.exit(main())
