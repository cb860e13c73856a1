"""What SLURM does to a running job, by name: each way leaves it requeued, or about to be."""

from pathlib import Path


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
    jobs.command("scontrol", "update", "nodename=node2", "state=resume")  # it may be back by itself


def out_of_time(jobs, job, run):
    """The limit is moved to two minutes ahead, which is within --signal's 300 s: SLURM's own clock sends the signal.

    It looks every half minute: the run must last longer.
    """
    minutes = int(jobs.show(job)["RunTime"].split(":")[-2]) + 2
    jobs.control("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")
    jobs.until(lambda: jobs.show(job)["JobState"] == "PENDING", job, "the requeue before the time limit")
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
