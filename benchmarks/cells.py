"""Experiments of many independent cells: over processes of one thread each, every finished cell kept at once.

The same command continues what was interrupted. The file is replaced as a whole, so that it is never half-written.
Of cells that train at several rates `chosen` keeps those at the best one.
"""

import json
import multiprocessing
import os
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from measure import machine

from abba.errors import CheckpointError, exit_with

Cell = dict[str, Any]


def run_cells(
    path: Path,
    work: Callable[..., dict[str, Any]],
    cells: Mapping[str, tuple],
    settings: Mapping[str, Any],
    processes: int,
) -> dict[str, dict[str, Any]]:
    """work(*arguments) of every cell, in the order of `cells`; those that `path` holds already are not computed again.

    Args:
        path: NAME.json; command, machine, settings and cells; where earlier starts were of another machine or commit,
            `earlier` names them.
        work: a function of a module, with what it measured as JSON.
        settings: whatever changes a cell without being in its name.

    Raises:
        SystemExit: with 66 and one line: `path` holds cells of other settings, or is no such file.
    """
    torch.set_num_threads(1)
    record = _record(path, json.loads(json.dumps(dict(settings))))
    done = record["cells"]
    missing = [name for name in cells if name not in done]
    print(f"{path}: {len(cells) - len(missing)} of {len(cells)} cells are there", flush=True)
    forks = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, forks, initializer=_prepare_process, initargs=(os.getpid(),)) as pool:
        running = {pool.submit(work, *cells[name]): name for name in missing}
        try:
            for count, future in enumerate(as_completed(running), 1):
                done[running[future]] = future.result()
                write_whole(path, json.dumps(record, indent=1) + "\n")
                print(f"{count}/{len(missing)} {running[future]}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: done[name] for name in cells}


def chosen(cells: Sequence[Cell], keys: Sequence[str]) -> dict[tuple, list[Cell]]:
    """The values of `keys` -> the cells that have them, one for each seed, at their best rate."""
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[key] for key in keys), []).append(cell)
    best = {key: best_rate(group) for key, group in groups.items()}
    return {key: [cell for cell in group if cell["rate"] == best[key]] for key, group in groups.items()}


def best_rate(cells: Sequence[Cell]) -> float:
    """The rate with the best validation accuracy, averaged over seeds; the lower loss where that is the same."""

    def quality(rate: float) -> tuple[float, float]:
        looks = [cell["validation"] for cell in cells if cell["rate"] == rate]
        return statistics.mean(look["accuracy"] for look in looks), -statistics.mean(look["loss"] for look in looks)

    return max(dict.fromkeys(cell["rate"] for cell in cells), key=quality)


def rate_label(rate: float, rates: Collection[float]) -> str:
    """The best rate, and whether a better one may lie beyond those that were tried."""
    edge = len(rates) > 2 and rate in (min(rates), max(rates))
    return f"{rate:g}{' (edge)' if edge else ''}"


def _prepare_process(parent: int) -> None:
    """One thread; and an end when the parent is killed, which a process of the pool would outlive, waiting for ever."""
    # torch makes its thread pool anew after a fork, and fails if several threads ask at once, as from_pretrained's do.
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_whole(path: Path, text: str) -> None:
    """The file is the old one or the new one, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _record(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    new = {"command": shlex.join(["python", *sys.argv]), "machine": machine(), "settings": settings, "cells": {}}
    if not path.exists():
        return new
    try:
        old = json.loads(path.read_text())
        cells, before, _ = old["cells"], old["settings"], old["machine"]
    except (ValueError, KeyError, TypeError) as error:
        raise _refusal(
            f"{path}: is not what this program writes ({error}); move it away, or choose another --output"
        ) from error
    different = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
    if different:
        was = {key: before.get(key) for key in different}
        raise _refusal(f"{path}: holds cells made with {was}; repeat that, move it away, or choose another --output")
    earlier = [*old.get("earlier", []), *([old["machine"]] if cells else [])]
    return new | {"earlier": [made for made in earlier if made != new["machine"]], "cells": cells}


def _refusal(text: str) -> SystemExit:
    return SystemExit(exit_with(CheckpointError(text)))
