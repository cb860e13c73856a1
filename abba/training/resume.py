"""Where a run goes on: its newest valid checkpoint, if what decides the numbers is still the same."""

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from abba import __version__
from abba.adapter.config import BASELINES
from abba.adapter.directory import read_description
from abba.adapter.initialize import seed_for
from abba.base_model import load_tokenizer
from abba.checkpoint.format import MANIFEST, CheckpointState, list_checkpoints, read_state
from abba.errors import CheckpointError, RecipeError
from abba.layout import CHECKPOINTS
from abba.sharded.checkpoint import newest_valid_together, restore_random_state
from abba.sharded.ranks import Ranks
from abba.sharded.together import agree, share
from abba.text.chat import ChatTemplate
from abba.text.prompt import CHAT
from abba.training.attention import line_tokens
from abba.training.run_directory import RunDirectory

SOFTWARE = ("torch", "deepspeed", "transformers", "safetensors")
# What changes what is shown or when it is saved, not what is computed.
BYSTANDERS = ("logging_steps", "eval_steps", "per_device_eval_batch_size", "ddp_timeout")
WEIGHTS = "model.weights"  # a checksum that is known once the base is loaded
MEANING = {  # of what nobody has typed
    "data.tokens": ", the hash of the rows and how they are tokenised,",
    "model.config": ", the hash of the base's config.json,",
    WEIGHTS: ", the checksum of the base's weights,",
}
CHAT_TEMPLATE = "data.chat_template"  # for scoring: what is trained on are the tokens, which have a hash of their own


@dataclass(frozen=True)
class ResumePoint:
    """A verified checkpoint to continue from."""

    directory: Path
    state: CheckpointState
    owes_held_out: bool = False  # the start that saved it was stopped or killed before the held-out loss there


def fingerprint(recipe: Mapping[str, Any], tokens: str, base: Path) -> dict[str, Any]:
    """What decides the numbers of a run: batch, data, base, adapter, software; never accumulation or world size.

    Data and base are known by their content, so that they may move: the hash of the tokens, that of the base's
    config.json, and, added once it is loaded, the checksum of its weights. The recipe names what "auto" came to.
    """
    model = {key: value for key, value in recipe["model"].items() if key not in ("name_or_path", "revision")}
    data, method, attention = recipe["data"], recipe["adapter"]["method"], model["attn_implementation"]
    used = {"flash_attn": attention.startswith("flash"), "peft": method in BASELINES}
    software = (*SOFTWARE, *(name for name, is_used in used.items() if is_used))
    config = hashlib.sha256((base / "config.json").read_bytes()).hexdigest()
    weights = [source["weight"] for source in data["sources"] or []] or [1.0]
    most = line_tokens(attention, data["max_length"]) if data["packing"] else None
    packing = "one line" if most == math.inf else most  # the rows of a line decide how sums are rounded
    chat = {"chat_template": ChatTemplate(load_tokenizer(base)).digest} if data["prompt"] == CHAT else {}
    return {
        "train": {key: value for key, value in recipe["train"].items() if key not in BYSTANDERS},
        "data": {"tokens": tokens, "weights": weights, "eval_rows": data["eval_rows"], "packing": packing, **chat},
        "adapter": {key: value for key, value in recipe["adapter"].items() if key != "cache_factors"},
        "model": {**model, "config": config},
        # Our own by itself: a checkout may run without having been installed, as in a container.
        "software": {"abba-recipes": __version__} | {name: importlib.metadata.version(name) for name in software},
    }


def refuse_no_start(base: str, init_from: str | None, resume: str, directory: RunDirectory) -> None:
    """Before anything is loaded: what a run is to start from has to be there, and to stay there.

    Args:
        base: `model.name_or_path`.

    Raises:
        CheckpointError: adapter.init_from is no adapter, checkpoint.resume names no checkpoint, or the run would
            replace what it starts from.
    """
    directory.refuse_as_input("model.name_or_path", base)
    if not _candidates(resume, directory.checkpoints) and init_from is not None:
        directory.refuse_as_input("adapter.init_from", init_from)
        read_description(Path(init_from))


def find_resume_point(
    resume: str, strict: bool, root: Path, ranks: Ranks, device: torch.device, say: Callable[[str], None]
) -> ResumePoint | None:
    """The newest valid checkpoint of `root`, else of the other run or the checkpoint that `resume` names. Collective.

    Raises:
        CheckpointError: there are checkpoints and none of them verifies; or with `strict`, the newest does not.
    """
    # Rank 0's listing decides: on a shared file system another rank may not see the newest name yet.
    found: list[Path] = []
    agree(lambda: found.extend(_candidates(resume, root)) if ranks.is_main else None, device)
    candidates = [Path(name) for name in json.loads(share(json.dumps([str(p) for p in found]).encode(), device)[0])]
    where = candidates[0].parent if candidates else root
    if candidates and resume != "auto" and where == root:
        say(f"checkpoint: {root} has checkpoints of its own; checkpoint.resume={resume} was for the first start")

    def passed_over(reason: str) -> None:
        if strict:
            raise CheckpointError(f"{reason}; checkpoint.strict is set")
        say(f"checkpoint: WARNING: passed over {reason}")

    directory = newest_valid_together(candidates, ranks, device, passed_over)
    if directory is not None:
        state = read_state(directory)
        say(f"checkpoint: continuing from {directory}, step {state.step}, saved by {state.world_size} rank(s)")
        return ResumePoint(directory, state)
    if candidates:
        raise CheckpointError(
            f"{where}: none of its {len(candidates)} checkpoints is valid; to start over, set checkpoint.resume=never "
            "and overwrite_output_dir=true"
        )
    return None


def refuse_changes(
    point: ResumePoint, now: Mapping[str, Any], allowed: list[str], steps: int, say: Callable[[str], None]
) -> None:
    """Compare fingerprints, all but the weights.

    Raises:
        CheckpointError: names each field that differs and is not allowed to; or the checkpoint is past the last step.
        RecipeError: `allowed` names a field that does not exist.
    """
    current, saved = dict(_flat(now)), dict(_flat(point.state.fingerprint))
    known = current.keys() | saved.keys()
    for name in allowed:
        if not any(_covers(name, field) for field in known):
            raise RecipeError(f"checkpoint.allow_changed: no field {name!r}; there are {', '.join(sorted(known))}")
    _refuse_different(point, current, saved, sorted(known - {CHAT_TEMPLATE, WEIGHTS}), allowed, say)
    if point.state.step > steps:
        raise CheckpointError(f"{point.directory}: is past the last of {steps} steps; choose another output_dir")


def refuse_other_weights(point: ResumePoint, checksum: str, allowed: list[str], say: Callable[[str], None]) -> None:
    """Once they are loaded.

    Raises:
        CheckpointError: they are not those of the checkpoint, and are not allowed to differ.
    """
    saved = dict(_flat(point.state.fingerprint))
    _refuse_different(point, {WEIGHTS: checksum}, saved, [WEIGHTS], allowed, say)


def _refuse_different(
    point: ResumePoint,
    current: Mapping[str, Any],
    saved: Mapping[str, Any],
    fields: list[str],
    allowed: list[str],
    say: Callable[[str], None],
) -> None:
    refused = []
    for field in (field for field in fields if current.get(field) != saved.get(field)):
        change = f"{field}{MEANING.get(field, '')} was {_short(saved.get(field))}, is {_short(current.get(field))}"
        if any(_covers(name, field) for name in allowed):
            say(f"checkpoint: {change}, as checkpoint.allow_changed allows")
        else:
            refused.append(change)
    if refused:
        raise CheckpointError(
            f"{point.directory}: belongs to another run: {'; '.join(refused)}; set it back, choose another output_dir, "
            "or list the field in checkpoint.allow_changed"
        )


def continue_random_streams(
    point: ResumePoint, seed: int, ranks: Ranks, device: torch.device, say: Callable[[str], None]
) -> None:
    """Dropout goes on where it stopped; at another world size, where no rank is the same, it starts anew."""
    if not restore_random_state(point.directory, point.state, ranks, device):
        torch.manual_seed(seed_for(f"rank {ranks.rank} of {ranks.world_size}, step {point.state.step}", seed))
        say(
            f"checkpoint: {point.state.world_size} rank(s) then, {ranks.world_size} now: the same rows in the same "
            "order; sums are rounded in another order, and dropout draws anew where the base has any"
        )


def refuse_foreign_end(last: Path, root: Path) -> None:
    """Raises CheckpointError when a run would begin with another run's last checkpoint: nothing would be its own."""
    if last.parent != root:
        raise CheckpointError(
            f"checkpoint.resume: {last} has no step left to train; convert it (python launch/convert.py {last} DST), "
            "or raise train.max_steps and list it in checkpoint.allow_changed"
        )


def _candidates(resume: str, root: Path) -> list[Path]:
    """Checkpoints to choose from, in the order of their steps: the run's own, before its first those of `resume`.

    Raises:
        CheckpointError: `resume` is inside the run's own directory, names none, or something may not be looked at.
    """
    try:
        return [] if resume == "never" else _listed(resume, root)
    except (OSError, ValueError, RuntimeError) as error:  # permissions; too long; a NUL; links in a circle
        known = isinstance(error, OSError)
        which, reason = (error.filename or resume, error.strerror) if known else (resume, error)
        raise CheckpointError(
            f"checkpoint.resume: {which}: cannot be looked at: {reason}; change its permissions or give another path"
        ) from error


def _listed(resume: str, root: Path) -> list[Path]:
    path = Path(resume)
    if resume != "auto" and root.resolve() in (path.resolve(), *path.resolve().parents):
        raise CheckpointError(
            f"checkpoint.resume: {resume} lies in this run's own output_dir, whose newest checkpoint is continued "
            "anyway; to go back to an older one, give a new output_dir"
        )
    own = list_checkpoints(root)
    if own or resume == "auto":
        return own
    found = [path] if (path / MANIFEST).is_file() else list_checkpoints(path / CHECKPOINTS) or list_checkpoints(path)
    if not found:
        raise CheckpointError(
            f"checkpoint.resume: {path} is neither a checkpoint nor a run that has one; "
            "write auto, never, or such a path"
        )
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _covers(name: str, field: str) -> bool:
    return field == name or field.startswith(f"{name}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:24]}..."
