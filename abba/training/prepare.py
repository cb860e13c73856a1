"""What must be there before ranks join: recipe checked, base model and dataset found, rows tokenised once.

`python launch/prepare.py` does it ahead of a job, and is the only one that downloads. A job does what is left.
"""

import dataclasses
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from abba.base_model import find_base, hub_model, load_config, load_tokenizer
from abba.errors import CheckpointError, RecipeError
from abba.sharded.ranks import Ranks
from abba.text.encode import padding_id
from abba.text.rows import RowSource, hub_dataset
from abba.training.attention import beyond_positions, refuse_packing, refuse_shared_positions
from abba.training.batches import BatchPlan, split_rows
from abba.training.data_section import DataSection
from abba.training.failures import tell
from abba.training.mixture import Mixture, epoch_rows
from abba.training.recipe import Recipe
from abba.training.tokens import TokenizedRows, prepare_tokens, tokens_path

SHARED_WITHIN_SECONDS = 120


def refuse_unlike(dtypes: list[bytes]) -> None:
    """What `model.dtype=auto` comes to on each rank has to be the same.

    Raises:
        RecipeError: nodes with unlike processors.
    """
    for rank, dtype in enumerate(dtypes):
        if dtype != dtypes[0]:
            raise RecipeError(
                f"model.dtype: auto is {dtypes[0].decode()} on rank 0 and {dtype.decode()} on rank {rank}, whose "
                "processors differ; write one of them"
            )


def row_sources(data: DataSection) -> dict[str, RowSource]:
    """Where the rows are; each by the name of its section in the recipe."""
    fields = [field.name for field in dataclasses.fields(RowSource)]
    taken = [RowSource(**{field: getattr(section, field) for field in fields}) for section in data.all_sources]
    return {f"data.sources.{number}" if data.sources else "data": source for number, source in enumerate(taken)}


def fetch(recipe: Recipe, questions: Iterable[RowSource], say: Callable[[str], None]) -> None:
    """Download what the recipe names and the Hub cache lacks; say which commits these are. `questions`: of its score.

    What the cache has whole stays as it is, so that a job and its next start find the same.

    Raises:
        CheckpointError: the base model is not to be had. DataError: a dataset is not.
    """
    rows = [*row_sources(recipe.data).items(), *(("evaluate", source) for source in questions)]
    model = (recipe.model.name_or_path, hub_model(recipe.model.name_or_path, recipe.model.revision))
    wanted = [("model", *model), *((section, source.path, hub_dataset(source)) for section, source in rows)]
    for section, name, repository in wanted:
        if repository is None:
            say(f"{section}: {name}, which is here")
            continue
        found = repository.find()
        if found is None:
            say(f"{section}: fetching {name} from the Hub")
            found = repository.fetch()
        pin = "" if repository.revision == found.name or section == "evaluate" else f"; {section}.revision can pin it"
        say(f"{section}: {name} at commit {found.name}{pin}")


def prepare(recipe: Recipe, ranks: Ranks, say: Callable[[str], None]) -> tuple[Path, int, Mixture]:
    """(base model's directory, id to pad with, tokenised rows). No network.

    Rank 0 writes, and fails, before any process group exists: nobody waits in a collective that would time out. The
    others wait for the tokens files, whose names are hashes of what they are made from.

    Raises:
        CheckpointError: the base model cannot be found, or the tokens cannot be written.
        DataError: a dataset cannot be used.
        RecipeError: two sources are the same, a chat template is needed and there is none, rows would not be apart, or
            the base has no positions for the longest.
    """
    base, config, tokenizer = usable_base(recipe)
    sources, limits = row_sources(recipe.data), (recipe.data.max_length, recipe.data.max_bad_rows)
    paths = tokens_paths(recipe.data, tokenizer, Path(recipe.data.prepared_path))
    parts = []
    for section, source in sources.items():
        path = paths[section]
        part = (_found(path, say) if path.is_file() else None) if ranks.is_main else _from_rank_0(path, ranks)
        if part is None:
            unused = prepare_tokens(source, *limits, tokenizer, path, recipe.data.prompt, section)
            say(f"data: tokenised into {path}{unused_fields(unused)}")
            part = TokenizedRows(path)
        parts.append(part)
    return base, padding_id(tokenizer), mixture(parts, sources, recipe.data.weights, base, config, say)


def usable_base(recipe: Recipe) -> tuple[Path, PretrainedConfig, Any]:
    """(directory, configuration, tokenizer) of a base that can be trained as the recipe says.

    Raises:
        CheckpointError: it cannot be found, or its files cannot be used.
        RecipeError: its rows would not be apart.
    """
    base = find_base(recipe.model.name_or_path, recipe.model.revision)
    config = load_config(base)
    refuse_shared_positions(config, recipe.data.max_length)
    if recipe.data.packing:
        refuse_packing(config.model_type)
    return base, config, load_tokenizer(base)


def mixture(
    parts: list[TokenizedRows],
    sources: Mapping[str, RowSource],
    weights: list[float],
    base: Path,
    config: PretrainedConfig,
    say: Callable[[str], None],
) -> Mixture:
    """The tokens of all sources as one; says what was left out, cut or means nothing.

    Raises:
        CheckpointError: the base has no embeddings for some of them.
        RecipeError: it has no positions for the longest row.
    """
    data = Mixture(parts, source_names(sources), weights)
    for note in data.notes:
        say(f"data: {note}")
    for section, source in sources.items():
        for key in ("name", "revision"):
            value = getattr(source, key)
            if value is not None and Path(source.path).is_file():
                say(f"data: {section}.{key}={value} is for the Hub and means nothing for the file {source.path}")
    vocabulary = config.get_text_config().vocab_size
    if data.largest_id >= vocabulary:
        raise CheckpointError(
            f"{base}: its tokenizer gives id {data.largest_id}, its model has {vocabulary} embeddings; "
            "tokenizer and model do not belong together"
        )
    if note := beyond_positions(config, int(data.lengths.max())):
        say(f"data: WARNING: {note}")
    return data


def unused_fields(fields: list[str]) -> str:
    """A clause, or nothing."""
    return f"; of its rows these fields are not used: {', '.join(fields)}" if fields else ""


def source_names(sources: Mapping[str, RowSource]) -> list[str]:
    """What messages call each source: its path, and its section where others have the same."""
    paths = Counter(source.path for source in sources.values())
    return [
        source.path if paths[source.path] == 1 else f"{source.path} ({section})" for section, source in sources.items()
    ]


def tokens_paths(data: DataSection, tokenizer: Any, directory: Path) -> dict[str, Path]:
    """Where the tokens of each source belong.

    Raises:
        RecipeError: two sources have rows in common: what is held out of one would be trained on in the other.
        AbbaError: see `tokens_path`.
    """
    settings = (data.max_length, data.max_bad_rows, tokenizer, directory, data.prompt)
    sources, uncapped = row_sources(data), {}
    for section, source in sources.items() if len(sources) > 1 else ():
        whole = tokens_path(dataclasses.replace(source, max_rows=None), *settings)
        if whole in uncapped:
            raise RecipeError(f"{section}: has the same rows as {uncapped[whole]}; give that one a weight instead")
        uncapped[whole] = section
    return {section: tokens_path(source, *settings) for section, source in sources.items()}


def _found(path: Path, say: Callable[[str], None]) -> TokenizedRows | None:
    """The tokens of an earlier start or another run; None after a damaged file was removed."""
    try:
        data = TokenizedRows(path)
    except CheckpointError as error:
        say(f"data: WARNING: {error.reason.removesuffix('; delete it')}; it is made anew")
        try:
            path.unlink(missing_ok=True)
        except OSError as refused:
            raise CheckpointError(f"{path}: is damaged and cannot be removed: {refused.strerror}") from refused
        return None
    say(f"data: {path} holds these rows as tokens already")
    return data


def _from_rank_0(path: Path, ranks: Ranks) -> TokenizedRows:
    """Wait for the tokens, however long rank 0 takes; a damaged file is one that rank 0 will replace.

    A directory of this node's own that an earlier run has made looks like one in which rank 0 is still at work, so one
    rank of each node says what it waits for.

    Raises:
        CheckpointError: not even their directory appears, or a damaged file stays: this rank sees another disk.
    """
    started, damaged, failure = time.monotonic(), None, None
    told = ranks.local_rank != 0
    while True:
        seen = _version(path)
        late = time.monotonic() - started > SHARED_WITHIN_SECONDS
        if seen is None:
            if late and not path.parent.is_dir():
                raise CheckpointError(
                    f"data.prepared_path {path.parent}: rank 0 made it {SHARED_WITHIN_SECONDS} s ago and it is not "
                    "here; put it on storage that all nodes share"
                )
            if late and not told:
                tell(
                    f"data: rank {ranks.rank} on {socket.gethostname()} waits for {path}, which rank 0 makes; "
                    "if rank 0 goes on without it, data.prepared_path is not on storage that all nodes share",
                    sys.stderr,
                )
                told = True
        elif seen != damaged:
            try:
                return TokenizedRows(path)
            except CheckpointError as error:
                started, damaged, failure = time.monotonic(), seen, error
        elif late:
            raise failure
        time.sleep(0.2)


def _version(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def plan_batches(recipe: Recipe, data: Mixture) -> tuple[BatchPlan, list[int], int]:
    """(which training rows each step takes, the rows held out, the steps of the run)."""
    settings = recipe.train
    rows, held_out = split_rows(len(data), recipe.data.eval_rows, settings.seed)
    length = data.length if settings.group_by_length else None
    sizes = (settings.global_batch_size, settings.per_device_train_batch_size)
    plan = BatchPlan(rows, *sizes, settings.seed, length, epoch_rows(data, rows, settings.seed))
    return plan, held_out, settings.max_steps or plan.steps_for(settings.num_train_epochs)
