"""Which rank holds up the others, and with what.

A rank's own time of a step is what it takes until its losses are known, without what it waits for the others: data,
computation, and whatever stops its process. A bad node shows as own time; slow storage as data seconds; a slow network
as waiting, on all ranks alike; rows that are longer than the others' as tokens. The update after the losses is not in
it, nor are evaluations and saves.
"""

import socket
import time
from typing import Any, NamedTuple

import torch

from abba.sharded.together import share
from abba.sharded.waiting import WaitClock

SLOW = 1.2  # times the own time of the others' median
MATTERS = 0.05  # of a step: less own time than that above the median is not worth a line


class RankTimes(NamedTuple):
    """Of one rank and one step, in seconds; tokens with padding."""

    own: float
    data: float
    waited: float
    tokens: float


class StepClock:
    """Measures this rank's part of each step."""

    def __init__(self, engine: Any, device: torch.device) -> None:
        self._waits = WaitClock(engine, device)
        self._started = 0.0
        self.data_seconds = 0.0

    def start(self) -> None:
        self._waits.start()
        self._started = time.monotonic()

    def data_is_there(self) -> None:
        self.data_seconds = self.seconds()

    def seconds(self) -> float:
        """Since `start`."""
        return time.monotonic() - self._started

    def losses_are_known(self, tokens: int) -> RankTimes:
        """Called when this rank has read its losses, which on a GPU means that its stream is done."""
        whole, waited = self.seconds(), self._waits.stop()
        return RankTimes(whole - waited, self.data_seconds, waited, tokens)


def host_names(device: torch.device) -> list[str]:
    """Of every rank's machine. Collective."""
    return [name.decode() for name in share(socket.gethostname().encode(), device)]


class Stragglers:
    """Averages what all ranks measured over the steps between two log lines.

    Args:
        nodes: each rank's host name.
    """

    def __init__(self, nodes: list[str]) -> None:
        self._nodes = nodes
        self._sum, self._first, self._steps = torch.zeros(len(nodes), len(RankTimes._fields)), 0, 0

    def add(self, step: int, everyone: torch.Tensor) -> None:
        """everyone: (ranks, fields of RankTimes), of `step`."""
        if self._steps == 0:
            self._sum, self._first = torch.zeros_like(everyone), step
        self._sum += everyone
        self._steps += 1

    def interval(self) -> tuple[dict[str, Any], str | None]:
        """(fields for metrics.jsonl, a line if a rank is slow) of the steps since the last call; empty for one rank."""
        means, first, steps = self._sum / max(1, self._steps), self._first, self._steps
        self._steps = 0
        if len(self._nodes) == 1 or not steps:
            return {}, None
        rank = int(means[:, 0].argmax())
        others = torch.cat([means[:rank], means[rank + 1 :]]).median(dim=0).values
        slowest, median = RankTimes(*means[rank].tolist()), RankTimes(*others.tolist())
        found = {"slowest_rank": rank, "slowest_rank_node": self._nodes[rank]}
        for name in ("own", "data", "waited"):
            found[f"slowest_rank_{name}_seconds"] = getattr(slowest, name)
            found[f"other_ranks_median_{name}_seconds"] = getattr(median, name)
        excess = slowest.own - median.own
        if slowest.own <= SLOW * median.own or excess < MATTERS * (slowest.own + slowest.waited):
            return found, None
        data = f"data {slowest.data:.2g} s, median {median.data:.2g} s"
        waiting = f"waiting {slowest.waited:.2g} s, median {median.waited:.2g} s"
        tokens = f"{slowest.tokens:,.0f} tokens, median {median.tokens:,.0f}"
        return found, (
            f"slow: rank {rank} on node {self._nodes[rank]}: {slowest.own:.3g} s a step of its own, the others' median "
            f"{median.own:.3g} s ({data}; {waiting}; {tokens}); steps {first}-{first + steps - 1}"
        )
