#!/usr/bin/env python
"""What a recipe needs on a cluster, and whether it fits: memory, traffic, time. No weights, no GPU, no ranks.

    python launch/plan.py --recipe gsm8k.yaml
    python launch/plan.py --recipe llama70b_gsm8k.yaml --nodes 2 train.per_device_train_batch_size=1 --explain
    python launch/plan.py --recipe gsm8k.yaml model.name_or_path=Qwen/Qwen2.5-32B --gpus-per-node 4 --gpu-memory-gib 48

Exit code 0: it fits. 64: it does not; one line says by how much, and the nearest settings that do.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from common import RECIPES, argument_parser, end_with_reader, positive, run_program

from abba.errors import DataError, RecipeError

# Rows that were counted; of a local file of lines they are counted each time.
KNOWN_ROWS = {("openai/gsm8k", "main", "train"): 7_473}

MOST = 1e9  # GiB, Gbit/s, TFLOP/s
TABLE_GPUS, TABLE_MEMORIES = (1, 2, 4, 8, 16), (24, 48, 80, 141)


def positive_number(text: str) -> float:
    """An argument that is a number above 0, and less than anybody has."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below {MOST:g}")
    return number


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--recipe", required=True, help="a YAML file, or a name in recipes/ with or without .yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values, such as train.max_steps=60")
    parser.add_argument("--nodes", type=positive, help="default 1")
    parser.add_argument("--gpus-per-node", type=positive, default=8, help="default 8")
    parser.add_argument("--gpu-memory-gib", type=positive_number, help="of a GPU, GiB; default 80")
    parser.add_argument(
        "--intra-node-gbps",
        type=positive_number,
        default=3600.0,
        help="of a GPU to the others of its node, in one direction, Gbit/s; default 3600: NVLink of H100, 450 GB/s",
    )
    parser.add_argument(
        "--inter-node-gbps",
        type=positive_number,
        default=400.0,
        help="of a node to the others, in one direction, all its adapters together, Gbit/s; default 400",
    )
    parser.add_argument(
        "--gpu-tflops", type=positive_number, default=989.0, help="dense bf16, TFLOP/s; default 989: H100 SXM"
    )
    parser.add_argument("--rows", type=positive, help="training rows of an epoch, where they are not counted here")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument(
        "--table", action="store_true", help="print what fits on how many GPUs of which size, in Markdown"
    )
    form.add_argument("--explain", action="store_true", help="print the formulas with the numbers put in")
    arguments = parser.parse_intermixed_args()
    for name in ("nodes", "gpu_memory_gib", "rows"):
        if arguments.table and getattr(arguments, name) is not None:
            parser.error(f"--{name.replace('_', '-')} means nothing with --table, which is for many of them")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    end_with_reader()
    return run_program(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> int:
    from abba.planning.explain import explain
    from abba.planning.job import Cluster
    from abba.planning.plan import nearest, plan
    from abba.planning.report import as_dict, grid, refusal, table
    from abba.training.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides, RECIPES)
    cluster = Cluster(
        arguments.nodes or 1,
        arguments.gpus_per_node,
        arguments.gpu_memory_gib or 80.0,
        arguments.intra_node_gbps,
        arguments.inter_node_gbps,
        arguments.gpu_tflops,
    )
    job = job_of(recipe, cluster.gpus)
    if arguments.table:
        print(grid(job, cluster, TABLE_GPUS, TABLE_MEMORIES))
        return 0
    planned = plan(job, cluster)
    rows = arguments.rows or rows_of(recipe)
    steps = steps_of(recipe, rows)
    others = [] if planned.fits else nearest(planned)
    if arguments.json:
        print(json.dumps(as_dict(planned, others, rows, steps), indent=2))
    elif planned.fits or arguments.explain:
        print(table(planned, recipe.model.name_or_path, rows, steps))
    if arguments.explain:
        print(f"\n{explain(planned)}")
    if not planned.fits:
        raise RecipeError(refusal(planned, others))
    return 0


def job_of(recipe: Any, gpus: int) -> Any:
    """The recipe's values as the planner takes them."""
    from abba.planning.architecture import architecture_of
    from abba.planning.job import Job, refuse_unplanned

    name, adapter = recipe.model.name_or_path, recipe.adapter.config()
    architecture = architecture_of(model_config(name, recipe.model.revision), name)
    refuse_unplanned(adapter, architecture)
    return Job(
        architecture,
        adapter,
        gpus,
        recipe.train.global_batch_size,
        recipe.train.per_device_train_batch_size,
        recipe.data.max_length,
        recipe.train.gradient_checkpointing,
        {"auto": 2, "bfloat16": 2, "float32": 4}[recipe.model.dtype],
        recipe.model.attn_implementation,
        sharding_of(recipe.deepspeed.get("zero_optimization", {})),
        recipe.train.per_device_eval_batch_size if recipe.data.eval_rows else 0,
        recipe.checkpoint.save_total_limit,
        recipe.data.packing,
    )


def sharding_of(zero: dict[str, Any]) -> Any:
    """What `deepspeed.zero_optimization` decides; DeepSpeed takes the limits under two names."""
    from abba.planning.job import Sharding

    names = {
        "hpz": ("zero_hpz_partition_size",),
        "prefetch": ("stage3_prefetch_bucket_size", "prefetch_bucket_size"),
        "reuse": ("stage3_max_reuse_distance", "max_reuse_distance"),
        "max_live": ("stage3_max_live_parameters", "max_live_parameters"),
        "reduce_bucket": ("reduce_bucket_size",),
    }
    given = {field: zero[key] for field, keys in names.items() for key in keys if key in zero}
    for field, value in given.items():
        if type(value) not in (int, float) or not 0 <= value < math.inf or value != int(value):
            raise RecipeError(f"deepspeed.zero_optimization.{names[field][0]}: {value!r} is not a whole number")
    offload = zero.get("offload_param") or {}
    device = offload.get("device", "none") if isinstance(offload, dict) else offload
    if device not in ("none", "cpu"):
        raise RecipeError(f"deepspeed.zero_optimization.offload_param: {device!r} cannot be planned; cpu can")
    sizes = {field: int(value) for field, value in given.items()}
    return Sharding(**{**sizes, "hpz": max(1, sizes.get("hpz", 1)), "offload": device == "cpu"})


def model_config(name: str, revision: str | None) -> dict[str, Any]:
    """config.json of a model directory or of the Hub cache; the shapes we know where there is neither.

    Raises:
        CheckpointError: a file is there and cannot be used.
        RecipeError: nothing is there, and the name is not one we know.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from abba.base_config import check_config
    from abba.planning.known_models import KNOWN, known_config
    from abba.storage import is_there

    if is_there(Path(name)):
        return check_config(Path(name))
    is_hub_name = not name.startswith((".", "/", "~")) and name.count("/") <= 1
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision) if is_hub_name else None
    except HFValidationError:
        is_hub_name, cached = False, None
    if isinstance(cached, str):
        return check_config(Path(cached).parent)
    if config := known_config(name):
        return config
    fetch = f"; fetch its config.json first: hf download {name} config.json" if is_hub_name else ""
    raise RecipeError(
        f"model.name_or_path: {name!r} is neither a directory (seen from {Path.cwd()}) nor in the Hub cache, and its "
        f"shapes are not known{fetch}; known are {', '.join(KNOWN)}"
    )


def rows_of(recipe: Any) -> int | None:
    """Rows of an epoch, where they can be known without reading the dataset: files of lines, or counted before."""
    counts = [_count_rows(source) for source in recipe.data.all_sources]
    if None in counts:
        return None
    trained_on = max(0.0, 1 - recipe.data.eval_rows / max(1, sum(counts)))  # held-out rows come from all sources alike
    return max(1, round(sum(map(math.prod, zip(counts, recipe.data.weights, strict=True))) * trained_on))


def _count_rows(source: Any) -> int | None:
    from abba.storage import is_file

    rows = KNOWN_ROWS.get((source.path, source.name, source.split))
    if source.path.endswith(".jsonl") and source.split == "train" and is_file(Path(source.path), DataError):
        with open(source.path, "rb") as file:
            rows = sum(bool(line.strip()) for line in file)
    return None if rows is None else min(rows, source.max_rows or rows)


def steps_of(recipe: Any, rows: int | None) -> int | None:
    """Optimizer steps of the run, if the rows are known."""
    from abba.training.batches import BatchPlan

    train = recipe.train
    if train.max_steps or rows is None:
        return train.max_steps
    plan = BatchPlan(range(rows), train.global_batch_size, train.per_device_train_batch_size, train.seed)
    return plan.steps_for(train.num_train_epochs)


if __name__ == "__main__":
    sys.exit(main())
