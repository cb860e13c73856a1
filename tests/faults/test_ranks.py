"""Ranks that hang, raise or lag: all end, in time, and one line names the rank and the step."""

import json
import os
import signal
import time

import pytest

from tests.faults.harness import beyond_make_test, some

pytestmark = pytest.mark.timeout(7200)
ERRORS = ["ValueError", "MemoryError"]


@pytest.mark.parametrize("error, rank", some([(e, r) for e in ERRORS for r in (0, 1)], [("MemoryError", 1)]))
def test_a_rank_that_raises_ends_all(lab, reference, trial, error, rank):
    with trial("A7 one rank raises"):
        name = f"{error}-{rank}"
        finished, cluster = lab.run(name, 2, [{"rank": rank, "at": "step 6", "do": error}])
        assert finished[rank].returncode == 1 and finished[1 - rank].returncode == 71
        line = f"rank {rank} failed at step 6: {error}: put in by the test\n"
        assert finished[rank].stderr.endswith(line) and "Traceback" in finished[rank].stderr
        assert finished[1 - rank].stderr.endswith(line) and finished[1 - rank].stderr.count("\n") == 1
        assert cluster.survived() < 10
        assert lab.checkpoints(name) == ["step-000004"]


def test_a_rank_that_hangs_is_named_when_the_collective_times_out(lab, reference, trial):
    with trial("A7 SIGSTOP of one rank"):
        cluster = lab.start("hang", 2, [{"rank": 1, "at": "step 6", "do": "stop"}], "train.ddp_timeout=8")
        cluster.happened()
        started = time.time()
        finished = cluster.programs[0].wait(60)
        assert finished.returncode == 71 and time.time() - started < 8 + 10
        assert "rank 1 did not answer at step 6" in finished.stderr and finished.stderr.count("\n") == 1
        cluster.programs[1].kill()
        assert lab.complete("hang") == reference()


@beyond_make_test
def test_a_slow_rank_changes_nothing(lab, reference, trial):
    with trial("A7 straggler"):
        finished, _ = lab.run("slow", 2, [{"rank": 1, "at": f"step {k}", "do": "sleep 0.5"} for k in range(3, 9)])
        assert [ended.returncode for ended in finished] == [0, 0]
        assert lab.outcome("slow") == reference()


def test_a_second_run_in_the_same_directory_refuses(lab, reference, trial):
    cluster = lab.start("shared", 2, [{"rank": 0, "at": "step 3", "do": "sleep 4"}])
    cluster.happened()
    for _ in range(2):
        with trial("B6 two runs in one directory"):
            finished, _ = lab.run("shared-second", 1, None, f"output_dir={lab.output('shared')}")
            assert finished[0].returncode == 66 and finished[0].stderr.count("\n") == 1
            assert "is alive in it" in finished[0].stderr and "choose another output_dir" in finished[0].stderr
    assert [ended.returncode for ended in cluster.wait()] == [0, 0]
    assert lab.outcome("shared") == reference()


def test_the_same_job_and_a_dead_heartbeat_are_taken_over(lab, reference, trial):
    name = "taken-over"
    lab.run(name, 2, [{"rank": 1, "at": "step 6", "do": "kill"}])
    lock = lab.output(name) / "lock.json"
    holder = {"token": "x", "job": "77", "host": "node9", "machine": "another", "pid": 1, "started": 1}
    # The same job after five seconds, any job after five minutes.
    for age, job, fault in ((5, {"SLURM_JOB_ID": "77"}, [{"rank": 1, "at": "step 10", "do": "kill"}]), (300, {}, None)):
        with trial("B6 taking over"):
            lock.write_text(json.dumps(holder))
            os.utime(lock, (time.time() - age,) * 2)
            finished, _ = lab.run(name, 2, fault, **job)
            assert finished[0].returncode == (71 if fault else 0), finished[0].stderr
            assert "taking over from a run on node9" in finished[0].stdout
    assert lab.outcome(name) == reference()


def test_a_run_that_was_taken_over_saves_nothing_more(lab, trial):
    with trial("B6 a suspended run that another has replaced"):
        cluster = lab.start("suspended", 2, [{"rank": 0, "at": "step 3", "do": "stop"}])
        cluster.happened()
        lock = lab.output("suspended") / "lock.json"
        lock.write_text(json.dumps({"token": "of another", "host": "node9"}))
        os.kill(cluster.pids()[0], signal.SIGCONT)
        finished = cluster.wait()
        assert [ended.returncode for ended in finished] == [71, 71], finished[0].stderr
        assert "another run has taken over" in finished[0].stderr and "step 5/" not in finished[0].stdout
        assert lab.checkpoints("suspended") == [] and json.loads(lock.read_text())["token"] == "of another"
