"""What ranks tell each other when one fails, and how ranks end."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from abba.errors import CheckpointError, PreemptedError
from abba.training import failures
from abba.training.failures import Failure, Peer, World, breaks_connection, exit_code_of, wait_for_end
from abba.training.processes import process_started
from abba.training.watch import Watch


def world(rank, directory, start="now", size=3):
    one = World()
    one.rank, one.world_size, one.failures, one.start, one.step = rank, size, directory, start, 7
    return one


def test_the_cause_comes_before_its_echoes_and_other_starts_are_not_heard(tmp_path):
    first, second, other = (world(r, tmp_path / "failures", s) for r, s in ((0, "now"), (1, "now"), (2, "then")))
    first.announce(Failure(0, "lost the others", 71, is_echo=True))
    second.announce(Failure(1, "ValueError", 1))
    other.announce(Failure(2, "of an earlier start", 1))
    assert [failure.what for failure in world(2, tmp_path / "failures").announced()] == [
        "ValueError",
        "lost the others",
    ]
    assert second.announced() == [Failure(0, "lost the others", 71, True)]


def test_files_that_are_being_deleted_or_written_are_passed_over(tmp_path):
    directory = tmp_path / "failures"
    world(0, directory).announce(Failure(0, "ValueError", 1))
    for name, text in (("1", ""), ("2", "[]"), ("3", '{"rank": 3}')):
        (directory / f"now-rank-0000{name}.json").write_text(text)
    (directory / "now-rank-00004.json").symlink_to(directory / "gone")
    assert [failure.rank for failure in world(5, directory).announced()] == [0]
    assert [failure.rank for failure in world(5, directory, start=None).announced()] == [0]


def test_nothing_is_announced_in_a_directory_that_may_be_another_runs(tmp_path):
    world(0, tmp_path / "failures", start=None).announce(Failure(0, "ValueError", 1))
    assert not (tmp_path / "failures").exists()


def test_silent_ranks_are_named_when_nobody_knows_the_cause(tmp_path, monkeypatch):
    monkeypatch.setattr(failures, "EVIDENCE_SECONDS", 0.3)
    world(1, tmp_path / "failures").announce(Failure(1, "lost the others", 71, is_echo=True))
    cause = world(0, tmp_path / "failures").cause_of(RuntimeError("gloo: Timed out waiting"))
    assert cause.what.startswith("rank 2 did not answer at step 7") and cause.exit_code == 71
    assert breaks_connection(RuntimeError("[gloo/pair.cc] Connection closed by peer"))
    assert not breaks_connection(ValueError("gloo")) and not breaks_connection(RuntimeError("shape mismatch"))


@pytest.mark.parametrize(
    "error, size, code",
    [
        (RuntimeError("[gloo/pair.cc] Connection closed by peer"), 2, 71),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), 2, 71),
        (RuntimeError("[gloo/pair.cc] Connection closed by peer"), 1, 1),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, 64),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), 1, 71),
        (CheckpointError("damaged"), 2, 66),
        (ValueError("a bug"), 2, 1),
    ],
)
def test_what_a_rank_ends_with_that_is_told_to_end_before_it_has_spoken(tmp_path, error, size, code):
    assert exit_code_of(error, world(0, tmp_path, size=size)) == code


def test_a_rank_that_is_told_to_end_ends_even_when_the_disk_fails(tmp_path):
    def failing():
        raise OSError(5, "Input/output error")

    child = os.fork()
    if child == 0:
        os.dup2(os.open(tmp_path / "said", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w")
        Watch(world(0, tmp_path / "failures"), failing).start()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    assert "SIGTERM outside the training steps" in (tmp_path / "said").read_text()


def ended(prepare):
    """The exit code of a process that calls `prepare` and is then told to end."""
    child = os.fork()
    if child == 0:
        prepare()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_rank_that_is_ended_because_of_another_has_that_ones_exit_code(tmp_path):
    """A launcher that ends all at the first bad exit gives the highest code, and 75 would stand for "saved"."""
    world(0, tmp_path / "failures").announce(Failure(0, "no such file", 65))
    assert ended(lambda: Watch(world(1, tmp_path / "failures"), lambda: None).start()) == 65


def test_a_rank_that_is_ended_while_it_ends_keeps_its_own_exit_code(tmp_path):
    def ending():
        watch = Watch(world(1, tmp_path / "failures"), lambda: None)
        watch.start()
        watch.stop(66)

    assert ended(ending) == 66


def test_rank_0_waits_for_the_others_to_end_but_not_for_ever(monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
    world = World()
    world.peers = {1: Peer(process.pid, process_started(process.pid))}
    others = world.part()
    assert world.peers == {} and world.dead_peer() is None
    threading.Timer(0, process.wait).start()  # a launcher reaps its ranks
    began = time.monotonic()
    wait_for_end(others)
    assert process.poll() == 0 and time.monotonic() - began < 20
    monkeypatch.setattr(failures, "PARTING_SECONDS", 0.2)
    wait_for_end([Peer(os.getpid(), process_started(os.getpid()))])


@pytest.mark.parametrize("by", ["fail", "watch"])
def test_a_log_whose_disk_is_full_changes_no_exit_code(tmp_path, by):
    """And what can still be told and given back is."""

    def failing():
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w")
        if by == "fail":
            failures.fail(PreemptedError("SIGTERM"), world(0, tmp_path / "failures", size=1))
        Watch(world(0, tmp_path / "failures"), (tmp_path / "released").touch).start()

    assert ended(failing) == 75
    assert world(1, tmp_path / "failures").announced() and (tmp_path / "released").exists() == (by == "watch")


def test_the_cursor_that_a_bar_has_hidden_is_shown_again(tmp_path):
    ours, theirs = os.openpty()

    def on_a_terminal():
        os.dup2(theirs, 1)
        sys.stdout = os.fdopen(1, "w")
        Watch(world(0, tmp_path / "failures"), lambda: None).start()

    assert ended(on_a_terminal) == 75
    os.set_blocking(ours, False)
    assert os.read(ours, 100).endswith(b"\x1b[?25h\r\n")


def test_a_gpu_without_memory_is_a_line_with_a_way_out(tmp_path, capfd):
    def out_of_memory():
        failures.fail(
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), world(0, tmp_path, size=1)
        )

    assert ended(out_of_memory) == 64
    said = capfd.readouterr().err
    assert said.startswith("recipe: rank 0 ran out of GPU memory") and "Traceback" not in said
    assert "Tried to allocate 2.00 GiB; lower train.per_device_train_batch_size" in said


def test_a_gpu_that_fails_is_named_with_its_node(tmp_path, capfd):
    error = RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be reported later")
    assert ended(lambda: failures.fail(error, world(0, tmp_path, size=1))) == 71
    said = capfd.readouterr().err
    assert f"the GPU of rank 0 on {socket.gethostname()} failed at step" in said
    assert "uncorrectable ECC error encountered; see nvidia-smi" in said.splitlines()[-1]
