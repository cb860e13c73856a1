"""What a run says: metrics.jsonl for programs; a progress bar on a terminal, plain lines elsewhere."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from abba.training.failures import tell
from abba.training.startup import Startup


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: on a GPU allocated by torch, on a CPU resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Reporter:
    """Rank 0 writes and prints; the others keep silent.

    Args:
        path: metrics.jsonl, or None on the other ranks.
        steps: of the whole run, for the bar and the ETA.
        logging_steps: how often a plain line is printed where there is no terminal, and slow ranks are looked for.
        startup: what the way to the first step took; said with it.
        track: told of the numbers of each step, for where else the recipe logs to.
    """

    def __init__(
        self,
        path: Path | None,
        steps: int,
        logging_steps: int,
        startup: Startup,
        track: Callable[[Mapping[str, float]], None] = lambda values: None,
    ) -> None:
        self._file = open(path, "ab", buffering=0) if path is not None else None  # noqa: SIM115  closed by __exit__
        self._pending = b""  # lines that a full disk has not taken yet
        self._steps, self.logging_steps, self._startup, self._track = steps, logging_steps, startup, track
        self._console = Console(soft_wrap=True, highlight=False) if path is not None else None
        self._started, self._first_step = time.monotonic(), None
        self._bar: Progress | None = None
        if self._console is not None and self._console.is_terminal:
            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("starting", total=steps)
            self._bar.start()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._file is not None:
            self._file.close()
            if self._pending:
                self.say(f"metrics.jsonl: WARNING: its last {len(self._pending)} bytes are lost")

    def say(self, line: str) -> None:
        """One plain line, on rank 0."""
        if self._console is not None:
            if self._bar is None:
                tell(line, self._console.file)
            else:
                with suppress(OSError, SystemExit):  # as `tell`; rich ends a program whose reader is gone
                    self._console.print(line, markup=False)
                    sys.stdout.flush()

    def step(self, record: dict[str, Any]) -> None:
        """A finished optimizer step; `record` goes to metrics.jsonl as it is."""
        if self._file is None:
            return
        self._write(record)
        done = record["step"]
        self._pass_on(done, {key: value for key, value in record.items() if isinstance(value, int | float)})
        if self._first_step is None:
            self._first_step = done - 1
        short = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=short)
        elif done % self.logging_steps == 0 or done in (self._first_step + 1, self._steps):
            eta = (time.monotonic() - self._started) / (done - self._first_step) * (self._steps - done)
            self.say(
                f"step {done}/{self._steps}  {short}  lr {record['learning_rate']:.2e}  "
                f"grad {record['grad_norm']:.3f}  {record['step_seconds']:.2f} s/step  ETA {_clock(eta)}"
            )
        if done == self._first_step + 1:
            self._startup.done("first step")
            self._write({"step": done, "startup_seconds": self._startup.seconds})
            self.say(f"start: {self._startup.total:.1f} s to the end of the first step: {self._startup}")

    def evaluated(self, step: int, loss: float) -> None:
        """The held-out loss after `step`, as a line of its own."""
        if self._file is not None:
            self._write({"step": step, "eval_loss": loss})
            self._pass_on(step, {"eval_loss": loss})
            self.say(f"step {step}/{self._steps}  eval loss {loss:.4f}")

    def saved(self, step: int, cost: dict[str, Any]) -> None:
        """A checkpoint after `step`: a line of its own, because the step's has to be on disk before the commit."""
        if self._file is not None:
            self._write({"step": step, **cost})
            self.say(f"step {step}/{self._steps}  saved {cost['save_bytes']:,} bytes in {cost['save_seconds']:.1f} s")
            if "save_warning" in cost:
                self.say(f"checkpoint: WARNING: {cost['save_warning']}")

    def _pass_on(self, step: int, values: Mapping[str, float]) -> None:
        try:
            self._track(values)
        except OSError as error:
            self.say(f"metrics: WARNING: step {step} is not where else the recipe logs to: {error.strerror}")

    def _write(self, record: dict[str, Any]) -> None:
        self._pending += json.dumps(record).encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            self.say(f"metrics.jsonl: WARNING: step {record['step']} cannot be written yet: {error.strerror}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
