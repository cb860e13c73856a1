"""What one rank's failure means to the others: each says in the run directory why it ends, and all end with it.

Not every launcher ends the others, a dead peer may leave them in a collective for half an hour, and the error that they
get there ("connection closed") is not the one that a user needs.
"""

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple, TextIO

from abba.errors import AbbaError, CheckpointError, RankLostError, RecipeError, first_line
from abba.storage import read_json, write_json
from abba.training.processes import machine, own_start_time, process_started

EVIDENCE_SECONDS = 4  # how long the cause of a broken connection is looked for
OTHERS_SPEAK_SECONDS = 3  # rank 0 speaks first and the launcher ends the others, so that an error is shown once
PARTING_SECONDS = 30  # what a process with a GPU may take to end


class Peer(NamedTuple):
    """A rank on this machine, known by process id and start."""

    pid: int
    started: int | None


@dataclass(frozen=True)
class Failure:
    """Why a rank ended: one line, and the exit code that all share."""

    rank: int
    what: str
    exit_code: int
    is_echo: bool = False  # a broken connection, the consequence of something else


def tell(line: str, file: TextIO | None = None) -> None:
    """A line for people, on stdout by default. A log whose disk is full, or whose reader is gone, ends no run."""
    with suppress(OSError):
        print(line, file=file or sys.stdout, flush=True)


def wait_for_end(others: list[Peer]) -> None:
    """Wait until these processes of this machine are gone, and the memory of their GPUs free, but not for ever."""
    deadline = time.monotonic() + PARTING_SECONDS
    while any(process_started(peer.pid) == peer.started for peer in others) and time.monotonic() < deadline:
        time.sleep(0.05)


class World:
    """What this rank knows of the others. What each announces lies in RUN/failures/, a file per start and failed rank.

    Nothing is announced before `start` is known, which rank 0 has with the lock and the others when they meet it: until
    then the directory may be another run's.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1
        self.step = 0  # being computed, counted from 1
        self.peers: dict[int, Peer] = {}  # other ranks of this machine that must be alive
        self.failures: Path | None = None
        self.start: str | None = None  # names this start of the run
        self._since = own_start_time()

    def meet(self, share: Callable[[bytes], list[bytes]]) -> None:
        """Learn which ranks run on this machine. Collective: `share` gives every rank's bytes to every rank."""
        mine = {"start": self.start, "machine": machine(), "peer": Peer(os.getpid(), process_started(os.getpid()))}
        everyone = [json.loads(said) for said in share(json.dumps(mine).encode())]
        here = {rank: Peer(*said["peer"]) for rank, said in enumerate(everyone) if said["machine"] == mine["machine"]}
        self.peers = {rank: peer for rank, peer in here.items() if rank != self.rank}
        self.start = everyone[0]["start"]

    def announce(self, failure: Failure) -> None:
        if self.start is None:
            return
        final = self.failures / f"{self.start}-rank-{failure.rank:05d}.json"
        try:
            self.failures.mkdir(exist_ok=True)
            write_json(final.with_suffix(".tmp"), failure.__dict__)
            final.with_suffix(".tmp").replace(final)
        except OSError as error:  # a full disk, perhaps the very failure; the others then time out or are ended
            tell(f"rank {failure.rank}: WARNING: cannot tell the other ranks: {error}", sys.stderr)

    def announced(self) -> list[Failure]:
        """Failures of other ranks of this start; until its name is known, since this process began. Causes first."""
        try:
            names = sorted(os.listdir(self.failures)) if self.failures is not None else []
        except OSError:  # there is none, or rank 0 is deleting that of an earlier start
            return []
        found = []
        for name in names:
            path = self.failures / name
            if not fnmatch(name, f"{self.start or '*'}-rank-*.json"):
                continue
            try:
                if self.start is not None or path.stat().st_mtime >= self._since:
                    found.append(Failure(**read_json(path)))
            except (OSError, CheckpointError, TypeError):
                continue  # an earlier start's, which rank 0 is deleting; one of ours is there again at the next look
        return sorted((failure for failure in found if failure.rank != self.rank), key=lambda failure: failure.is_echo)

    def dead_peer(self) -> Failure | None:
        for other, peer in self.peers.items():
            if process_started(peer.pid) != peer.started:
                return Failure(
                    self.rank, f"rank {other} (process {peer.pid}) died {self.at()}", RankLostError.exit_code
                )
        return None

    def part(self) -> list[Peer]:
        """The end of training: from now on the others, which are returned, may end without being a loss."""
        others, self.step, self.peers = list(self.peers.values()), 0, {}
        return others

    def cause_of(self, error: BaseException) -> Failure:
        """What broke the connection to the other ranks, as far as it can be known within EVIDENCE_SECONDS."""
        said = f"rank {self.rank} lost the others {self.at()}: {first_line(error)}"
        self.announce(Failure(self.rank, said, RankLostError.exit_code, is_echo=True))
        deadline = time.monotonic() + EVIDENCE_SECONDS
        while time.monotonic() < deadline:
            cause = next((failure for failure in self.announced() if not failure.is_echo), self.dead_peer())
            if cause is not None:
                return cause
            time.sleep(0.1)
        silent = set(range(self.world_size)) - {self.rank} - {failure.rank for failure in self.announced()}
        who = ", ".join(f"rank {rank}" for rank in sorted(silent)) or "another rank"
        what = f"{who} did not answer {self.at()}: hanging, stopped or unreachable ({first_line(error)})"
        return Failure(self.rank, what, RankLostError.exit_code)

    def at(self) -> str:
        return f"at step {self.step}" if self.step else "outside the steps"


def breaks_connection(error: BaseException) -> bool:
    """Whether an exception is torch.distributed's way to say that another rank is gone."""
    text = str(error)
    if "DistError" in (kind.__name__ for kind in type(error).__mro__):  # torch's; nothing here imports it
        return True
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "NCCL", "Connection", "Timed out"))


def exit_code_of(error: BaseException, world: World) -> int:
    """What a rank ends with that has failed and is told to end before it knows, or may say, why."""
    if (world.world_size > 1 and breaks_connection(error)) or _is_of_the_gpu(error):
        return RankLostError.exit_code
    return RecipeError.exit_code if _is_out_of_memory(error) else getattr(error, "exit_code", 1)


def _is_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"  # torch's, of a GPU


def _is_of_the_gpu(error: BaseException) -> bool:
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


def fail(error: BaseException, world: World) -> None:
    """End this process with an error, without waiting for ranks that may be stuck in a collective.

    Most errors meet every rank alike. The others give rank 0 time to speak and the launcher time to end them, so that
    the error is shown once; what befell them alone they then say themselves.
    """
    trace, rank = "", world.rank
    if isinstance(error, AbbaError):
        line, failure = str(error), Failure(rank, f"rank {rank} failed {world.at()}: {error}", error.exit_code)
    elif _is_out_of_memory(error):
        error = RecipeError(
            f"rank {rank} ran out of GPU memory {world.at()}: {first_line(error)}; lower "
            "train.per_device_train_batch_size or data.max_length, or ask launch/plan.py what fits"
        )
        line, failure = str(error), Failure(rank, error.reason, error.exit_code)
    elif world.world_size > 1 and breaks_connection(error):
        cause = world.cause_of(error)
        code = cause.exit_code if cause.exit_code > 1 else RankLostError.exit_code
        line, failure = str(RankLostError(cause.what)), Failure(rank, cause.what, code, cause.rank != rank)
    elif _is_of_the_gpu(error):
        trace = "".join(traceback.format_exception(error))  # it may be an index of ours out of range
        what = f"the GPU of rank {rank} on {socket.gethostname()} failed {world.at()}: {first_line(error)}"
        line = str(RankLostError(f"{what}; see nvidia-smi and dmesg there before the node is used again"))
        failure = Failure(rank, what, RankLostError.exit_code)
    else:
        trace = "".join(traceback.format_exception(error))
        line = f"rank {rank} failed {world.at()}: {type(error).__name__}: {first_line(error)}"
        failure = Failure(rank, line, 1)
    world.announce(failure)
    if rank > 0:
        time.sleep(OTHERS_SPEAK_SECONDS)
    tell(f"{trace}{f'[rank {rank}] ' if rank else ''}{line}", sys.stderr)
    os._exit(failure.exit_code)
