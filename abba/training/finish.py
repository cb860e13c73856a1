"""What a run leaves behind: the state in its checkpoints, the adapter, the score."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from abba.checkpoint.convert import convert
from abba.checkpoint.format import verify
from abba.training.recipe import Recipe
from abba.training.run_directory import RunDirectory


def checkpoint_state(
    recipe: Recipe, modules: dict[str, tuple[int, int]], fingerprint: dict[str, Any]
) -> dict[str, Any]:
    """What state.json holds besides the step, the world size and the tensor shapes."""
    return {
        "seed": recipe.train.seed,
        "base_model": recipe.model.name_or_path,
        "adapter": asdict(recipe.adapter.config()),
        "modules": modules,
        "fingerprint": fingerprint,
        "recipe": recipe.model_dump(mode="json"),
    }


def finish(last: Path, directory: RunDirectory, say: Callable[[str], None]) -> None:
    """Convert the last checkpoint to the run's adapter, which is re-opened and verified as it is written."""
    verify(last)
    _, summary = convert(last, directory.adapter, overwrite=True)
    say(f"adapter: {directory.adapter}: {summary.tensors} tensors, {summary.bytes:,} bytes, PEFT LoHa, verified")
    if summary.changes_nothing:
        say("adapter: WARNING: every B2 is zero, so it changes nothing; was the learning rate 0?")
