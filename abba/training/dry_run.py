"""A dry run: what would be trained on what, without a GPU, a process group, or a file written."""

import math
import tempfile
from pathlib import Path

import torch
import yaml

from abba.adapter.config import FullConfig, factors_of
from abba.adapter.inject import find_targets
from abba.base_model import (
    DTYPES,
    build_empty,
    choose_attention,
    choose_dtype,
    find_base,
    load_config,
    load_tokenizer,
)
from abba.training.data_report import data_report
from abba.training.prepare import accumulation_steps, plan_batches, row_source
from abba.training.recipe import Recipe
from abba.training.tokens import TokenizedRows, prepare_tokens


def dry_run(recipe: Recipe, world_size: int) -> None:
    """Print the resolved recipe, the batch arithmetic, what trains, and one example with its mask.

    Raises:
        AbbaError: whatever is wrong with recipe, base or data that can be seen without the weights.
    """
    chosen, note = choose_dtype(recipe.model.dtype)
    recipe = recipe.with_dtype(chosen)
    settings = recipe.train
    if note:
        print(f"model: {note}")
    print(f"# resolved recipe\n{yaml.safe_dump(recipe.model_dump(mode='json'), sort_keys=False)}")
    micro = settings.per_device_train_batch_size
    accumulation = accumulation_steps(settings.global_batch_size, micro, world_size)
    base = find_base(recipe.model.name_or_path, recipe.model.revision)
    tokenizer = load_tokenizer(base)
    dtype, attention = DTYPES[recipe.model.dtype], recipe.model.attn_implementation
    attention, _ = choose_attention(load_config(base), attention, "cpu", dtype)
    with torch.device("meta"):
        model = build_empty(base, dtype, attention)
    adapter = recipe.adapter.config()
    full = isinstance(adapter, FullConfig)
    targets = {} if full else find_targets(model, adapter)
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch) / "tokens.safetensors"
        limits = (recipe.data.max_length, recipe.data.max_bad_rows)
        prepare_tokens(row_source(recipe.data), *limits, tokenizer, tokens, recipe.data.prompt)
        data = TokenizedRows(tokens)
    plan, _, steps = plan_batches(recipe, data)

    print(f"# batches, on {world_size} rank{'s' * (world_size > 1)}: the launcher decides, see its --num_gpus")
    print(*data.notes, sep="\n", end="\n" * bool(data.notes))
    packed = recipe.data.max_length if recipe.data.packing else None
    print(*data_report(data, plan, steps, packed), sep="\n")
    print(f"global batch {settings.global_batch_size} = {world_size} ranks x {micro} rows x {accumulation} times")
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

    row = plan.rows[0]
    ids, prompt = data.input_ids(row).tolist(), data.prompt_length(row)
    print(f"\n# one example: {prompt} tokens of prompt, masked; {len(ids) - prompt} tokens to learn")
    print(f"masked:  {tokenizer.decode(ids[:prompt])!r}")
    print(f"learned: {tokenizer.decode(ids[prompt:])!r}")
