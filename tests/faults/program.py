"""launch/train.py with faults put in from outside: tests/faults/program.py ORDERS.json --recipe ... [key=value ...]

Orders: `scratch` (a directory: process ids, the rows that each step took) and `faults`, a list of
{"rank": R, "at": POINT, "nth": N, "do": ACTION}: at the N-th time that rank R comes to POINT, ACTION happens.

    step K      before optimizer step K (1, 2, ...)
    eval        in the held-out loss
    write       half of a shard is written         fsync       a shard is written, not on disk
    manifest    before the manifest is written     rename      before the directory gets its name
    dirsync     renamed, the rename not on disk    rotate      an old checkpoint is renamed, not deleted
    read        while a checkpoint is being loaded

    kill, stop (SIGSTOP), TERM, USR1, sleep S, ENOSPC, EIO, EROFS, ValueError, MemoryError
    fill B: leave B bytes on the disk of output_dir       free: give them back        remove: delete checkpoints/

manifest, rename, dirsync and rotate happen on rank 0 alone: for another rank, rank 0 carries out the order on it.
"""

import builtins
import errno
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

import train as program

import abba.checkpoint.format
import abba.checkpoint.manifest
import abba.storage
import abba.training.loop

COMMIT_POINTS = ("manifest", "rename", "dirsync", "rotate")
orders = json.loads(Path(sys.argv.pop(1)).read_text())
scratch, rank = Path(orders["scratch"]), int(os.environ.get("RANK", 0))
output = Path(next(word for word in sys.argv if word.startswith("output_dir=")).removeprefix("output_dir="))
rmtree = shutil.rmtree
seen: Counter[str] = Counter()


def reach(point: str) -> None:
    """The program has come to `point`: carry out what is ordered for it."""
    seen[point] += 1
    for fault in orders["faults"]:
        carried_out_by = 0 if fault["at"] in COMMIT_POINTS else fault["rank"]
        if fault["at"] == point and fault.get("nth", 1) in (seen[point], "every") and carried_out_by == rank:
            act(fault["do"], fault["rank"])


def act(action: str, victim: int) -> None:
    pid = os.getpid() if victim == rank else int((scratch / f"pid-{victim}").read_text())
    (scratch / "happened").write_text(str(time.time()))
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "TERM": signal.SIGTERM, "USR1": signal.SIGUSR1}
    if action in signals:
        os.kill(pid, signals[action])
    elif action.startswith("sleep"):
        time.sleep(float(action.split()[1]))
    elif action.startswith("fill"):
        fill(int(action.split()[1]))
    elif action == "free":
        (output / "ballast").unlink()
    elif action == "remove":
        rmtree(output / "checkpoints")
    elif action in errno.errorcode.values():
        number = getattr(errno, action)
        raise OSError(number, os.strerror(number))
    else:
        raise getattr(builtins, action)("put in by the test")


def fill(left: int) -> None:
    """Write a file that leaves `left` bytes to everybody else."""
    with open(output / "ballast", "wb") as file:
        while (more := os.statvfs(output).f_bavail * os.statvfs(output).f_frsize - left) > 0:
            file.write(bytes(min(more, 1 << 20)))
            file.flush()


def wrap(module, name, before) -> None:
    function = getattr(module, name)

    def wrapped(*arguments, **named):
        before(*arguments, **named)
        return function(*arguments, **named)

    setattr(module, name, wrapped)


def watch_files() -> None:
    class HalfWritten(abba.storage._HashingFile):
        def __init__(self, path):
            super().__init__(path)
            self.path, self.half = path, 0

        def write(self, data):
            if self.path.name.startswith("shard-"):
                self.half += 1
                if self.half == 20:
                    view = memoryview(data).cast("B")
                    self._file.write(view[: len(view) // 2])
                    reach("write")
                    self._file.seek(-(len(view) // 2), os.SEEK_CUR)
            super().write(data)

    abba.storage._HashingFile = HalfWritten

    def before_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name.startswith("shard-"):
            reach("fsync")
        if path.name == "checkpoints" and renamed:
            renamed.clear()
            reach("dirsync")

    renamed = []

    def before_rename(old, new):
        if str(old).endswith(".tmp"):
            reach("rename")
            renamed.append(new)

    def before_rmtree(path, **_):
        if Path(path).suffix == ".tmp" and (Path(path) / "manifest.json").exists():
            reach("rotate")

    wrap(os, "fsync", before_fsync)
    wrap(os, "rename", before_rename)
    wrap(abba.checkpoint.manifest, "write_json", lambda *_: reach("manifest"))
    wrap(abba.checkpoint.format.shutil, "rmtree", before_rmtree)
    wrap(abba.checkpoint.format.ShardReader, "read_range", lambda *_: reach("read"))


def watch_steps() -> None:
    def before_step(engine, stream, step, batches, *_):
        with open(scratch / f"rows-{rank}.jsonl", "a") as file:
            file.write(json.dumps([step + 1, [batch.rows for batch in batches]]) + "\n")
        reach(f"step {step + 1}")

    wrap(abba.training.loop, "optimizer_step", before_step)
    wrap(abba.training.loop, "held_out_loss", lambda *_: reach("eval"))


if __name__ == "__main__":
    (scratch / f"pid-{rank}").write_text(str(os.getpid()))
    watch_files()
    watch_steps()
    sys.exit(program.main())
