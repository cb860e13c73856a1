"""How long this rank waits for the others inside ZeRO-3.

Ranks that train together take the same time for a step: one that is slow makes the others wait for it, at every layer
whose weights they gather. What tells them apart is the time that is left when the waiting is taken away.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
from torch import nn


class WaitClock:
    """Adds up the time in DeepSpeed's places that need the other ranks: gathering a module's weights before it runs,
    reducing the gradients after backward, and, in the first steps, comparing the order of the modules.

    On a CPU the process blocks in them, and the wall clock is read. On a GPU it does not: it is the compute stream that
    stands still until the weights are there, so events are recorded on that stream on either side and read after the
    step, which ends with the device at rest. What neither sees: full buckets of gradients are reduced while backward
    goes on; on a CPU that wait counts as the rank's own, on a GPU it is hidden behind computation. And a rank that is
    stopped inside a collective, or whose GPU stands still there because Python is slower, looks, to itself, as if it
    waited.

    Args:
        engine: of DeepSpeed's ZeRO stage 3; it is timed as long as it lives.
    """

    def __init__(self, engine: Any, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._running, self._seconds = False, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        for owner, name, waits in (
            (coordinator, "fetch_sub_module", _lacks_weights),
            (coordinator, "reset_step", lambda: True),
            (engine.optimizer, "independent_gradient_partition_epilogue", lambda: True),
        ):
            setattr(owner, name, self._timed(getattr(owner, name), waits))

    def start(self) -> None:
        """From now on waiting counts, and what came before (an evaluation, a save) does not."""
        self._running, self._seconds = True, 0.0

    def stop(self) -> float:
        """Seconds waited since `start`; on a GPU after its stream is done."""
        self._running = False
        seconds = self._seconds + sum(before.elapsed_time(after) for before, after in self._events) / 1000
        self._events.clear()
        return seconds

    def _timed(self, function: Callable[..., Any], waits: Callable[..., bool]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            if not (self._running and waits(*arguments, **named)):
                return function(*arguments, **named)
            with self._gpu_wait() if self._on_gpu else self._cpu_wait():
                return function(*arguments, **named)

        return timed

    @contextmanager
    def _cpu_wait(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    @contextmanager
    def _gpu_wait(self) -> Iterator[None]:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        yield
        after.record()
        self._events.append((before, after))


def _lacks_weights(module: nn.Module, forward: bool) -> bool:
    """Most modules have none that are sharded, and their fetches are bookkeeping: no waiting, nor two events' cost."""
    return any(parameter.ds_status != ZeroParamStatus.AVAILABLE for parameter in iter_params(module))
