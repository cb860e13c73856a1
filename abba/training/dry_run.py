"""A dry run: what would be trained on what, without a GPU, a process group, or a file written."""

import math
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from abba.adapter.baseline import require_peft
from abba.adapter.config import FullConfig, factors_of
from abba.adapter.inject import find_targets
from abba.base_model import DTYPES, build_empty, choose_attention, choose_dtype, require_attention
from abba.errors import RecipeError
from abba.sharded.engine import checked_section
from abba.sharded.ranks import accumulation_steps
from abba.training.attention import line_tokens
from abba.training.data_report import data_report
from abba.training.mixture import Mixture
from abba.training.prepare import mixture, plan_batches, row_sources, tokens_paths, unused_fields, usable_base
from abba.training.recipe import Recipe
from abba.training.resume import refuse_no_start
from abba.training.run_directory import RunDirectory
from abba.training.tokens import TokenizedRows, prepare_tokens
from abba.training.yaml_file import dump_yaml


def dry_run(recipe: Recipe, world_size: int) -> None:
    """Print the resolved recipe, the batch arithmetic, what trains, and one example with its mask.

    Raises:
        AbbaError: whatever is wrong with recipe, base or data that can be seen without the weights.
    """
    settings = recipe.train
    checked_section(recipe.deepspeed)
    start = (recipe.model.name_or_path, recipe.adapter.init_from, recipe.checkpoint.resume)
    refuse_no_start(*start, RunDirectory(recipe.output_dir))
    require_peft(recipe.adapter.config())
    try:
        require_attention(recipe.model.attn_implementation)
    except RecipeError as error:  # a login node may lack what the others have
        print(f"# on this machine: {error.reason}")
    print(f"# resolved recipe\n{dump_yaml(recipe.model_dump(mode='json'))}", end="")
    micro = settings.per_device_train_batch_size
    accumulation = accumulation_steps(settings.global_batch_size, micro, world_size)
    base, config, tokenizer = usable_base(recipe)
    dtype, attention = DTYPES[choose_dtype(recipe.model.dtype)[0]], recipe.model.attn_implementation
    attention, _ = choose_attention(config, attention, "cpu", dtype)
    with torch.device("meta"):
        model = build_empty(base, dtype, "eager")  # for its shapes: flash-attn is not needed here
    adapter = recipe.adapter.config()
    full = isinstance(adapter, FullConfig)
    targets = {} if full else find_targets(model, adapter)
    data = _tokenised(recipe, base, config, tokenizer)
    plan, _, steps = plan_batches(recipe, data)

    ranks = f"{world_size} rank{'s' * (world_size > 1)}"
    print(f"\n# batches, on {ranks}: the launcher decides, see its --num_gpus")
    packed = line_tokens(attention, recipe.data.max_length) if recipe.data.packing else None
    print(*data_report(data, plan, steps, packed), sep="\n")
    print(f"global batch {settings.global_batch_size} = {ranks} x {micro} rows x {accumulation} times")
    print("\n# adapter")
    total = sum(p.numel() for p in model.parameters())
    if full:
        print(f"none: full fine-tuning, {total:,} parameters train")
    else:
        shapes = factors_of(adapter, {name: (m.out_features, m.in_features) for name, m in targets.items()})
        trainable = sum(map(math.prod, shapes.values()))
        rank = f", update of rank up to {adapter.lora_rank}" if adapter.lora_rank else ""
        print(f"{len(targets)} modules, {adapter.summary}{rank}")
        print(f"{trainable:,} parameters train, {total:,} are frozen (1 to {total / trainable:,.0f})")

    for rows in data.by_source(plan.rows):
        _show_example(data, rows[0], tokenizer)


def _tokenised(recipe: Recipe, base: Path, config: PretrainedConfig, tokenizer: Any) -> Mixture:
    """The rows, without a file that stays."""
    sources, limits = row_sources(recipe.data), (recipe.data.max_length, recipe.data.max_bad_rows)
    with tempfile.TemporaryDirectory() as scratch:
        paths = tokens_paths(recipe.data, tokenizer, Path(scratch))
        for section, source in sources.items():
            unused = prepare_tokens(source, *limits, tokenizer, paths[section], recipe.data.prompt, section)
            if unused:
                print(f"{section}: {source.path}{unused_fields(unused)}")
        parts = [TokenizedRows(path) for path in paths.values()]
    return mixture(parts, sources, recipe.data.weights, base, config, print)


def _show_example(data: Mixture, row: int, tokenizer: Any) -> None:
    """A row in stretches of tokens that are masked and that are learned."""
    ids, learned = data.input_ids(row).tolist(), set(data.supervised(row).tolist())
    masked = len(ids) - len(learned)
    print(f"\n# one example, row {data.row_name(row)}: {masked} tokens masked, {len(learned)} to learn")
    for is_learned, places in groupby(range(len(ids)), learned.__contains__):
        print(f"{'learned' if is_learned else 'masked'}: {tokenizer.decode([ids[place] for place in places])!r}")
