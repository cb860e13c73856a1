"""One run at a time in a run directory. A dead run's place is taken over; a living one's is refused.

The lock is a file that says who holds it; its modification time is the heartbeat. A process id means something on its
own machine only, so from elsewhere the heartbeat decides, by the clock of the file system that holds it.
"""

import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from abba.errors import CheckpointError, RankLostError
from abba.training.processes import machine, process_started

BEAT_SECONDS, DEAD_AFTER_SECONDS, SETTLE_SECONDS = 10, 120, 3


class RunLock:
    """Held while in its `with` block, by one process of a run.

    Args:
        job: the batch system's job id. A requeued job keeps it, so it takes over from its own earlier life.

    Raises:
        CheckpointError: another run is alive in this directory.
    """

    def __init__(self, path: Path, job: str | None, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        pid = os.getpid()
        self.token = secrets.token_hex(8)
        self._mine = {"token": self.token, "job": job, "host": socket.gethostname()}
        self._mine |= {"machine": machine(), "pid": pid, "started": process_started(pid)}
        self._released = threading.Event()

    def __enter__(self) -> "RunLock":
        draft = self._path.with_name(f".{self._path.name}.{self.token}")
        draft.write_text(json.dumps(self._mine))
        try:
            while not self._taken(draft):
                pass
        finally:
            draft.unlink(missing_ok=True)
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        self._released.set()
        if self.is_ours():
            self._path.unlink(missing_ok=True)

    def confirm(self) -> None:
        """Raises RankLostError when another run has taken over, as it may after this one was suspended."""
        if not self.is_ours():
            raise RankLostError(f"{self._path.parent}: another run has taken over this directory; this one stops")

    def _taken(self, draft: Path) -> bool:
        """One attempt; False to look again because the holder has changed meanwhile."""
        if self._created(draft):
            return True
        holder = _read(self._path)
        if holder is None:
            return False
        try:
            why = self._why_dead(holder, draft)
        except FileNotFoundError:  # it has let go
            return False
        if why is None:
            who = f"job {holder['job']}" if holder.get("job") else f"process {holder.get('pid')}"
            raise CheckpointError(
                f"output_dir {self._path.parent}: another run ({who} on {holder.get('host')}) is alive in it; "
                "wait for its end, or choose another output_dir"
            )
        self._say(f"output_dir: taking over from a run on {holder.get('host')}: {why}")
        if (_read(self._path) or {}).get("token") != holder.get("token"):
            return False
        os.replace(shutil.copy(draft, f"{draft}.taking"), self._path)
        # Of several that take over at once the last one has it; other machines see it some seconds later.
        time.sleep(0.5 if holder.get("machine") == self._mine["machine"] else SETTLE_SECONDS)
        return self.is_ours()

    def _created(self, draft: Path) -> bool:
        """Whether there was no lock and now there is ours, whole from the first moment."""
        try:
            os.link(draft, self._path)
            return True
        except FileExistsError:
            return self.is_ours()  # a network file system may have lost its first answer
        except OSError:  # a file system without hard links
            try:
                with self._path.open("x") as file:
                    file.write(json.dumps(self._mine))
                return True
            except FileExistsError:
                return False

    def _why_dead(self, holder: dict[str, Any], draft: Path) -> str | None:
        if holder.get("machine") == self._mine["machine"]:
            alive = process_started(holder.get("pid", 0)) == holder.get("started")
            return None if alive else f"its process {holder.get('pid')} is gone"
        if self._mine["job"] is not None and holder.get("job") == self._mine["job"]:
            return f"this is the same job {holder['job']}, started again"
        age, beat = self._age(draft), self._path.stat().st_mtime_ns
        if age <= DEAD_AFTER_SECONDS:
            self._say(f"output_dir: held by a run on {holder.get('host')}; waiting for a sign of life")
        while age <= DEAD_AFTER_SECONDS:
            time.sleep(1)
            if self._path.stat().st_mtime_ns != beat:
                return None
            age = self._age(draft)
        return f"its last sign of life is {age:.0f} s old"

    def _age(self, draft: Path) -> float:
        """Seconds since the holder's last heartbeat. Raises FileNotFoundError when it has let go."""
        draft.touch()  # both times are then the file system's
        return draft.stat().st_mtime - self._path.stat().st_mtime

    def is_ours(self) -> bool:
        return (_read(self._path) or {}).get("token") == self.token

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                if self.is_ours():
                    os.utime(self._path)
            except OSError:  # a network file system's bad moment; twelve beats may be missed
                continue


def _read(path: Path) -> dict[str, Any] | None:
    """What the lock says; None when there is none; {} when it is damaged."""
    try:
        said = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
