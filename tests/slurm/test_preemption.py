"""Row A6 of the fault table: whatever SLURM does to a job, it continues to the same bits; only scancel ends it.

A trial costs a minute or two, so make test-slurm has one; with ABBA_TRIALS=100 there are 20, through all ways in turn.
"""

import itertools
import signal

import pytest

from tests.faults.harness import TRIALS, beyond_make_test, chance
from tests.slurm.jobs import STEPS, last_step, outcome
from tests.slurm.ways import WAYS

# SLURM looks at time limits every half minute, and this run is shorter: see test_requeue.py.
SHORT = [way for way in WAYS if way != "time limit"]
HOW_MANY = 1 if TRIALS < 10 else max(len(SHORT), TRIALS // 5)
CASES = [(trial, way) for trial, way in zip(range(HOW_MANY), itertools.cycle(SHORT), strict=False)]


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
def test_a_killed_rank_ends_all_others_and_the_job(jobs):
    run = jobs.root / "killed"
    job = jobs.train(run, "train.max_steps=2000")
    jobs.until_step(job, run, 1)
    jobs.signal_rank(job, 1, signal.SIGKILL)
    assert jobs.wait(job) == "FAILED"
    assert jobs.exit_code(job) == 137 and jobs.show(job)["Restarts"] == "0", jobs.log(job)
    assert "ends with code 137" in jobs.log(job)
