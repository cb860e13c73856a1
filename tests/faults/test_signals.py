"""Asked to stop: one save at the next step boundary, exit code 75, and an exact continuation."""

import os
import signal
import time

import pytest

from tests.faults.harness import STEPS, TRIALS, beyond_make_test, chance

pytestmark = pytest.mark.timeout(7200)


def asked(random, kind, done):
    """Faults that ask for a stop a few steps after `done`, and the first step after which it may be saved."""
    step, number, one = done + random.randrange(1, 4), random.choice(["TERM", "USR1"]), random.randrange(2)
    if kind == "one":
        return [{"rank": one, "at": f"step {step}", "do": number}], step
    if kind == "all":
        return [{"rank": rank, "at": f"step {step}", "do": number} for rank in (0, 1)], step
    if kind == "eval":
        return [{"rank": one, "at": "eval", "do": number}], 12
    return [{"rank": one, "at": kind, "do": number}], (done // 4 + 1) * 4


def test_a_signal_saves_once_and_the_run_goes_on_exactly(lab, reference, trial):
    """A chain: each start is asked to stop, the next goes on from there; the end is exact."""
    random, chains, left = chance("A5"), 0, max(5, TRIALS)
    while left > 0:
        name, done, order = f"signals-{chains}", 0, ["one", "fsync", "all", "rename", "eval"]
        chains += 1
        random.shuffle(order)
        while left > 0 and done < STEPS - 5:
            kind = order.pop(0) if order else random.choice(["one", "all", "fsync", "rename"])
            if kind == "eval" and done >= 12:
                continue
            with trial("A5 SIGTERM or SIGUSR1 to one rank, to all, during a save, during an evaluation"):
                faults, step = asked(random, kind, done)
                finished, _ = lab.run(name, 2, faults, "checkpoint.save_total_limit=24")
                assert [ended.returncode for ended in finished] == [75, 75], finished[0].stderr
                said = finished[0].stderr
                assert said.count("\n") == 1 and "which is saved; start the same command again" in said
                saved = [int(name.removeprefix("step-")) for name in lab.checkpoints(name)]
                regular = [number for number in saved if done < number < saved[-1]]
                assert regular == [number for number in range(done + 1, saved[-1]) if number % 4 == 0]
                assert step <= saved[-1] <= step + 1, (faults, done, saved)
                done, left = saved[-1], left - 1
        assert lab.complete(name) == reference()


@pytest.mark.parametrize("do, code", [("kill", 71), ("TERM", 75)])
def test_the_last_held_out_loss_is_made_up_by_the_next_start(lab, reference, trial, do, code):
    """All steps are done and saved: nothing else would start the model again."""
    with trial("A5 killed or asked to stop during the last evaluation"):
        finished, _ = lab.run(f"owed-{do}", 2, [{"rank": 1, "at": "eval", "nth": 2, "do": do}])
        assert finished[0].returncode == code, finished[0].stderr
        assert [step for step, _ in lab.outcome(f"owed-{do}").held_out] == [12]
        assert lab.complete(f"owed-{do}") == reference()


def test_a_second_signal_ends_at_once(lab, reference, trial):
    with trial("A5 second signal"):
        slow = [{"rank": 1, "at": "step 6", "do": "TERM"}, {"rank": 1, "at": "step 6", "do": "sleep 60"}]
        cluster = lab.start("twice", 2, slow)
        cluster.happened()
        time.sleep(2.5)
        os.kill(cluster.pids()[1], signal.SIGTERM)
        asked = time.time()
        finished = cluster.wait()
        assert [ended.returncode for ended in finished] == [71, 71]
        assert "a second SIGTERM during step 6: ended without saving" in finished[1].stderr
        assert cluster.ended[1] - asked < 2 and cluster.ended[0] - asked < 10
        assert lab.checkpoints("twice") == ["step-000004"]
        assert lab.complete("twice") == reference()


@beyond_make_test
def test_a_signal_that_comes_twice_through_a_launcher_is_one_request(lab, trial):
    with trial("A5 the same signal twice within a second"):
        both = [{"rank": 1, "at": "step 6", "do": "TERM"}, {"rank": 1, "at": "step 6", "do": "sleep 0.5"}]
        finished, _ = lab.run("doubled", 2, [*both, {"rank": 1, "at": "step 6", "do": "TERM"}])
        assert [ended.returncode for ended in finished] == [75, 75]


def test_no_step_boundary_within_the_grace_time_ends_at_once(lab, reference, trial):
    with trial("A5 no step boundary within the grace time"):
        slow = [{"rank": 0, "at": "step 6", "do": "USR1"}, {"rank": 0, "at": "step 6", "do": "sleep 60"}]
        finished, cluster = lab.run("grace", 2, slow, "checkpoint.grace_seconds=2")
        assert [ended.returncode for ended in finished] == [71, 71]
        assert "step 6 did not end within 2 s of SIGUSR1 (checkpoint.grace_seconds=2)" in finished[0].stderr
        assert cluster.survived() < 12
        assert lab.complete("grace") == reference()


@pytest.mark.parametrize("at", ["step 6", "fsync"])
def test_a_save_may_take_longer_than_the_grace_time(lab, reference, trial, at):
    """The step has ended in time, or comes after the save during which the signal came."""
    with trial("A5 a save that is longer than the grace time"):
        nth = {"step 6": 2, "fsync": 1}[at]
        faults = [{"rank": 0, "at": at, "do": "USR1"}, {"rank": 0, "at": "fsync", "nth": nth, "do": "sleep 5"}]
        faults += [{"rank": 0, "at": "step 5", "do": "sleep 2"}]  # after the first save: the time counts anew
        finished, _ = lab.run(f"long-save-{at[:4]}", 2, faults, "checkpoint.grace_seconds=3")
        assert [ended.returncode for ended in finished] == [75, 75], finished[0].stderr
        assert lab.complete(f"long-save-{at[:4]}") == reference()


def test_a_signal_while_loading_ends_at_once(lab, trial):
    with trial("A5 a signal before the first step"):
        cluster = lab.start("early", 2)
        cluster.says("adapter: ")  # the base is loaded, the engine is not
        for pid in cluster.pids():
            os.kill(pid, signal.SIGTERM)
        finished = cluster.wait()
        assert [ended.returncode for ended in finished] == [75, 75], finished[0].stderr
        assert lab.checkpoints("early") == []


def test_a_requeued_job_continues_though_it_was_to_start_over(lab, reference, trial):
    """The same sbatch arguments again: checkpoint.resume=never would discard the checkpoint that the job has saved."""
    over = ("checkpoint.resume=never", "overwrite_output_dir=true")
    with trial("A6 requeued with checkpoint.resume=never"):
        stopped, _ = lab.run(
            "over", 2, [{"rank": 1, "at": "step 6", "do": "USR1"}], *over, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="0"
        )
        assert [ended.returncode for ended in stopped] == [75, 75]
        finished, _ = lab.run("over", 2, [], *over, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
        assert [ended.returncode for ended in finished] == [0, 0], finished[0].stderr
        assert (
            "this job was requeued and goes on; checkpoint.resume=never was for its first start" in finished[0].stdout
        )
        assert "continuing from" in finished[0].stdout
        assert lab.outcome("over") == reference()
