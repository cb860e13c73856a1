"""Every way in which SLURM stops a job, and the batch script's part in it: who comes back, and who must not.

That training continues to the same bits is test_preemption.py's subject and takes minutes for each way. Here a program
that counts stands in for it, so that all ways are taken in seconds.
"""

import json
import signal

import pytest

from tests.faults.harness import beyond_make_test, chance
from tests.slurm.jobs import SHAPE, last_step
from tests.slurm.ways import WAYS

STEPS = {"time limit": 600}  # of 0.1 s; counter.py's, else 60


@pytest.fixture
def counting(jobs, counter):
    """counting(run, *arguments) -> a job that counts."""
    return lambda run, *arguments, **variables: jobs.train(run, *arguments, **counter, **variables)


def steps(run):
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


QUICK = [way for way in WAYS if way != "time limit"]  # which is a minute's at least


@pytest.mark.parametrize("way", [*QUICK, pytest.param("time limit", marks=beyond_make_test)])
def test_a_stopped_job_comes_back_and_ends(jobs, counting, way):
    run, random = jobs.root / f"counted {'slowly' * (way in STEPS)} {way}", chance(way)
    job = counting(run)
    for restarts, order in enumerate(WAYS[way], start=1):
        jobs.until_step(job, run, last_step(run) + random.randint(1, 8))
        order(jobs, job, run)
        jobs.until_restarted(job, restarts)
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    log = jobs.log(job)
    assert steps(run) == list(range(1, STEPS.get(way, 60) + 1))
    assert jobs.show(job)["Restarts"] == str(len(WAYS[way])) and log.count("\ncontinuing") == len(WAYS[way]), log
    assert not list((jobs.root / "scratch").glob(f"abba-{job}-*"))


def test_a_job_that_is_asked_too_early_to_listen_comes_back(jobs, counting):
    programs = ["preflight", "plan", "train"]
    run = jobs.root / f"asked in {' '.join(programs)}"
    job = counting(run)
    comes_back(jobs, job, run, programs, "USR1")
    assert steps(run) == list(range(1, 61))


@pytest.mark.parametrize("way", ["USR1", "preempted without USR1"])
def test_scoring_that_is_stopped_goes_on(jobs, counter, way):
    run = jobs.root / f"asked in evaluate/by {way}"
    options = ["--nodes=1", "--gpus-per-node=1", "--cpus-per-task=1", "slurm/convert_evaluate.sh"]
    comes_back(jobs, jobs.submit(*options, str(run), **counter), run, ["evaluate"], way)


def comes_back(jobs, job, run, programs, way):
    """Stopped while each of `programs` runs, at one start after the other; nothing else is said to be wrong."""
    for start, program in enumerate(programs, start=1):
        deaf = f"launch/{program}.py" if program != "preflight" else "slurm/preflight.py"
        jobs.until(lambda deaf=deaf: f"{deaf} does not listen yet" in jobs.log(job), job, f"the start of {program}")
        for order in WAYS[way]:
            order(jobs, job, run)
        jobs.until_restarted(job, start)
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    said = jobs.log(job)
    assert jobs.show(job)["Restarts"] == str(len(programs)) == str(said.count("requeued, to continue")), said
    assert said.count(" ends with code ") == 1 and "lines above" not in said and "a rank was lost" not in said, said
    assert not list((jobs.root / "scratch").glob(f"abba-{job}-*"))


def test_a_cancelled_job_does_not_come_back(jobs, counting):
    run = jobs.root / "counted and cancelled"
    job = counting(run)
    jobs.until_step(job, run, 5)
    jobs.control("scancel", job)
    assert jobs.wait(job) == "CANCELLED"
    assert jobs.show(job)["Restarts"] == "0" and "requeued" not in jobs.log(job)


def test_ranks_that_somebody_else_ends_do_not_come_back(jobs, counting):
    """TERM to the ranks alone is nobody's preemption: they save, and the job ends with their code."""
    run = jobs.root / "counted and ended"
    job = counting(run)
    jobs.until_step(job, run, 5)
    jobs.control("scancel", "--signal=TERM", job)
    assert jobs.wait(job) == "FAILED"
    assert jobs.exit_code(job) == 75 and jobs.show(job)["Restarts"] == "0", jobs.log(job)
    assert "stopped by neither the time limit nor a preemption" in jobs.log(job)


def test_a_killed_rank_ends_the_job(jobs, counting):
    run = jobs.root / "counted and killed"
    job = counting(run)
    jobs.until_step(job, run, 5)
    jobs.signal_rank(job, 1, signal.SIGKILL)
    assert jobs.wait(job) == "FAILED"
    assert jobs.exit_code(job) == 137 and jobs.show(job)["Restarts"] == "0", jobs.log(job)
    assert "== a rank was lost" in jobs.log(job)


@pytest.fixture
def reservation(jobs):
    name = "reservationname=lent"
    jobs.control("scontrol", "create", "reservation", name, "starttime=now", "duration=60", "users=root", "nodes=ALL")
    yield "lent"
    jobs.command("scancel", "--reservation=lent")  # what a failed test has left
    jobs.until(lambda: jobs.command("scontrol", "delete", name).returncode == 0, "lent", "the reservation's end", 30)


def test_the_next_job_outlives_a_requeue_and_takes_the_same_nodes(jobs, counting, reservation):
    """afterok waits for the end, not for the first stop; its own python here cannot convert what was only counted."""
    run = jobs.root / "counted and chained"
    options = [*SHAPE, f"--reservation={reservation}", "--constraint=fast"]
    # chosen by the template: this job's CPUs of a rank
    job = counting(run, options=options, ABBA_CHAIN="yes", OMP_NUM_THREADS="")
    jobs.until_step(job, run, 5)
    following = jobs.log(job).split(" converts what")[0].split()[-1]
    WAYS["USR1"][0](jobs, job, run)
    jobs.until_restarted(job, 1)
    pending = jobs.show(following)
    assert [pending.get(name) for name in ("JobState", "Features", "Reservation")] == ["PENDING", "fast", reservation]
    assert jobs.wait(job) == "COMPLETED"
    assert jobs.wait(following) == "COMPLETED", jobs.log(following)
    assert "threads: 2" in jobs.log(following), "not this job's 1"
    said = jobs.log(job)
    assert said.count(" converts what") == 1 and f"converted next by job {following}" in said


def test_the_next_job_is_asked_for_once_whenever_the_first_is_requeued(jobs, counting):
    run = jobs.root / "requeued early"
    job = counting(run, ABBA_CHAIN="yes")
    jobs.until(lambda: "== preflight on" in jobs.log(job), job, "its preflight")
    jobs.control("scontrol", "requeue", job)
    jobs.until_restarted(job, 1)
    assert jobs.wait(job) == "COMPLETED"
    said = jobs.log(job)
    assert said.count(" converts what") == 1, said
    following = said.split(" converts what")[0].split()[-1]
    assert jobs.wait(following) == "COMPLETED", jobs.log(following)


def test_a_next_job_that_is_gone_is_asked_for_again(jobs, counting):
    run = jobs.root / "counted and chained twice"
    job = counting(run, ABBA_CHAIN="yes")
    jobs.until_step(job, run, 5)
    gone = jobs.log(job).split(" converts what")[0].split()[-1]
    jobs.control("scancel", gone)
    assert jobs.wait(gone) == "CANCELLED"
    WAYS["USR1"][0](jobs, job, run)
    jobs.until_restarted(job, 1)
    assert jobs.wait(job) == "COMPLETED"
    said = jobs.log(job)
    following = said.split("converted next by job ")[1].split(":")[0]
    assert said.count(" converts what") == 2 and following != gone
    assert jobs.wait(following) == "COMPLETED", jobs.log(following)


def test_no_job_follows_what_is_trained_whole(jobs, counting):
    run = jobs.root / "counted by full"
    job = counting(run, ABBA_CHAIN="yes", SLURM_LABELIO="1")
    assert jobs.wait(job) == "COMPLETED"
    said = jobs.log(job)
    assert "0: planned" in said and "0: from the start" in said  # each line of a task with its number
    assert "no job follows: score what this one trains with evaluate.py --model" in said and "converts what" not in said


def test_an_array_element_that_comes_back_comes_alone(jobs, counter):
    """To SLURM the number of one element's job is that of the whole array."""
    sweep = jobs.root / "a sweep that is stopped"
    options = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--array=0-1"]
    variables = {"ABBA_RATES": "1e-3 2e-3", "ABBA_SWEEP": str(sweep), "ABBA_CHAIN": "no", **counter}
    job = jobs.submit(*options, "slurm/sweep.sh", **variables)
    elements = {f"{job}_0": sweep / "1e-3", f"{job}_1": sweep / "2e-3"}
    for element, run in elements.items():
        jobs.until_step(element, run, 3)
    master = next(element for element in elements if jobs.show(element)["JobId"] == job)
    jobs.control("scancel", "--batch", "--signal=USR1", master)
    jobs.until_restarted(master, 1)
    for element, run in elements.items():
        assert jobs.wait(element) == "COMPLETED"
        assert jobs.show(element)["Restarts"] == str(int(element == master))
        assert steps(run) == list(range(1, 61))
