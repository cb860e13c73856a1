"""What a run says: a bar on a terminal, plain lines elsewhere, every step in metrics.jsonl."""

import io
import json
import os
import sys
import time

import pytest
from rich.console import Console

from abba.training import metrics
from abba.training.processes import own_start_time
from abba.training.startup import Startup

RECORD = {"loss": 1.25, "tokens_per_second": 1234.5, "learning_rate": 1e-3, "grad_norm": 0.5, "step_seconds": 0.1}


def said(tmp_path, monkeypatch, terminal):
    screen, startup = io.StringIO(), Startup()
    startup.done("model")
    monkeypatch.setattr(metrics, "Console", lambda **k: Console(file=screen, force_terminal=terminal, width=120, **k))
    log, tracked = tmp_path / "metrics.jsonl", []
    with metrics.Reporter(log, steps=25, logging_steps=10, startup=startup, track=tracked.append) as reporter:
        for step in range(1, 26):
            reporter.step({"step": step, **RECORD})
            if step == 20:
                reporter.evaluated(20, 0.5)
                reporter.saved(20, {"save_bytes": 1000, "save_seconds": 0.5})
    assert len(tracked) == 26 and tracked[0] == {"step": 1, **RECORD} and {"eval_loss": 0.5} in tracked
    return screen.getvalue()


def test_plain_lines_without_a_terminal(tmp_path, monkeypatch):
    lines = said(tmp_path, monkeypatch, terminal=False).splitlines()
    assert [line.split()[1] for line in lines if "loss 1.25" in line] == ["1/25", "10/25", "20/25", "25/25"]
    assert "step 20/25  eval loss 0.5000" in lines
    assert lines[1].startswith("start: ") and " s to the end of the first step: model " in lines[1]
    assert "ETA 0:00:0" in lines[0] and "1,234 tokens/s" in lines[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 28
    start = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert start["step"] == 1 and list(start["startup_seconds"]) == ["model", "first step"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[4])["step"] == 4


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    screen = said(tmp_path, monkeypatch, terminal=True)
    assert "loss 1.2500" in screen and "25/25" in screen and "eval loss 0.5000" in screen


def test_lines_that_a_full_disk_refuses_are_written_when_it_is_empty_again(tmp_path, capsys):
    class Disk:
        """Takes `room` bytes."""

        def __init__(self, file):
            self.file, self.room = file, 10**6

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            taken = self.file.write(data[: self.room])
            self.room -= taken
            return taken

        def close(self):
            self.file.close()

    with metrics.Reporter(tmp_path / "metrics.jsonl", steps=100, logging_steps=10, startup=Startup()) as reporter:
        reporter._file = disk = Disk(reporter._file)
        for step in range(1, 101):
            if step in (10, 60):
                disk.room = 100 if step == 10 else 10**6
            reporter.step({"step": step, **RECORD})
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, *range(1, 101)], "two lines of the first: the step's and the start's"
    assert "WARNING: step 10 cannot be written yet: No space left on device" in capsys.readouterr().out


def test_a_log_that_takes_nothing_more_ends_no_run(tmp_path, monkeypatch, capsys):
    def full(values):
        raise OSError(28, "No space left on device")

    with metrics.Reporter(tmp_path / "log", steps=2, logging_steps=1, startup=Startup(), track=full) as reporter:
        reporter.step({"step": 1, **RECORD})
        assert "step 1 is not where else the recipe logs to: No space left on device" in capsys.readouterr().out
        with io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True) as full_disk:
            monkeypatch.setattr(sys, "stdout", full_disk)
            reporter.step({"step": 2, **RECORD})
            monkeypatch.undo()
    assert len((tmp_path / "log").read_text().splitlines()) == 3


def test_a_reader_that_is_gone_ends_no_run(tmp_path, monkeypatch):
    """rich would end the program."""
    theirs, ours = os.pipe()
    os.close(theirs)
    with io.TextIOWrapper(open(ours, "wb", buffering=0), write_through=True) as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        with metrics.Reporter(tmp_path / "log", steps=2, logging_steps=1, startup=Startup()) as reporter:
            reporter.step({"step": 1, **RECORD})
        monkeypatch.undo()


def test_the_parts_of_a_start_add_up_to_all_of_it():
    startup = Startup()
    for part in ("imports", "model"):
        startup.done(part)
    since = time.time() - own_start_time()
    assert sum(startup.seconds.values()) == pytest.approx(since, abs=1) and list(startup.seconds) == [
        "imports",
        "model",
    ]
    assert startup.seconds["imports"] > startup.seconds["model"] >= 0 and startup.total >= sum(startup.seconds.values())
