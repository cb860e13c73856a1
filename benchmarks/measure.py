"""What the benchmarks share: contenders in turns, medians, memory, and results as JSON with a table beside it."""

import json
import os
import platform
import random
import statistics
import subprocess
import time
import weakref
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RESULTS = Path(__file__).parent / "results"
DRAWS = 2000
PACKAGES = ("torch", "transformers", "deepspeed", "peft", "scikit-learn")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, Any]:
    """Where it ran, on what."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    found = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    found |= {name: version(name) for name in PACKAGES if _installed(name)}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return found | {"commit": commit.stdout.strip()}


def _installed(name: str) -> bool:
    try:
        version(name)
    except ImportError:
        return False
    return True


def in_turns(
    cases: dict[str, Callable[[], Any]], repetitions: int, warmup: int = 1, enough: float = 40
) -> dict[str, list[float]]:
    """Seconds of every repetition of every case. A round runs each once, so that a busy machine is busy for all.

    A case that would take more than `enough` seconds sits out rounds, evenly over the run and not its last ones: a
    machine changes its speed meanwhile. It is measured twice at least.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(-warmup, repetitions):
        for name, case in cases.items():
            share = enough * max(turn, 0) / repetitions
            last_chance = turn == repetitions - 1 and len(seconds[name]) < 2
            if sum(seconds[name]) > share and not last_chance:
                continue
            _wait()
            started = time.perf_counter()
            case()
            _wait()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> float:
    """Ratio of medians."""
    return statistics.median(seconds[name]) / statistics.median(seconds[to])


def interval(seconds: dict[str, list[float]], name: str, to: str) -> str:
    """Where the ratio of medians lies with 95%, by drawing the repetitions anew."""
    drawn = random.Random(0)

    def median_of(times: list[float]) -> float:
        return statistics.median(drawn.choices(times, k=len(times)))

    ratios = sorted(median_of(seconds[name]) / median_of(seconds[to]) for _ in range(DRAWS))
    return f"{ratios[DRAWS // 40]:.2f}-{ratios[-DRAWS // 40]:.2f}"


class Peak(TorchDispatchMode):
    """`most`: the bytes of the tensors made within it that were held at once, without what operations use inside.

    What a process holds says less on a CPU: its allocator keeps what was freed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, arguments: tuple = (), named: dict[str, Any] | None = None
    ) -> Any:
        self._count((arguments, named), made=False)
        result = function(*arguments, **(named or {}))
        self._count(result, made=True)
        self.most = max(self.most, self.live)
        return result

    def _count(self, tree: Any, made: bool) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self._known:
                size = tensor.untyped_storage().nbytes() if made else 0
                self._known.add(key)
                self.live += size
                weakref.finalize(tensor.untyped_storage(), self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def peak_bytes(case: Callable[[], Any]) -> int:
    """The most that `case` holds above what was held before: by the allocator on a GPU, by tensors on a CPU."""
    if not torch.cuda.is_available():
        with Peak() as peak:
            case()
        return peak.most
    _wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case()
    _wait()
    return torch.cuda.max_memory_allocated() - before


def held_bytes() -> int:
    """What is held now: by the allocator on a GPU, by the process on a CPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def saved_bytes(forward: Callable[[], Any], module: nn.Module) -> int:
    """Bytes that autograd keeps for backward, each storage once, without the module's parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())


def write(
    name: str,
    command: str,
    settings: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    directory: Path,
    note: str = "",
) -> None:
    """NAME.json with everything, NAME.md with the table: all but what single repetitions found. Printed too."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in settings.items() if key != "output"}  # where it lies is of one machine
    record = {"command": command, "machine": machine(), "settings": settings, "rows": list(rows)}
    (directory / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    table = as_table([{key: value for key, value in row.items() if not isinstance(value, list)} for row in rows])
    text = f"`{command}`\n\n{record['machine']}\n\n" + (f"{note}\n\n" if note else "") + f"{table}\n"
    (directory / f"{name}.md").write_text(text)
    print(text, flush=True)


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
