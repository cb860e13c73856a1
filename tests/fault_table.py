"""The table of what was done to runs: ABBA_TABLE=FILE.json writes it there, and as Markdown beside it."""

import json
import os
import platform
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.faults.harness import SEED

_table: list[dict] = []


@pytest.fixture
def trial():
    """trial(row of the table): a context around each trial, counted and timed; one that raises is a failure."""
    rows: dict[str, dict] = {}

    @contextmanager
    def counted(row: str):
        entry = rows.setdefault(row, {"row": row, "trials": 0, "failures": 0, "seconds": 0.0})
        started = time.monotonic()
        entry["trials"] += 1
        try:
            yield
        except BaseException:
            entry["failures"] += 1
            raise
        finally:
            entry["seconds"] += time.monotonic() - started

    yield counted
    _table.extend(rows.values())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    _table.extend(getattr(node, "workeroutput", {}).get("trials", []))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a worker of xdist
        session.config.workeroutput["trials"] = _table
        return
    if "ABBA_TABLE" not in os.environ or not _table:
        return
    path = Path(os.environ["ABBA_TABLE"])
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    merged: dict[str, dict] = {}
    for row in _table:  # several tests may add to one row
        whole = merged.setdefault(row["row"], {"row": row["row"], "trials": 0, "failures": 0, "seconds": 0.0})
        for key in ("trials", "failures", "seconds"):
            whole[key] = round(whole[key] + row[key], 1)
    rows = list(merged.values())
    path.write_text(json.dumps({"seed": SEED, "machine": machine, "rows": rows}, indent=2) + "\n")
    lines = [f"Seed {SEED}; {machine}", "", "| row | trials | failures | seconds |", "|---|---|---|---|"]
    lines += [f"| {row['row']} | {row['trials']} | {row['failures']} | {row['seconds']:.0f} |" for row in rows]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
