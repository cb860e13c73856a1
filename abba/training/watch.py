"""Requests to stop, and the end of a rank that can do nothing more for its run.

A thread, because the main one may be stuck in a collective where no Python runs. SIGTERM and SIGUSR1 ask for a stop:
the loop agrees on it at the next step boundary, saves and exits with 75. The end of the launcher is such a request,
with a short time limit for both. At once ends (71) a rank that is asked twice, that finds no boundary in time, or whose
peer is gone: nobody may wait for the dead. Files are written under another name and renamed, so nothing is left
half-written.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from abba.errors import AbbaError, PreemptedError, RankLostError
from abba.training.failures import Failure, World, tell
from abba.training.processes import launchers_above, process_started

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LAUNCHER_GONE = signal.SIGHUP  # what a process gets whose terminal is gone; here nobody sends it
WITHOUT_LAUNCHER_SECONDS = 8  # a last save, if a step ends in time; then no orphan is left
POLL_SECONDS = 0.5
FOLLOW_SECONDS = 3  # the main thread's own error says more than ours; it has so long to end by itself
DEAD_PEER_SECONDS = 6
SHOW_CURSOR = "\x1b[?25h"
# A launcher passes on a signal that the terminal or the batch system has sent to its ranks as well.
SAME_REQUEST_SECONDS = 2


class Watch:
    """The watch of one rank over itself."""

    def __init__(self, world: World, before_exit: Callable[[], None]) -> None:
        self.requested = 0  # the signal that asked the loop for a stop
        self._world, self._before_exit = world, before_exit
        self._grace: float | None = None  # set while the loop looks at `requested`
        self._asked_at, self._troubled_since = 0.0, 0.0
        self._step_since = 0.0  # when the last save was over
        self._ended_by = float("inf")  # for a last step and its save, when the launcher is gone
        self._launchers = launchers_above()
        self._saving = self._ended = False

    @contextmanager
    def of_steps(self, grace_seconds: float) -> Iterator[None]:
        """Around the loop, which looks at `requested` at every step and saves before it ends."""
        self._grace = grace_seconds
        yield
        self._grace = None
        if self.requested:
            what = f"{why(self.requested)} after the last step, which is saved"
            raise PreemptedError(f"{what}; start the same command again for the adapter")

    @contextmanager
    def at_boundary(self) -> Iterator[None]:
        """Around a save, which may take as long as it takes: the step has ended, and the next one has not begun."""
        self._saving = True
        yield
        self._step_since, self._saving = time.monotonic(), False

    def start(self) -> None:
        """Called in the main thread, once."""
        self._read, write = os.pipe()
        os.set_blocking(write, False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # written at once, whatever the main thread does
        threading.Thread(target=self._run, daemon=True, name="watch").start()

    def stop(self, exit_code: int) -> None:
        """From now on this rank ends by itself, and at once when the launcher says so. Called in the main thread.

        With `exit_code` then, not by the signal: srun gives the highest code of all ranks, and 143 would hide it.
        """
        self._ended = True
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: os._exit(exit_code))

    def _run(self) -> None:
        while not self._ended:
            ready, _, _ = select.select([self._read], [], [], POLL_SECONDS)
            for number in os.read(self._read, 64) if ready else b"":
                if number in STOP_SIGNALS and not self._ended:
                    self._asked(signal.Signals(number))
            self._look()

    def _asked(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._grace is None:
            if failures := self._world.announced():  # the launcher ends all because of it
                self._end(_as_error(failures[0]))
            what = f"{number.name} outside the training steps; start the same command again to continue"
            self._end(PreemptedError(what), announce=True)
        elif not self.requested:
            self.requested, self._asked_at = number, now
        elif now - self._asked_at > SAME_REQUEST_SECONDS:
            self._end(RankLostError(f"a second {number.name} during step {self._world.step}: ended without saving"))

    def _look(self) -> None:
        self._look_at_launchers()
        if self._grace is not None and self.requested:
            self._look_at_the_time(self._grace)
        dead = self._world.dead_peer()
        others = self._world.announced()
        if dead is None and not others:
            self._troubled_since = 0.0
            return
        self._troubled_since = self._troubled_since or time.monotonic()
        trouble = others[0] if others else dead
        if time.monotonic() - self._troubled_since > (FOLLOW_SECONDS if others else DEAD_PEER_SECONDS):
            self._end(_as_error(trouble), announce=not others)

    def _look_at_the_time(self, grace: float) -> None:
        now = time.monotonic()
        late = not self._saving and now > max(self._asked_at, self._step_since) + grace
        if late or now > self._ended_by:
            what = f"the save after step {self._world.step}" if self._saving else f"step {self._world.step}"
            limit = f" (checkpoint.grace_seconds={grace:g})" if late else ""
            waited = f"{now - self._asked_at:.0f} s of {why(self.requested)}{limit}"
            self._end(RankLostError(f"{what} did not end within {waited}: ended without saving"))

    def _look_at_launchers(self) -> None:
        gone = [pid for pid, started in self._launchers.items() if process_started(pid) != started]
        if not gone:
            return
        if self._grace is None:
            self._end(RankLostError(f"the launcher (process {gone[0]}) is gone {self._world.at()}"))
            return
        self._launchers = {}
        now = time.monotonic()
        self._asked_at = self._asked_at or now
        self.requested = self.requested or LAUNCHER_GONE
        self._ended_by = now + WITHOUT_LAUNCHER_SECONDS

    def _end(self, error: AbbaError, announce: bool = False) -> None:
        if self._ended:
            return
        self._ended = True
        rank = self._world.rank
        try:
            if sys.stdout.isatty():
                tell(SHOW_CURSOR)  # which a progress bar has hidden
            tell(f"[rank {rank}] {error}" if rank else str(error), sys.stderr)
            if announce:
                self._world.announce(Failure(rank, error.reason, error.exit_code))
            self._before_exit()
        finally:  # whatever the disk says, this rank does not stay
            os._exit(error.exit_code)


def why(requested: int) -> str:
    """What asked for a stop, in words."""
    return "the launcher's end" if requested == LAUNCHER_GONE else signal.Signals(requested).name


def _as_error(failure: Failure) -> AbbaError:
    error = RankLostError(failure.what)
    if failure.exit_code > 1:
        error.exit_code = failure.exit_code
    return error
