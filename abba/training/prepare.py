"""What must be there before ranks join: recipe checked, run directory, base model found, rows tokenised once."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from abba.base_model import find_base, load_config, load_tokenizer
from abba.errors import CheckpointError, RecipeError
from abba.text.encode import padding_id
from abba.text.rows import RowSource
from abba.training.recipe import DataSection, Recipe
from abba.training.run_directory import RunDirectory, wait_for
from abba.training.tokens import TokenizedRows, prepare_tokens, tokens_path


def accumulation_steps(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Micro-batches that each rank computes in a step.

    Raises:
        RecipeError: the global batch cannot be shared out evenly.
    """
    accumulation, rest = divmod(global_batch, micro_batch * world_size)
    if rest or not accumulation:
        fitting = [n for n in range(1, global_batch // micro_batch + 1) if (global_batch // micro_batch) % n == 0]
        raise RecipeError(
            f"train.global_batch_size: {global_batch} cannot be shared by {world_size} ranks in micro-batches of "
            f"{micro_batch}; with these sizes the number of ranks can be {', '.join(map(str, fitting))}"
        )
    return accumulation


def row_source(data: DataSection) -> RowSource:
    return RowSource(**{field.name: getattr(data, field.name) for field in dataclasses.fields(RowSource)})


def prepare(
    recipe: Recipe, directory: RunDirectory, is_main: bool, say: Callable[[str], None]
) -> tuple[Path, int, TokenizedRows]:
    """(base model's directory, id to pad with, tokenised rows).

    Rank 0 writes, and fails, before any process group exists: nobody waits in a collective that would time out. The
    others wait for the tokens file, whose name is a hash of what it is made from.

    Raises:
        CheckpointError: the base model cannot be found.
        DataError: the dataset cannot be used.
    """
    base = find_base(recipe.model.name_or_path, recipe.model.revision)
    vocabulary = load_config(base).get_text_config().vocab_size
    tokenizer = load_tokenizer(base)
    source, limits = row_source(recipe.data), (recipe.data.max_length, recipe.data.max_bad_rows)
    tokens = tokens_path(source, *limits, tokenizer, directory.tokens)
    if not is_main:
        wait_for(tokens)
    elif tokens.is_file():
        say(f"data: {tokens} holds these rows as tokens already")
    else:
        prepare_tokens(source, *limits, tokenizer, tokens)
    data = TokenizedRows(tokens)
    for note in data.notes:
        say(f"data: {note}")
    for key in ("name", "revision"):
        if getattr(source, key) is not None and Path(source.path).is_file():
            say(f"data: data.{key}={getattr(source, key)} is for the Hub and means nothing for the file {source.path}")
    if data.largest_id >= vocabulary:
        raise CheckpointError(
            f"{base}: its tokenizer gives id {data.largest_id}, its model has {vocabulary} embeddings; "
            "tokenizer and model do not belong together"
        )
    return base, padding_id(tokenizer), data
