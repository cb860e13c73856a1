"""Under the real launchers: whatever of theirs is killed, no process stays behind and nothing in /dev/shm."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from abba.training.processes import process_started
from tests.distributed.ranks import environment, free_port
from tests.faults.harness import some

pytestmark = pytest.mark.timeout(7200)
LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port"],
    "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port"],
}
# What is killed -> the exit code that comes out. DeepSpeed's runner gives 0 when its own child was killed.
KILLED = {
    ("deepspeed", "a rank"): {247, 71},
    ("deepspeed", "the runner"): {-9},
    ("deepspeed", "launch.py"): {0, 247},
    ("torchrun", "a rank"): {1},
    ("torchrun", "the agent"): {-9},
}


def started(launcher, lab, run, log):
    command = [*LAUNCHERS[launcher], str(free_port()), "launch/train.py", *lab.arguments]
    command += [f"output_dir={lab.output(run)}"]
    return subprocess.Popen(command, env=environment(DS_ACCELERATOR="cpu"), stdout=log, stderr=log)


def descendants(pid):
    """pid -> command line of everything below `pid`."""
    parents = {}
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            parents[int(entry.name)] = int(fields[1])
        except (OSError, ValueError):
            continue
    found, level = {}, {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level}
        for child in level:
            found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
    return found


def victim(what, process, below):
    if what in ("the runner", "the agent"):
        return process.pid
    word = {"a rank": "launch/train.py --", "launch.py": "deepspeed.launcher.launch"}[what]
    return next(pid for pid, command in below.items() if word in command and (what != "a rank" or is_rank(command)))


def is_rank(command):
    return "-u launch/train.py" in command and "launcher.launch" not in command


def in_shared_memory():
    # Open MPI's segments are of another test that runs on this machine: no launcher here uses it.
    return {name for name in os.listdir("/dev/shm") if not name.startswith(("sem.", "vader_segment"))}


def wait_for_end(pids):
    deadline = time.time() + 10
    while any(process_started(pid) for pid in pids):
        assert time.time() < deadline, "ranks survive"
        time.sleep(0.05)


def check_same(outcome, expected):
    """The rows of steps under a real launcher are not recorded."""
    assert (outcome.step, outcome.state, outcome.losses, outcome.held_out) == (
        expected.step,
        expected.state,
        expected.losses,
        expected.held_out,
    )


CASES = some(list(KILLED), [("deepspeed", "launch.py")])


@pytest.mark.parametrize("launcher, what", CASES)
def test_a_killed_launcher_leaves_nothing_behind(lab, reference, trial, tmp_path, launcher, what):
    name, log = f"{launcher}-{what}".replace(" ", "-"), tmp_path / "log"
    shared = in_shared_memory()
    with trial(f"A3 kill -9 of {what} under {launcher}"), log.open("w") as file:
        process = started(launcher, lab, name, file)
        metrics = lab.output(name) / "metrics.jsonl"
        deadline = time.time() + 120
        while not (metrics.exists() and metrics.read_text().count("loss") >= 6):
            assert process.poll() is None and time.time() < deadline, log.read_text()
            time.sleep(0.1)
        below = descendants(process.pid)
        ranks = [pid for pid, command in below.items() if is_rank(command)]
        assert len(ranks) == 2, below
        starts = {pid: process_started(pid) for pid in below}
        os.kill(victim(what, process, below), signal.SIGKILL)
        killed = time.time()
        while any(process_started(pid) == start for pid, start in starts.items() if pid in ranks):
            assert time.time() - killed < 10, "ranks survive"
            time.sleep(0.05)
        code = process.wait(45)
        deadline = time.time() + 5
        while any(process_started(pid) == start for pid, start in starts.items()):
            assert time.time() < deadline, "processes of the launcher survive"
            time.sleep(0.05)
        assert code in KILLED[launcher, what], log.read_text()[-2000:]
        assert in_shared_memory() == shared
        if what != "a rank":
            assert "preempted: the launcher's end (rank" in log.read_text()
        check_same(lab.complete(name), reference())


@pytest.mark.parametrize("launcher", some(list(LAUNCHERS), ["deepspeed"]))
def test_a_launcher_that_is_told_to_stop_lets_the_ranks_save(lab, reference, trial, tmp_path, launcher):
    name, log = f"{launcher}-stop", tmp_path / "log"
    with trial(f"A5 SIGTERM to {launcher}"), log.open("w") as file:
        process = started(launcher, lab, name, file)
        metrics = lab.output(name) / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("loss") >= 6):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        ranks = [pid for pid, command in descendants(process.pid).items() if is_rank(command)]
        process.send_signal(signal.SIGTERM)  # DeepSpeed's runner dies of it, torchrun passes it on
        process.wait(60)
        wait_for_end(ranks)
        assert "which is saved; start the same command again" in log.read_text(), log.read_text()[-3000:]
        check_same(lab.complete(name), reference())
