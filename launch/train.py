#!/usr/bin/env python
"""Fine-tune a frozen causal LM with ABBA adapters on DeepSpeed ZeRO-3, from one recipe.

    deepspeed launch/train.py --recipe gsm8k.yaml
    deepspeed --num_gpus 2 launch/train.py --recipe gsm8k.yaml train.learning_rate=5e-4 output_dir=runs/slow
    torchrun --nproc_per_node 8 launch/train.py --recipe llama70b_gsm8k
    mpirun -np 8 --bind-to none python launch/train.py --recipe llama70b_gsm8k
    python launch/train.py --recipe quickstart.yaml --dry-run

Read `run` from top to bottom: it is the whole program.
"""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import RECIPES, end_with_reader
from scoring import refuse_score, score

from abba.sharded.ranks import Ranks, accumulation_steps, ranks_from_environment
from abba.training.failures import World, exit_code_of, fail, tell, wait_for_end
from abba.training.recipe import Recipe, load_recipe
from abba.training.run_directory import RunDirectory
from abba.training.startup import Startup
from abba.training.watch import Watch

if TYPE_CHECKING:
    from abba.adapter.inject import InjectionReport
    from abba.training.loop import Stream
    from abba.training.resume import ResumePoint

Say = Callable[[str], None]


def run(
    recipe: Recipe, ranks: Ranks, directory: RunDirectory, world: World, watch: Watch, startup: Startup, say: Say
) -> None:
    # Imported here because it takes seconds: a mistake in the recipe is shown at once, by every launcher.
    import torch.distributed as dist

    from abba.adapter.baseline import require_peft
    from abba.base_model import DTYPES, choose_attention, choose_dtype, load_config, require_attention
    from abba.checkpoint.format import step_directory
    from abba.sharded.engine import engine_config
    from abba.sharded.process_group import start_process_group
    from abba.sharded.together import share
    from abba.training.data_report import source_shares
    from abba.training.finish import finish, owes_held_out_loss
    from abba.training.loop import Stream
    from abba.training.prepare import plan_batches, prepare, refuse_unlike
    from abba.training.resume import find_resume_point, fingerprint, refuse_changes, refuse_foreign_end, refuse_no_start

    startup.done("imports")
    chosen, note = choose_dtype(recipe.model.dtype)
    recipe = recipe.with_dtype(chosen)
    if note:
        say(f"model: {note}")
    require_peft(recipe.adapter.config())
    require_attention(recipe.model.attn_implementation)
    settings = recipe.train
    micro_batch = settings.per_device_train_batch_size
    accumulation = accumulation_steps(settings.global_batch_size, micro_batch, ranks.world_size)
    dtype = DTYPES[recipe.model.dtype]
    config = engine_config(dtype, micro_batch, accumulation, settings.max_grad_norm, recipe.deepspeed, ranks)
    if ranks.is_main:
        refuse_score(recipe)
        refuse_no_start(recipe.model.name_or_path, recipe.adapter.init_from, recipe.checkpoint.resume, directory)

    # Data: tokenised by launch/prepare.py, or now by rank 0 before anyone joins; the others find the result on disk.
    base, padding, data = prepare(recipe, ranks, say)
    plan, eval_rows, steps = plan_batches(recipe, data)
    say(f"data: {len(plan.rows):,} rows to train on, {len(eval_rows):,} held out; {steps:,} steps")
    for line in source_shares(data, plan):
        say(f"data: {line}")
    startup.done("data")

    # Ranks: they meet; from now on each knows when another on its machine is dead.
    device = start_process_group(ranks, settings.ddp_timeout)
    world.meet(partial(share, device=device))
    refuse_unlike(share(chosen.encode(), device))
    startup.done("ranks")

    # Resume: the newest valid checkpoint of this run, or none.
    wanted = recipe.checkpoint
    resumed = find_resume_point(wanted.resume, wanted.strict, directory.checkpoints, ranks, device, say)
    attention, why = choose_attention(load_config(base), recipe.model.attn_implementation, device.type, dtype)
    say(f"model: {attention} attention because {why}")
    recipe = recipe.with_attention(attention)
    identity = fingerprint(recipe.model_dump(mode="json"), data.sha256, base)
    if resumed is not None:
        refuse_changes(resumed, identity, wanted.allow_changed, steps, say)
        if eval_rows and owes_held_out_loss(resumed, settings.eval_steps, steps, directory, ranks, device):
            resumed = replace(resumed, owes_held_out=True)
    startup.done("resume")

    if resumed is None or resumed.state.step < steps or resumed.owes_held_out:
        stream = Stream(data, plan, padding, ranks, device)
        fit(recipe, directory, base, config, stream, eval_rows, steps, identity, resumed, world, watch, startup, say)
        last = step_directory(directory.checkpoints, steps)
    else:
        say(f"all {steps:,} steps are done; nothing is left to train")
        last = resumed.directory
        refuse_foreign_end(last, directory.checkpoints)

    # Result: the last checkpoint as a standalone adapter, re-opened and verified; its score, if the recipe asks.
    dist.barrier()
    others = world.part()  # they end here, before rank 0
    dist.destroy_process_group()
    if ranks.is_main:
        directory.confirm()
        scored = finish(last, directory, base, say)
        if recipe.evaluate is not None:
            wait_for_end(others)
            score(recipe, *scored, directory.evaluation, say)
        say(f"done in {startup.total:.0f} s")


def fit(
    recipe: Recipe,
    directory: RunDirectory,
    base: Path,
    config: dict,
    stream: "Stream",
    eval_rows: list[int],
    steps: int,
    identity: dict,
    resumed: "ResumePoint | None",
    world: World,
    watch: Watch,
    startup: Startup,
    say: Say,
) -> None:
    """Train from step 0 or from `resumed` to `steps`; what it leaves is the checkpoints. `config` is DeepSpeed's."""
    from abba.sharded.checkpoint import save_checkpoint
    from abba.sharded.engine import release, track
    from abba.training.finish import checkpoint_state
    from abba.training.loop import held_out_loss, train
    from abba.training.metrics import Reporter
    from abba.training.resume import continue_random_streams
    from abba.training.schedule import learning_rate

    settings, ranks, device = recipe.train, stream.ranks, stream.device
    first, keep = resumed.state.step if resumed else 0, recipe.checkpoint.save_total_limit
    engine, stream, report = build(recipe, base, config, stream, identity, resumed, startup, say)

    # Loop: step, finite?, log, save?, stop asked?
    if ranks.is_main:
        own = resumed is not None and resumed.directory.parent == directory.checkpoints
        directory.begin(recipe.model_dump(mode="json"), first if own else 0, say, ranks.job, ranks.requeued)
        directory.refuse_too_small(report.trainable_parameters, first, steps, recipe.checkpoint.save_steps, keep)
    metrics, state = directory.metrics if ranks.is_main else None, checkpoint_state(recipe, report.shapes, identity)
    held_out = partial(held_out_loss, engine, stream, eval_rows, settings.per_device_eval_batch_size, watch)
    if resumed is not None:
        continue_random_streams(resumed, settings.seed, ranks, device, say)
    with (
        Reporter(metrics, steps, settings.logging_steps, startup, partial(track, engine)) as reporter,
        watch.of_steps(recipe.checkpoint.grace_seconds),
    ):
        train(
            engine,
            stream,
            first=first,
            steps=steps,
            learning_rate=partial(learning_rate, steps=steps, **settings.schedule()),
            reporter=reporter,
            world=world,
            watch=watch,
            save=partial(save_checkpoint, engine, directory.checkpoints, state, keep, ranks, directory.confirm),
            save_steps=recipe.checkpoint.save_steps,
            evaluate=held_out if eval_rows else None,
            eval_steps=settings.eval_steps,
            owed=resumed is not None and resumed.owes_held_out,
        )
    release(engine)  # a score needs the memory


def build(
    recipe: Recipe,
    base: Path,
    config: dict,
    stream: "Stream",
    identity: dict,
    resumed: "ResumePoint | None",
    startup: Startup,
    say: Say,
) -> "tuple[Any, Stream, InjectionReport]":
    """(engine at step 0 or at `resumed`, stream as this model takes it, what was injected).

    `identity` learns the checksum of the weights.
    """
    import torch

    from abba.base_model import DTYPES
    from abba.sharded.engine import start_engine
    from abba.training.attention import keep_rows_apart, line_tokens
    from abba.training.loop import assert_delta_is_zero
    from abba.training.loss import return_losses
    from abba.training.model import enable_checkpointing, load_partitioned
    from abba.training.resume import refuse_other_weights
    from abba.training.start import injected

    settings, ranks = recipe.train, stream.ranks

    # Base: each rank reads its own slice of every weight; no rank ever holds or sends a full copy.
    torch.manual_seed(settings.seed + ranks.rank)  # for dropout, where a base has any
    dtype, attention = DTYPES[recipe.model.dtype], recipe.model.attn_implementation
    model, checksum = load_partitioned(base, dtype, attention, config, ranks, startup, say)
    identity["model"]["weights"] = f"{checksum:016x}"
    if recipe.data.packing:
        stream = replace(stream, line_tokens=line_tokens(model.config._attn_implementation, recipe.data.max_length))
        keep_rows_apart(model)
    if resumed is not None:
        refuse_other_weights(resumed, identity["model"]["weights"], recipe.checkpoint.allow_changed, say)
    first = resumed.state.step if resumed else 0

    # Adapter: frozen linears become AbbaLinear; factors by SVD, bit-equal at any world size, or from the checkpoint.
    # Another method puts PEFT's layers around them, or trains the base itself.
    adapter, init_from, cache = recipe.adapter.config(), recipe.adapter.init_from, recipe.factor_cache
    with injected(model, adapter, resumed, settings.seed, init_from, cache, ranks, say) as (report, read):
        startup.done("factors")
        say(
            f"adapter: {len(report.replaced)} modules, {adapter.summary}; "
            f"{report.trainable_parameters:,} parameters train, {report.frozen_parameters:,} are frozen"
        )

        # Engine: base sharded, factors replicated, gradient checkpointing, fp32 masters that no rounding has touched.
        say(f"loss: {return_losses(model)}")
        engine = start_engine(model, config, settings.adam(), read, first)
        enable_checkpointing(model, settings.gradient_checkpointing)
    del read  # full fp32 copies; the engine holds its slices
    startup.done("engine")
    if resumed is None and init_from is None:
        assert_delta_is_zero(engine, stream)
        startup.done("check")
    batch = f"{ranks.world_size} rank(s) x {config['gradient_accumulation_steps']} micro-batch(es) a step"
    say(f"engine: {batch}; ready after {startup.total:.0f} s")
    return engine, stream, report


def silent(line: str) -> None:
    """What ranks other than 0 say."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="examples:\n" + __doc__.split("\n\n")[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", required=True, help="a YAML file, or a name in recipes/ with or without .yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values, such as train.max_steps=60")
    parser.add_argument("--dry-run", action="store_true", help="show what would run; needs no GPU and writes nothing")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    arguments = parser.parse_intermixed_args()
    startup, world, watch = Startup(), World(), None
    try:
        ranks = ranks_from_environment()
        world.rank, world.world_size = ranks.rank, ranks.world_size
        recipe = load_recipe(arguments.recipe, arguments.overrides, RECIPES)
        if arguments.dry_run:
            from abba.training.dry_run import dry_run

            end_with_reader()
            refuse_score(recipe)
            if ranks.is_main:
                dry_run(recipe, ranks.world_size)
            return 0
        directory = RunDirectory(recipe.output_dir)
        world.failures = directory.failures
        watch = Watch(world, before_exit=partial(directory.release, uncount=False))
        watch.start()
        say = tell if ranks.is_main else silent
        wanted, overwrite = recipe.checkpoint.resume, recipe.overwrite_output_dir
        resume = directory.resume_of(wanted, ranks.job, ranks.requeued)
        if resume != wanted:
            say(f"checkpoint: this job was requeued and goes on; checkpoint.resume={wanted} was for its first start")
            recipe = recipe.with_resume(resume)
        held = directory.held(resume, overwrite, ranks.job, say) if ranks.is_main else nullcontext()
        with held as world.start:
            run(recipe, ranks, directory, world, watch, startup, say)
    except KeyboardInterrupt:
        if world.rank == 0:
            tell("interrupted; what came after the last checkpoint is lost", sys.stderr)
        os._exit(130)  # the way out through the libraries may wait for the other ranks
    except Exception as error:
        if watch is not None:
            watch.stop(exit_code_of(error, world))  # from here on this rank ends by itself
        fail(error, world)
    return 0


if __name__ == "__main__":
    sys.exit(main())
