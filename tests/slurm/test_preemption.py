"""Row A6 of the fault table: whatever SLURM does to a job, it continues to the same bits; only scancel ends it.

A trial costs a minute or two, so make test-slurm has one; with ABBA_TRIALS=100 there are 20, through all ways in turn.
"""

import itertools
import json
import math
from pathlib import Path

import pytest

from tests.faults.harness import TRIALS, beyond_make_test, chance
from tests.slurm.jobs import SHAPE, STEPS, outcome


def told_by_usr1(jobs, job, run):
    jobs.control("scancel", "--batch", "--signal=USR1", job)


def told_when_every_process_gets_usr1(jobs, job, run):
    jobs.control("scancel", "--full", "--signal=USR1", job)


def requeued_by_hand(jobs, job, run):
    jobs.control("scontrol", "requeue", job)


def preempted(jobs, job, run):
    urgent = jobs.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 1")
    assert jobs.wait(urgent) == "COMPLETED"


def preempted_without_usr1(jobs, job, run):
    """As on a cluster whose administrator has not set preempt_send_user_signal: TERM, for the steps."""
    config = Path(jobs.environment["SLURM_CONF"])
    before = config.read_text()
    try:
        config.write_text(before.replace("SlurmctldParameters=preempt_send_user_signal\n", ""))
        jobs.control("scontrol", "reconfigure")
        preempted(jobs, job, run)
    finally:
        config.write_text(before)
        jobs.control("scontrol", "reconfigure")


def node_down(jobs, job, run):
    jobs.control("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    jobs.until(lambda: jobs.show(job)["JobState"] == "PENDING", job, "the requeue after a node's end")
    jobs.control("scontrol", "update", "nodename=node2", "state=resume")


def out_of_time(jobs, job, run):
    """The limit is moved to the end of this minute or the next: SLURM's own clock sends the signal."""
    minutes = math.ceil((int(jobs.show(job)["RunTime"].split(":")[-2]) * 60 + 30) / 60) + 1
    jobs.control("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")
    jobs.until(lambda: "asked to stop and saved" in jobs.log(job), job, "the signal before the time limit")
    jobs.control("scontrol", "update", f"jobid={job}", "timelimit=60")


WAYS = {
    "USR1": [told_by_usr1],
    "three USR1 in a row": [told_by_usr1] * 3,
    "preempted by another partition": [preempted],
    "preempted without USR1": [preempted_without_usr1],
    "scontrol requeue": [requeued_by_hand],
    "node set down": [node_down],
    "USR1 to every process": [told_when_every_process_gets_usr1],
    "time limit": [out_of_time],
}
HOW_MANY = 1 if TRIALS < 10 else max(len(WAYS), TRIALS // 5)
CASES = [(trial, way) for trial, way in zip(range(HOW_MANY), itertools.cycle(WAYS), strict=False)]


@pytest.mark.parametrize("trial, way", CASES, ids=[f"{trial} {way}" for trial, way in CASES])
def test_a_job_that_is_stopped_continues_to_the_same_bits(jobs, reference, trial, way):
    run, orders = jobs.root / f"stopped-{trial}", WAYS[way]
    job = jobs.train(run)
    random, step = chance(f"A6 {trial}"), 0
    for restarts, order in enumerate(orders, start=1):
        step += random.randint(1, (STEPS - 4) // len(orders))
        jobs.until_step(job, run, step)
        order(jobs, job, run)
        jobs.until_restarted(job, restarts)
        step = last_step(run)
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    log = jobs.log(job)
    assert jobs.show(job)["Restarts"] == str(len(orders)), log
    assert log.count("checkpoint: continuing from") == len(orders), log
    assert log.count(f"== job {job}, start ") == len(orders) + 1  # one log, appended to
    assert outcome(run) == outcome(reference[1])


def last_step(run):
    return max(json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines())


def test_scancel_is_not_revived(jobs):
    run = jobs.root / "cancelled"
    job = jobs.train(run, "train.max_steps=2000")
    jobs.until_step(job, run, 1)
    jobs.control("scancel", job)
    assert jobs.wait(job) == "CANCELLED"
    assert jobs.show(job)["Restarts"] == "0"
    assert "requeued, to continue" not in jobs.log(job)
    assert not list((run / "checkpoints").glob("*.tmp"))


@beyond_make_test
def test_nothing_is_requeued_that_did_not_save(jobs):
    """Killed ranks end a job that SLURM has asked to stop, too: a job that fails must not come back for ever."""
    run = jobs.root / "killed"
    job = jobs.train(run, "train.max_steps=2000", options=[*SHAPE, "--signal=B:USR1@10"])
    jobs.until_step(job, run, 1)
    jobs.control("scancel", "--signal=KILL", job)  # the ranks, not the batch script
    assert jobs.wait(job) == "FAILED"
    assert jobs.exit_code(job) == 137 and jobs.show(job)["Restarts"] == "0", jobs.log(job)
    assert "ends with code 137" in jobs.log(job)
