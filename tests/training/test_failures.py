"""What ranks tell each other when one fails; and starts that are counted, forgiven and cleaned up after."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from abba.errors import CheckpointError, NoProgressError, RankLostError
from abba.training import failures
from abba.training.failures import Failure, Peer, World, breaks_connection, exit_code_of, wait_for_end
from abba.training.processes import process_started
from abba.training.run_directory import RunDirectory
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


def crash(directory, error=RuntimeError):
    with pytest.raises(error), directory.held("auto", False, None, lambda line: None):
        raise error("put in by the test")


def test_three_crashes_are_counted_and_what_a_user_mends_is_not(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    for _ in range(5):
        crash(directory, CheckpointError)
    for _ in range(3):
        crash(directory)
    with pytest.raises(NoProgressError, match="3 starts in a row"), directory.held("auto", False, None, print):
        pass
    (tmp_path / "run/failures").mkdir()
    (tmp_path / "run/failures/x-rank-00000.json").write_text("")
    with pytest.raises(NoProgressError, match="cannot be read"), directory.held("auto", False, None, print):
        pass
    (tmp_path / "run/checkpoints/step-000004").mkdir(parents=True)  # progress
    for _ in range(3):
        crash(directory, RankLostError)
    with pytest.raises(NoProgressError, match="after step-000004"), directory.held("auto", False, None, print):
        pass
    (tmp_path / "run/starts.json").write_text("")  # cut off by a kill
    with directory.held("auto", False, None, print):
        pass
    assert not (tmp_path / "run/starts.json").exists()


def test_what_killed_starts_left_is_removed_and_what_others_left_is_not(tmp_path):
    directory, said = RunDirectory(tmp_path / "run"), []
    for name in (
        ".adapter.tmp-12/x",
        ".lock.json.abc",
        ".write-test-3",
        "mine.txt",
    ):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).touch()
    with directory.held("auto", False, None, said.append):
        pass
    assert {path.name for path in (tmp_path / "run").rglob("*")} == {"mine.txt"}
    assert len(said) == 3


def test_damaged_lines_of_metrics_are_dropped_with_a_word(tmp_path):
    directory, said = RunDirectory(tmp_path / "run"), []
    (tmp_path / "run").mkdir()
    lines = [json.dumps({"step": step}) for step in (1, 2, 3, 4)]
    written = [line.encode() for line in [*lines[:2], '{"step": 2, "lo', "[1]", *lines[2:], '{"step": 5']]
    flipped = bytes([written[0][0] ^ 128]) + written[0][1:]
    directory.metrics.write_bytes(b"\n".join([flipped, *written]))
    directory.begin({}, 3, said.append)
    assert directory.metrics.read_text().splitlines() == lines[:3]
    assert said == ["metrics.jsonl: WARNING: dropped 3 damaged lines of an earlier start"]
    for name in ("evaluation", "score", "mine"):
        (tmp_path / "run" / name).mkdir()
    directory.begin({}, 0, said.append)
    assert not directory.metrics.exists()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"recipe.yaml", "mine"}, "no score of before"


def test_metrics_that_cannot_be_read_are_named(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.metrics.symlink_to("/proc/self/mem")  # reading its start fails, for root too
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: Input/output error; move it away"):
        directory.held_out_steps()


def test_a_requeued_job_does_not_discard_what_it_has_saved(tmp_path):
    """SLURM starts it with the same arguments; only the first start of a job may begin anew."""
    directory, never = RunDirectory(tmp_path / "run"), ("never", "7")
    (tmp_path / "run").mkdir()
    assert directory.resume_of(*never, 0) == "never"
    assert directory.resume_of(*never, 1) == "never"  # requeued before it began
    directory.begin({}, 0, print, "7", 1)
    assert directory.resume_of(*never, 1) == "never"  # a second command in the same allocation
    assert directory.resume_of(*never, 2) == directory.resume_of(*never, 3) == "auto"
    assert directory.resume_of("runs/other", "7", 2) == "runs/other"  # from which it may not have saved yet
    assert directory.resume_of("never", "8", 2) == directory.resume_of("never", None, 2) == "never"
    directory.begin({}, 0, print)
    assert directory.resume_of(*never, 2) == "never"


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


def test_starts_that_are_stopped_before_a_save_are_counted(tmp_path):
    """A job that loads longer than its time limit would requeue itself for ever."""
    directory = RunDirectory(tmp_path / "run")
    for _ in range(3):
        with directory.held("auto", False, None, lambda line: None):
            directory.release(uncount=False)  # as the watch does at a signal outside the steps
            (directory.path / "starts.json").rename(directory.path / "kept")  # what follows would be a good end
        (directory.path / "kept").rename(directory.path / "starts.json")
    with pytest.raises(NoProgressError), directory.held("auto", False, None, lambda line: None):
        pass
