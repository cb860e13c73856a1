"""What a run leaves behind: the state in its checkpoints, the adapter, the score."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from abba.adapter.config import FullConfig
from abba.adapter.export import PEFT_NAMES, why_nothing_changes
from abba.checkpoint.convert import Form, convert
from abba.checkpoint.format import read_state, verify
from abba.sharded.ranks import Ranks
from abba.sharded.together import share
from abba.training.loop import is_due
from abba.training.recipe import Recipe
from abba.training.resume import ResumePoint
from abba.training.run_directory import RunDirectory


def checkpoint_state(
    recipe: Recipe, modules: dict[str, tuple[int, int]], fingerprint: dict[str, Any]
) -> dict[str, Any]:
    """What state.json holds besides the step, the world size and the tensor shapes."""
    return {
        "seed": recipe.train.seed,
        "base_model": recipe.model.name_or_path,
        "adapter": asdict(recipe.adapter.config()),  # abba where it names no method
        "modules": modules,
        "fingerprint": fingerprint,
        "recipe": recipe.model_dump(mode="json"),
    }


def finish(last: Path, directory: RunDirectory, base: Path, say: Callable[[str], None]) -> tuple[Path, Path | None]:
    """Make the run's result of its last checkpoint, re-opened and verified as it is written.

    Returns:
        The model and the adapter to score: `base` and what was trained on it, or a model that was trained whole.
    """
    verify(last)
    full = isinstance(read_state(last).adapter, FullConfig)
    result = directory.model if full else directory.adapter
    description, summary = convert(last, result, Form(base=base if full else None), overwrite=True)
    form = "a whole model" if full else f"PEFT {PEFT_NAMES[description.format]}"
    directory.got_on()  # a score that is stopped goes on, and there will be no new checkpoint
    say(f"{result.name}: {result}: {summary.tensors} tensors, {summary.bytes:,} bytes, {form}, verified")
    if summary.changes_nothing:
        why = why_nothing_changes(description)
        say(f"{result.name}: WARNING: {why}, so it changes nothing; was the learning rate 0?")
    return (result, None) if full else (base, result)


def owes_held_out_loss(
    resumed: ResumePoint,
    eval_steps: int | None,
    steps: int,
    directory: RunDirectory,
    ranks: Ranks,
    device: torch.device,
) -> bool:
    """Whether the start that saved `resumed` was stopped or killed before the held-out loss there. Collective."""
    done = resumed.state.step
    due = resumed.directory.parent == directory.checkpoints and is_due(done, eval_steps, steps)
    missing = ranks.is_main and due and done not in directory.held_out_steps()  # only rank 0 writes the metrics
    return share(b"owed" if missing else b"", device)[0] != b""
