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

from abba.adapter.files import refuse_occupied
from abba.checkpoint.format import remove_checkpoints
from abba.errors import AbbaError, CheckpointError, as_failed
from abba.storage import hash_file, is_there, make_directory, read_json, write_json

SOFTWARE = ("abba-recipes", "torch", "deepspeed", "transformers", "safetensors")
SHARED_WITHIN_SECONDS = 120
STARTED = time.time()


class RunDirectory:
    """Names inside a run's directory."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.tokens = self.path / "tokens"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.evaluation = self.path / "evaluation"

    def claim(self, overwrite: bool) -> None:
        """Create it, and make sure that it is ours to use; one process of a run does this.

        Raises:
            CheckpointError: it cannot be written, or holds an earlier run and `overwrite` is false.
        """
        make_directory(self.path, "output_dir")
        earlier = [path for path in (self.checkpoints, self.adapter, self.metrics) if path.exists()]
        if earlier and not overwrite:
            raise CheckpointError(
                f"output_dir {self.path}: holds {earlier[0].name} of an earlier run; choose another output_dir, "
                "or discard that run with overwrite_output_dir=true"
            )
        refuse_occupied(self.adapter, overwrite)
        self.tokens.mkdir(exist_ok=True)

    def begin(self, recipe: dict[str, Any]) -> None:
        """Discard an earlier run and write recipe.yaml; called when nothing but training itself can still go wrong.

        Only what a run writes is deleted: somebody else's files in the same directory stay.
        """
        remove_checkpoints(self.checkpoints)
        for path in (self.adapter, self.evaluation):
            shutil.rmtree(path, ignore_errors=True)
        self.metrics.unlink(missing_ok=True)
        self.recipe.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))


def announce_failure(path: Path, error: AbbaError) -> None:
    """Tell ranks that wait for `path` that it will not come; not every launcher ends them for us."""
    if is_there(path.parent):
        write_json(_failure_of(path), {"exit_code": error.exit_code, "message": str(error)})


def wait_for(path: Path) -> None:
    """Wait until rank 0 has prepared `path`, however long that takes; in a collective the wait would time out.

    Raises:
        AbbaError: rank 0 failed; with its exit code.
        CheckpointError: not even its directory appears; output_dir is not on storage that all nodes share.
    """
    started = time.monotonic()
    while not is_there(path):
        failure = _failure_of(path)
        if is_there(failure) and failure.stat().st_mtime >= STARTED:  # not an earlier run's
            said = read_json(failure)
            raise as_failed(said["message"], said["exit_code"])
        if time.monotonic() - started > SHARED_WITHIN_SECONDS and not is_there(path.parent):
            raise CheckpointError(
                f"{path.parent}: rank 0 made it {SHARED_WITHIN_SECONDS} s ago and it is not here; "
                "put output_dir on storage that all nodes share"
            )
        time.sleep(0.2)


def _failure_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.failed.json")


def software_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in SOFTWARE}


def fingerprint(recipe: dict[str, Any], tokens: Path, base: Path, base_checksum: int) -> dict[str, Any]:
    """What decides the numbers of a run: batch, data, base model, adapter; never accumulation or world size.

    Data and base are known by their content: the hash of the tokens, the checksum of the weights.
    """
    bystanders = ("logging_steps", "eval_steps", "per_device_eval_batch_size")
    config = hashlib.sha256((base / "config.json").read_bytes()).hexdigest()
    return {
        "train": {key: value for key, value in recipe["train"].items() if key not in bystanders},
        "data": {"tokens": hash_file(tokens).sha256, "eval_rows": recipe["data"]["eval_rows"]},
        "adapter": recipe["adapter"],
        "model": {**recipe["model"], "config": config, "weights": f"{base_checksum:016x}"},
    }
