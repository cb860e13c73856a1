#!/usr/bin/env python
"""Fine-tune a frozen causal LM with ABBA adapters on DeepSpeed ZeRO-3, from one recipe.

    deepspeed launch/train.py --recipe gsm8k.yaml
    deepspeed --num_gpus 2 launch/train.py --recipe gsm8k.yaml train.learning_rate=5e-4 output_dir=runs/slow
    torchrun --nproc_per_node 8 launch/train.py --recipe llama70b_gsm8k
    python launch/train.py --recipe quickstart.yaml --dry-run

Read `run` from top to bottom: it is the whole program.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import RECIPES

from abba.errors import AbbaError, exit_with
from abba.sharded.ranks import Ranks, ranks_from_environment
from abba.training.recipe import Recipe, load_recipe


def run(recipe: Recipe, ranks: Ranks) -> None:
    # Imported here because it takes seconds: a mistake in the recipe is shown at once, by every launcher.
    import torch
    import torch.distributed as dist

    from abba.adapter.inject import find_targets, inject
    from abba.base_model import DTYPES
    from abba.sharded.checkpoint import save_checkpoint
    from abba.sharded.engine import engine_config, start_engine
    from abba.sharded.initialize import starting_factors
    from abba.sharded.process_group import start_process_group
    from abba.training.batches import BatchPlan, split_rows
    from abba.training.finish import checkpoint_state, finish
    from abba.training.loop import Stream, assert_delta_is_zero, held_out_loss, train
    from abba.training.metrics import Reporter
    from abba.training.model import enable_checkpointing, load_partitioned
    from abba.training.prepare import accumulation_steps, prepare
    from abba.training.run_directory import fingerprint
    from abba.training.schedule import learning_rate

    began, settings = time.monotonic(), recipe.train
    say = partial(print, flush=True) if ranks.is_main else (lambda line: None)
    micro_batch = settings.per_device_train_batch_size
    accumulation = accumulation_steps(settings.global_batch_size, micro_batch, ranks.world_size)

    # Data: rank 0 fetches and tokenises before anyone joins; the others find the result on disk.
    directory, base, padding, data = prepare(recipe, ranks.is_main, say)
    train_rows, eval_rows = split_rows(len(data), recipe.data.eval_rows, settings.seed)
    plan = BatchPlan(train_rows, settings.global_batch_size, micro_batch, settings.seed)
    steps = settings.max_steps or plan.steps_for(settings.num_train_epochs)
    say(f"data: {len(train_rows):,} rows to train on, {len(eval_rows):,} held out; {steps:,} steps")

    # Base: each rank reads its own slice of every weight; no rank ever holds or sends a full copy.
    device = start_process_group(ranks)
    torch.manual_seed(settings.seed + ranks.rank)  # for dropout, where a base has any
    dtype, attention = DTYPES[recipe.model.dtype], recipe.model.attn_implementation
    config = engine_config(dtype, micro_batch, accumulation, settings.max_grad_norm, recipe.deepspeed)
    model, base_checksum = load_partitioned(base, dtype, attention, config, device, ranks, say)

    # Adapter: frozen linears become AbbaLinear; factors by SVD, bit-equal at any world size.
    adapter = recipe.adapter.config()
    targets = find_targets(model, adapter)
    factors = starting_factors(targets, adapter, settings.seed, recipe.adapter.init_from, ranks)
    report = inject(model, adapter, factors=factors)
    say(
        f"adapter: {len(report.replaced)} modules, r1={adapter.r1} r2={adapter.r2} scale={adapter.scale:g}; "
        f"{report.trainable_parameters:,} parameters train, {report.frozen_parameters:,} are frozen"
    )

    # Engine: base sharded, factors replicated, gradient checkpointing, fp32 masters that no rounding has touched.
    enable_checkpointing(model, settings.gradient_checkpointing)
    engine = start_engine(model, config, settings.adam(), factors)
    del factors  # full fp32 copies; the engine holds its slices
    stream = Stream(data, plan, padding, ranks, device)
    if recipe.adapter.init_from is None:
        assert_delta_is_zero(engine, stream)
    seconds = time.monotonic() - began
    say(f"engine: {ranks.world_size} rank(s) x {accumulation} micro-batch(es) a step; ready after {seconds:.0f} s")

    # Loop: step, finite?, log, save?
    if ranks.is_main:
        directory.begin(recipe.model_dump(mode="json"))
    identity = fingerprint(recipe.model_dump(mode="json"), data.path, base, base_checksum)
    state = checkpoint_state(recipe, report.shapes, identity)
    keep = recipe.checkpoint.save_total_limit
    held_out = partial(held_out_loss, engine, stream, eval_rows, settings.per_device_eval_batch_size)
    with Reporter(directory.metrics if ranks.is_main else None, steps, settings.logging_steps) as reporter:
        train(
            engine,
            stream,
            steps=steps,
            learning_rate=partial(learning_rate, steps=steps, **settings.schedule()),
            reporter=reporter,
            save=partial(save_checkpoint, engine, directory.checkpoints, state, keep, ranks),
            save_steps=recipe.checkpoint.save_steps,
            evaluate=held_out if eval_rows else None,
            eval_steps=settings.eval_steps,
        )

    # Result: the last checkpoint as a standalone adapter, re-opened and verified; its score, if the recipe asks.
    dist.barrier()
    dist.destroy_process_group()
    if ranks.is_main:
        finish(directory, steps, say)
        if recipe.evaluate is not None:
            score(recipe, base, directory.adapter, directory.evaluation, say)
        say(f"done in {time.monotonic() - began:.0f} s")


def score(recipe: Recipe, base: Path, adapter: Path, output: Path, say: Callable[[str], None]) -> None:
    from abba.base_model import DTYPES
    from abba.evaluation.score import evaluate

    wanted = recipe.evaluate.model_dump()
    scores = evaluate(
        base,
        adapter,
        wanted.pop("task"),
        wanted.pop("path"),
        output,
        dtype=DTYPES[recipe.model.dtype],
        say=say,
        **wanted,
    )
    say(f"score: {scores['task']} exact match {scores['exact_match']:.1f}% of {scores['n']}; {output}/scores.json")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="examples:\n" + __doc__.split("\n\n")[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", required=True, help="a YAML file, or a name in recipes/ with or without .yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values, such as train.max_steps=60")
    parser.add_argument("--dry-run", action="store_true", help="show what would run; needs no GPU and writes nothing")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    arguments = parser.parse_intermixed_args()
    ranks = Ranks()
    try:
        ranks = ranks_from_environment()
        recipe = load_recipe(arguments.recipe, arguments.overrides, RECIPES)
        if arguments.dry_run:
            from abba.training.dry_run import dry_run

            if ranks.is_main:
                dry_run(recipe, ranks.world_size)
            return 0
        run(recipe, ranks)
    except AbbaError as error:
        return fail(ranks, partial(exit_with, error, "" if ranks.is_main else f"[rank {ranks.rank}] "))
    except KeyboardInterrupt:
        if ranks.is_main:
            print("interrupted; what came after the last checkpoint is lost", file=sys.stderr)
        return 130
    except Exception:
        return fail(ranks, lambda: print(f"[rank {ranks.rank}] {traceback.format_exc()}", file=sys.stderr) or 1)
    return 0


def fail(ranks: Ranks, report) -> int:
    """End this process with an error, without waiting for ranks that may be stuck in a collective.

    Most errors meet every rank alike. The others give rank 0 time to speak and the launcher time to end them, so that
    the error is shown once; what befell them alone they then say themselves.
    """
    if not ranks.is_main:
        time.sleep(5)
    code = report()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
