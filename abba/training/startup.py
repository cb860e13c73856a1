"""How long a start takes, part by part: from the beginning of this process to the end of its first step."""

import time

from abba.training.processes import own_start_time


class Startup:
    """Seconds of each part, in the order in which they ended. On GPUs, what the host waited for."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic() - (time.time() - own_start_time())
        self.seconds: dict[str, float] = {}

    def done(self, part: str) -> None:
        """What took time since the last call, or since the process began, was `part`."""
        now = time.monotonic()
        self.seconds[part], self._last = now - self._last, now

    @property
    def total(self) -> float:
        """Seconds since the process began."""
        return time.monotonic() - self._began

    def __str__(self) -> str:
        return ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
