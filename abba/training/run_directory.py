"""The directory of a run: who may use it, and what an earlier start has left there."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from abba import layout
from abba.adapter.files import refuse_occupied
from abba.checkpoint.format import list_checkpoints, remove_checkpoints, remove_leftovers
from abba.errors import CheckpointError, DataError, NoProgressError, PreemptedError, RecipeError
from abba.storage import free_bytes, in_gb, make_directory, read_json, write_json
from abba.training.run_lock import RunLock
from abba.training.yaml_file import dump_yaml

STARTS = 3  # in a row that may end without a new checkpoint
CHECKPOINT_BYTES_PER_PARAMETER = 12  # an fp32 master and two moments
SMALL_FILES_BYTES = 1_000_000  # headers, state, metrics
LEFT_BY_KILLED = (".adapter.tmp-*", ".model.tmp-*", ".lock.json.*", ".write-test-*")


class RunDirectory:
    """Paths inside a run's directory, as abba/layout.py says, and the right to write there."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / layout.RECIPE
        self.metrics = self.path / layout.METRICS
        self.checkpoints = self.path / layout.CHECKPOINTS
        self.adapter = self.path / layout.ADAPTER
        self.model = self.path / layout.MODEL
        self.evaluation = self.path / layout.EVALUATION
        self.failures = self.path / "failures"
        self._results = (self.adapter, self.model, self.evaluation, self.path / layout.LATER_EVALUATION)
        self._begun = self.path / "begun.json"
        self._starts = self.path / "starts.json"
        self._lock: RunLock | None = None

    @contextmanager
    def held(self, resume: str, overwrite: bool, job: str | None, say: Callable[[str], None]) -> Iterator[str]:
        """Make it, lock it, count this start and name it; one process of a run does this.

        Raises:
            CheckpointError: it cannot be written, another run is alive in it, or an earlier one would be lost.
            NoProgressError: the last STARTS starts got no further.
        """
        make_directory(self.path, "output_dir")
        with ExitStack() as stack:
            with self._writing():
                self._lock = stack.enter_context(RunLock(self.path / "lock.json", job, say))
                self._check_earlier_run(resume, overwrite)
                self._count_start()
                self._clean_up(say)
            try:
                yield self._lock.token
            except (RecipeError, DataError, CheckpointError, PreemptedError, KeyboardInterrupt):
                self.release(uncount=True)  # not one of a loop of crashes
                raise
            self.release(uncount=True)

    def resume_of(self, wanted: str, job: str | None, requeued: int) -> str:
        """`wanted`, but auto in place of never for a job that began this run before it was requeued.

        SLURM gives it the same arguments: at each requeue it would discard what it has just saved.
        """
        try:
            begun = read_json(self._begun)
            is_own = job is not None and begun["job"] == job and int(begun["requeued"]) < requeued
        except (CheckpointError, KeyError, TypeError, ValueError):  # no run has begun here, or not in a job
            return wanted
        return "auto" if is_own and wanted == "never" else wanted

    def confirm(self) -> None:
        """Raises RankLostError when another run has taken over this directory."""
        self._lock.confirm()

    def release(self, uncount: bool) -> None:
        """Let the next start have it at once; `uncount` this one, unless it crashed or never came to a save."""
        if self._lock is not None and self._lock.is_ours():
            if uncount:
                self.got_on()
            self._lock.release()

    def got_on(self) -> None:
        """No start so far is one of a loop of crashes."""
        self._starts.unlink(missing_ok=True)

    def refuse_as_input(self, key: str, path: str) -> None:
        """Raises CheckpointError when `path`, which a recipe's `key` names, lies in what this run replaces."""
        place = Path(os.path.realpath(path))
        for own in (self.checkpoints, *self._results):
            if Path(os.path.realpath(own)) in (place, *place.parents):
                raise CheckpointError(
                    f"{key}: {path} lies in {own}, which this run replaces; choose another output_dir"
                )

    def begin(
        self,
        recipe: dict[str, Any],
        step: int,
        say: Callable[[str], None],
        job: str | None = None,
        requeued: int = 0,
    ) -> None:
        """Write recipe.yaml and leave what belongs to the first `step` steps; called right before the loop.

        Only what a run writes is deleted: somebody else's files in the same directory stay.
        """
        with self._writing():
            if step == 0:
                remove_checkpoints(self.checkpoints)
                for path in self._results:
                    shutil.rmtree(path, ignore_errors=True)
            for path in remove_leftovers(self.checkpoints):
                say(f"checkpoint: removed {path}, which an earlier start left unfinished")
            self._keep_metrics(step, say)
            self.recipe.write_text(dump_yaml(recipe), encoding="utf-8")
            if job is None:
                self._begun.unlink(missing_ok=True)
            else:
                write_json(self._begun, {"job": job, "requeued": requeued})

    def held_out_steps(self) -> set[int | None]:
        """After which the metrics have a held-out loss."""
        try:
            lines = self.metrics.read_bytes().splitlines() if self.metrics.is_file() else []
        except OSError as error:
            raise CheckpointError(f"{self.metrics}: {error.strerror}; move it away to go on without it") from error
        return {_step_of(line) for line in lines if b'"eval_loss"' in line}

    def refuse_too_small(self, parameters: int, first: int, steps: int, save_steps: int | None, keep: int) -> None:
        """Before step `first`: raises CheckpointError when what the run will hold at once does not fit the disk.

        `parameters` train. `keep` + 1 checkpoints exist while the oldest is being replaced.
        """
        every = save_steps or steps
        saves = -(-steps // every) - first // every
        more = max(1, min(saves, keep + 1 - len(list_checkpoints(self.checkpoints))))
        needed = parameters * (more * CHECKPOINT_BYTES_PER_PARAMETER + 4) + SMALL_FILES_BYTES
        free = free_bytes(self.path)
        if free < needed:
            what = "a checkpoint" if more == 1 else f"{more} checkpoints"
            fewer = " lower checkpoint.save_total_limit," if more > 1 and keep > 1 else ""
            raise CheckpointError(
                f"output_dir {self.path}: no space: {what} and the adapter need {in_gb(needed)}, "
                f"{in_gb(free)} are free; make room,{fewer} or choose another output_dir"
            )

    def _check_earlier_run(self, resume: str, overwrite: bool) -> None:
        for result in (self.adapter, self.model):
            refuse_occupied(result, overwrite=True)
        results = [path for path in self._results if path.exists()]
        earlier = [path for path in (self.checkpoints, *results, self.metrics) if path.exists()]
        if resume == "never" and earlier and not overwrite:
            raise CheckpointError(
                f"output_dir {self.path}: holds {earlier[0].name} of an earlier run; choose another output_dir, "
                "continue that run with checkpoint.resume=auto, or discard it with overwrite_output_dir=true"
            )
        if resume != "never" and results and not list_checkpoints(self.checkpoints):
            raise CheckpointError(
                f"output_dir {self.path}: holds {results[0].name} and no checkpoint to continue from; choose another "
                "output_dir, or discard it with checkpoint.resume=never overwrite_output_dir=true"
            )
        if self.recipe.exists() and not earlier and not overwrite:  # a run makes the metrics first
            raise CheckpointError(
                f"output_dir {self.path}: holds a {self.recipe.name} that no run has written and that this one would "
                "replace; rename it, or choose another output_dir"
            )

    def _count_start(self) -> None:
        present = list_checkpoints(self.checkpoints)
        newest = present[-1].name if present else "the start"
        try:
            earlier = read_json(self._starts)
            count = int(earlier["count"]) if earlier["newest"] == newest else 0
        except (CheckpointError, KeyError, TypeError, ValueError):  # none yet, or none that counts
            count = 0
        if count >= STARTS:
            said = [_what_failed(path) for path in sorted(self.failures.glob("*-rank-*.json"))]
            raise NoProgressError(
                f"{self.path}: {count} starts in a row ended without a checkpoint after {newest}; "
                f"the last one: {said[0] if said else 'no rank could say why, see its log'}; "
                f"when the cause is mended, delete {self._starts} and start again"
            )
        temporary = self._starts.with_suffix(".tmp")
        write_json(temporary, {"newest": newest, "count": count + 1})
        temporary.replace(self._starts)

    def _clean_up(self, say: Callable[[str], None]) -> None:
        """Delete what earlier starts, which were killed, were about to write; and why they failed."""
        for pattern in LEFT_BY_KILLED:
            for path in self.path.glob(pattern):
                if self._lock.token in path.name:
                    continue
                say(f"output_dir: removed {path}, which an earlier start left unfinished")
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        shutil.rmtree(self.failures, ignore_errors=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise CheckpointError(
                f"output_dir {self.path}: cannot be written: {where}{error.strerror}; {in_gb(free_bytes(self.path))} "
                "are free; make room, or choose another output_dir"
            ) from error

    def _keep_metrics(self, step: int, say: Callable[[str], None]) -> None:
        """Drop the lines of steps that will be computed again, and what a kill left of a last line."""
        # Bytes: a flipped bit need not leave text.
        written = self.metrics.read_bytes() if step and self.metrics.is_file() else b""
        lines = [line for line in written.splitlines(keepends=True) if line.endswith(b"\n")]
        kept = self.metrics.with_name(f".{self.metrics.name}")
        steps = [_step_of(line) for line in lines]
        if unreadable := steps.count(None):
            say(f"metrics.jsonl: WARNING: dropped {unreadable} damaged lines of an earlier start")
        kept.write_bytes(b"".join(line for line, at in zip(lines, steps, strict=True) if at is not None and at <= step))
        kept.replace(self.metrics)


def _what_failed(path: Path) -> str:
    try:
        return str(read_json(path)["what"])
    except (CheckpointError, KeyError, TypeError):
        return f"{path} cannot be read"


def _step_of(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
