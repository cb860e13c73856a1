"""The directory of a run, and what must stay the same for it to be the same run.

runs/NAME/
    recipe.yaml        as resolved
    metrics.jsonl      one line per optimizer step
    tokens/            the tokenised dataset
    checkpoints/       step-000100/ and so on
    adapter/           the result, in PEFT's LoHa form
"""

import hashlib
import importlib.metadata
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from abba.checkpoint.format import list_checkpoints
from abba.errors import CheckpointError
from abba.storage import make_directory

SOFTWARE = ("abba-recipes", "torch", "deepspeed", "transformers", "safetensors")
WAIT_LIMIT_SECONDS = 1800


class RunDirectory:
    """Names inside a run's directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.tokens = self.path / "tokens"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"

    def claim(self, overwrite: bool) -> None:
        """Create it, and make sure that it is ours to use; one process of a run does this.

        Raises:
            CheckpointError: it cannot be written, or holds an earlier run and `overwrite` is false.
        """
        make_directory(self.path, "output_dir")
        earlier = [path for path in (*list_checkpoints(self.checkpoints), self.adapter) if path.exists()]
        if earlier and not overwrite:
            raise CheckpointError(
                f"output_dir {self.path}: holds {earlier[0].relative_to(self.path)} of an earlier run; choose another "
                "output_dir, or discard that run with overwrite_output_dir=true"
            )

    def begin(self, recipe: dict[str, Any]) -> None:
        """Discard an earlier run and write recipe.yaml; called when nothing but training itself can still go wrong."""
        for path in (self.checkpoints, self.adapter):
            shutil.rmtree(path, ignore_errors=True)
        self.metrics.unlink(missing_ok=True)
        self.recipe.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))


def wait_for(path: Path) -> None:
    """Wait until rank 0 has prepared `path`; without a collective, which would time out during a long tokenisation.

    Raises:
        CheckpointError: it does not appear; most likely output_dir is not on storage that all nodes share.
    """
    started = time.monotonic()
    while not path.exists():
        waited = time.monotonic() - started
        if waited > WAIT_LIMIT_SECONDS:
            raise CheckpointError(
                f"{path}: not here after {waited / 60:.0f} minutes; is output_dir on storage that all nodes share?"
            )
        time.sleep(0.2)


def software_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in SOFTWARE}


def fingerprint(recipe: dict[str, Any], tokens: Path, base: Path) -> dict[str, Any]:
    """What decides the numbers of a run: batch, data, base model, adapter; never accumulation or world size."""
    data = {key: value for key, value in recipe["data"].items() if key != "path"}
    train = {
        key: value for key, value in recipe["train"].items() if not key.startswith(("logging", "eval", "per_device_e"))
    }
    return {
        "train": train,
        "data": {**data, "tokens": tokens.stem},
        "adapter": recipe["adapter"],
        "model": {**recipe["model"], "config": hashlib.sha256((base / "config.json").read_bytes()).hexdigest()},
    }
