"""Asked to stop: one save at the next step boundary, exit code 75, and an exact continuation."""

import os
import signal
import time

import pytest

from tests.faults.harness import STEPS, TRIALS, chance

pytestmark = pytest.mark.timeout(7200)


def kinds(random):
    """(faults, first step after which it may be saved): to one rank, to all, during a save, during an evaluation."""
    step, number = random.randrange(2, STEPS - 2), random.choice(["TERM", "USR1"])
    one, boundary = random.randrange(2), random.choice([4, 8, 12, 16])
    return [
        ([{"rank": one, "at": f"step {step}", "do": number}], step),
        ([{"rank": rank, "at": f"step {step}", "do": number} for rank in (0, 1)], step),
        ([{"rank": one, "at": "fsync", "nth": boundary // 4, "do": number}], boundary),
        ([{"rank": one, "at": "rename", "nth": boundary // 4, "do": number}], boundary),
        ([{"rank": one, "at": "eval", "nth": 1, "do": number}], 12),
    ]


def test_a_signal_saves_once_and_the_run_goes_on_exactly(lab, reference, trial):
    random = chance("A5")
    for number in range(max(5, TRIALS)):
        faults, step = kinds(random)[number % 5]
        name = f"signal-{number}"
        with trial("A5 SIGTERM or SIGUSR1 to one rank, to all, during a save, during an evaluation"):
            finished, _ = lab.run(name, 2, faults, "checkpoint.save_total_limit=24")
            assert [ended.returncode for ended in finished] == [75, 75], finished[0].stderr
            said = finished[0].stderr
            assert said.count("\n") == 1 and "which is saved; start the same command again" in said
            saved = [int(name.removeprefix("step-")) for name in lab.checkpoints(name)]
            regular = [4 * k for k in range(1, 7) if 4 * k < saved[-1]]
            assert saved == [*regular, saved[-1]] and step <= saved[-1] <= step + 1, (faults, saved)
            assert lab.complete(name) == reference()


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
        assert "step 6 did not end within checkpoint.grace_seconds=2 of SIGUSR1" in finished[0].stderr
        assert cluster.survived() < 12
        assert lab.complete("grace") == reference()


def test_a_signal_while_loading_ends_at_once(lab, trial):
    with trial("A5 a signal before the first step"):
        cluster = lab.start("early", 2)
        time.sleep(0.7)
        for pid in cluster.pids():
            os.kill(pid, signal.SIGTERM)
        finished = cluster.wait()
        assert {ended.returncode for ended in finished} <= {75, -15}, finished[0].stderr  # -15: not yet listening
        assert lab.checkpoints("early") == []
