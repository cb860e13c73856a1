"""Runs that are hurt and started again: on warm-forked ranks a cycle costs seconds.

How many trials: 3 in `make test`, 10 in CI, 100 in `make test-faults`, by ABBA_TRIALS. No failure in n trials means a
rate below 3/n at 95% confidence. Random choices come from ABBA_SEED, which the table of results states.
"""

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from abba.base_model import choose_dtype
from abba.checkpoint.format import KINDS, ShardReader, list_checkpoints, read_state
from tests import warm
from tests.distributed.ranks import NOTHING_STAYS, STORIES, free_port

TRIALS = int(os.environ.get("ABBA_TRIALS", 3))
SEED = int(os.environ.get("ABBA_SEED", 2026))
STEPS, SAVE_STEPS = 24, 4
LAYERS = 2 if TRIALS >= 100 else 1  # most of a toy's step is what DeepSpeed does for each module
CHECKPOINT_BYTES = 104_000 * LAYERS  # of a checkpoint, about
# DeepSpeed's launcher does it after a second; later, so that it is shown what the ranks do without it.
LAUNCHER_TELLS_SECONDS = 7


# Rows that make test, or CI, has no time for.
beyond_make_test = pytest.mark.skipif(TRIALS < 10, reason="takes long; runs with ABBA_TRIALS=10, as in CI")
beyond_ci = pytest.mark.skipif(TRIALS < 100, reason="takes long; runs with ABBA_TRIALS=100")
computes_much_in_bfloat16 = pytest.mark.skipif(
    choose_dtype("auto")[0] != "bfloat16" and TRIALS < 100,
    reason="this CPU has no instructions for bfloat16, which takes minutes; runs with ABBA_TRIALS=100",
)


def some(cases: list, few: list) -> list:
    """All of them in `make test-faults`, a third in CI, `few` in `make test`."""
    return cases if TRIALS >= 100 else cases[::3] if TRIALS >= 10 else few


def chance(name: str) -> random.Random:
    """A random stream of its own for each test."""
    return random.Random(f"{SEED} {name}")


@dataclass
class Cluster:
    """Ranks that were started and may be killed; `wait` gives their exit codes and when the last one ended."""

    programs: list[warm.Program]
    scratch: Path
    ended: dict[int, float] = field(default_factory=dict)
    first_bad_end: float = float("inf")

    def pids(self) -> list[int]:
        return [program.process.pid for program in self.programs]

    def wait(self, timeout: float = 120) -> list[warm.Finished]:
        """As a launcher does: when a rank has ended badly, the others are told to end too, but late."""
        deadline, told = time.time() + timeout, False
        while len(self.ended) < len(self.programs) and time.time() < deadline:
            for rank, program in enumerate(self.programs):
                if rank not in self.ended and program.process.exitcode is not None:
                    self.ended[rank] = time.time()
                    if program.process.exitcode != 0:
                        self.first_bad_end = min(self.first_bad_end, time.time())
            if time.time() - self.first_bad_end > LAUNCHER_TELLS_SECONDS and not told:
                told = True
                for program in self.programs:
                    program.process.terminate()
            time.sleep(0.02)
        return [program.wait(1) for program in self.programs]

    def happened(self, timeout: float = 60) -> None:
        """Wait until an ordered fault has happened."""
        wait_for((self.scratch / "happened").exists, "the fault has not happened", timeout)

    def says(self, words: str, timeout: float = 60) -> None:
        """Wait until rank 0 has printed `words`."""
        said = self.scratch / "rank-0/stdout"
        wait_for(lambda: words in said.read_text(), f"it does not say {words!r}", timeout)

    def kill(self, *ranks: int) -> None:
        (self.scratch / "happened").write_text(str(time.time()))
        for rank in ranks:
            os.kill(self.programs[rank].process.pid, signal.SIGKILL)

    def survived(self) -> float:
        """Seconds between the fault and the end of the last rank."""
        return max(self.ended.values()) - float((self.scratch / "happened").read_text())


def wait_for(condition: Callable[[], bool], otherwise: str, timeout: float) -> None:
    deadline = time.time() + timeout
    while not condition():
        assert time.time() < deadline, otherwise
        time.sleep(0.01)


class Lab:
    """One base and one recipe; runs of it, by name, in directories of their own."""

    def __init__(self, base: Path, root: Path, *overrides: str) -> None:
        self.root, self._starts = root, 0
        fixed = [f"model.name_or_path={base}", f"data.path={STORIES / 'train.jsonl'}", "data.max_rows=60"]
        fixed += [f"data.prepared_path={root / 'prepared'}"]
        fixed += ["data.eval_rows=4", "train.eval_steps=12", "adapter.r1=4", "adapter.r2=3", "data.max_length=96"]
        fixed += ["train.global_batch_size=8", "train.per_device_train_batch_size=2", f"train.max_steps={STEPS}"]
        fixed += ["train.gradient_checkpointing=none"]
        fixed += [f"checkpoint.save_steps={SAVE_STEPS}", "train.learning_rate=1e-2", "train.ddp_timeout=20"]
        self.arguments = ["--recipe", "quickstart", *fixed, *NOTHING_STAYS, *overrides]

    def start(
        self, run: str, world: int = 2, faults: list[dict] | None = None, *overrides: str, **variables
    ) -> Cluster:
        self._starts += 1
        scratch = self.root / f"start-{self._starts:04d}"
        scratch.mkdir(parents=True)
        (scratch / "orders.json").write_text(json.dumps({"scratch": str(scratch), "faults": faults or []}))
        (self.root / run).mkdir(exist_ok=True)
        with (self.root / run / "starts").open("a") as file:
            file.write(f"{scratch}\n")
        command = ["tests/faults/program.py", str(scratch / "orders.json"), *self.arguments]
        command += [f"output_dir={self.output(run)}", *overrides]
        common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), **variables}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        programs = []
        for rank in range(world):
            mine = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            programs.append(warm.Program(scratch / f"rank-{rank}", command, mine))
        return Cluster(programs, scratch)

    def run(self, run: str, world: int = 2, faults: list[dict] | None = None, *overrides: str, **variables):
        """The exit code and words of each rank."""
        cluster = self.start(run, world, faults, *overrides, **variables)
        try:
            return cluster.wait(), cluster
        finally:
            for program in cluster.programs:
                program.kill()

    def complete(self, run: str, world: int = 2, *overrides: str) -> "Outcome":
        finished, _ = self.run(run, world, None, *overrides)
        assert [rank.returncode for rank in finished] == [0] * world, finished[0].stderr + finished[-1].stderr
        return self.outcome(run)

    def again(self, run: str) -> None:
        """Forget that starts made no progress, as the message of exit code 76 says."""
        (self.output(run) / "starts.json").unlink(missing_ok=True)

    def output(self, run: str) -> Path:
        return self.root / run / "out"

    def checkpoints(self, run: str) -> list[str]:
        return [path.name for path in list_checkpoints(self.output(run) / "checkpoints")]

    def outcome(self, run: str) -> "Outcome":
        directory = self.output(run)
        checkpoint = list_checkpoints(directory / "checkpoints")[-1]
        state, digest = read_state(checkpoint), hashlib.sha256()
        with ShardReader(checkpoint, state) as reader:
            for kind in KINDS:
                for name in state.tensors:
                    digest.update(reader.read(kind, name).numpy().tobytes())
        records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        losses = [(record["step"], record["loss"].hex()) for record in records if "loss" in record]
        held_out = [(record["step"], record["eval_loss"].hex()) for record in records if "eval_loss" in record]
        return Outcome(state.step, digest.hexdigest(), losses, held_out, self._rows(run))

    def _rows(self, run: str) -> dict[int, list[list[int]]]:
        """Step -> its micro-batches in their global order, as it was last computed."""
        taken = {}
        for scratch in map(Path, (self.root / run / "starts").read_text().splitlines()):
            by_rank = [
                {step: batches for step, batches in map(json.loads, path.read_text().split("\n")[:-1])}
                for path in sorted(scratch.glob("rows-*.jsonl"))
            ]
            for step in set.intersection(*map(set, by_rank)) if by_rank else ():
                turns = zip(*(batches[step] for batches in by_rank), strict=True)
                taken[step] = [batch for turn in turns for batch in turn]
        return taken


@dataclass(frozen=True)
class Outcome:
    """What has to be equal for a run to count as the same: step, state, losses to the bit, rows in their order."""

    step: int
    state: str
    losses: list[tuple[int, str]]
    held_out: list[tuple[int, str]]
    rows: dict[int, list[list[int]]]
