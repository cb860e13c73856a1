"""The reference run that every hurt run has to equal, once per world size; and the table of what was tried."""

import json
import os
import platform
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.distributed.ranks import TINY
from tests.faults.harness import LAYERS, SEED, Lab
from tests.models import tiny_model

_table: list[dict] = []


def make_base(directory, **changes):
    """A toy of width 64 in bf16."""
    model = tiny_model(
        vocab_size=640,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        num_hidden_layers=LAYERS,
        **changes,
    )
    model.bfloat16().save_pretrained(directory)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def lab(toy_base, tmp_path_factory):
    return Lab(toy_base, tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="session")
def reference(lab):
    """reference(world) -> the uninterrupted run's outcome."""
    known = {}

    def outcome(world: int = 2):
        if world not in known:
            known[world] = lab.complete(f"reference-{world}", world)
        return known[world]

    return outcome


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


def pytest_sessionfinish():
    """ABBA_TABLE=FILE.json: write the table there, and as Markdown beside it."""
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
