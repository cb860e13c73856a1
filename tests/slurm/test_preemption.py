"""Row A6 of the fault table: whatever SLURM does to a job, it continues to the same bits; only scancel ends it.

A trial costs a minute or two, so make test-slurm has one; make test-faults has 20, through all ways in turn.
"""

import itertools
import signal

import pytest

from tests.faults.harness import TRIALS, beyond_make_test, chance
from tests.slurm.jobs import STEPS, last_step, outcome
from tests.slurm.ways import WAYS

ROW = "A6 stopped by SLURM, real training"
# SLURM looks at time limits every half minute, and this run is shorter: it has a test of its own.
SHORT = [way for way in WAYS if way != "time limit"]
HOW_MANY = 1 if TRIALS < 10 else max(len(SHORT), TRIALS // 5)
CASES = [(number, way) for number, way in zip(range(HOW_MANY), itertools.cycle(SHORT), strict=False)]


def stop_and_continue(jobs, run, way, *overrides, steps=STEPS):
    """Train with a stop, or several; the job ends as one that nobody stopped."""
    job, orders = jobs.train(run, *overrides), WAYS[way]
    random, step = chance(f"A6 {run.name}"), 0
    for restarts, order in enumerate(orders, start=1):
        step += random.randint(1, (steps - 4) // len(orders))
        jobs.until_step(job, run, step)
        order(jobs, job, run)
        jobs.until_restarted(job, restarts)
        step = last_step(run)
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    log = jobs.log(job)
    assert jobs.show(job)["Restarts"] == str(len(orders)), log
    assert log.count("checkpoint: continuing from") == len(orders), log
    assert log.count(f"== job {job}, start ") == len(orders) + 1  # one log, appended to


@pytest.mark.parametrize("number, way", CASES, ids=[f"{number} {way}" for number, way in CASES])
def test_a_job_that_is_stopped_continues_to_the_same_bits(jobs, reference, trial, number, way):
    with trial(f"{ROW}: {way}"):
        stop_and_continue(jobs, jobs.root / f"stopped-{number}", way)
        assert outcome(jobs.root / f"stopped-{number}") == outcome(reference[1])


@pytest.mark.skipif(TRIALS < 100, reason="five minutes; make test-faults runs it")
def test_a_job_out_of_time_continues_to_the_same_bits(jobs, trial):
    """Two runs that are longer than SLURM's half minute."""
    longer = ("train.max_steps=300", "checkpoint.save_steps=50")
    undisturbed = jobs.root / "long"
    with trial(f"{ROW}: time limit"):
        assert jobs.wait(jobs.train(undisturbed, *longer)) == "COMPLETED"
        stop_and_continue(jobs, jobs.root / "out of time", "time limit", *longer, steps=20)
        assert outcome(jobs.root / "out of time") == outcome(undisturbed)


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
