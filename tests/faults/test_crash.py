"""Killed at any time: the next start of the same command ends as if nothing had happened."""

import hashlib
import json
import time

import pytest

from abba.checkpoint.format import list_checkpoints, verify
from abba.errors import CheckpointError
from tests.faults.harness import LAYERS, SAVE_STEPS, TRIALS, beyond_make_test, chance

IO_POINTS = ("write", "fsync", "manifest", "rename", "dirsync")


def valid(lab, run):
    """Steps of the checkpoints that verify."""
    steps = []
    for directory in list_checkpoints(lab.output(run) / "checkpoints"):
        try:
            verify(directory)
            steps.append(int(directory.name.removeprefix("step-")))
        except CheckpointError:
            pass
    return steps


def steps_done(lab, run):
    path = lab.output(run) / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def check_survivors(cluster, finished, *victims):
    for rank, ended in enumerate(finished):
        if rank in victims:
            assert ended.returncode == -9
        else:
            # Ranks that have not met yet know nothing of each other: the launcher ends them.
            before_they_met = ended.returncode == 75 and "outside the training steps" in ended.stderr
            assert ended.returncode == 71 or before_they_met, ended.stderr
            assert "Traceback" not in ended.stderr
    assert len(victims) == len(finished) or cluster.survived() <= 10


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("world", [2, 4])
def test_kill_any_rank_at_any_time(lab, reference, trial, world):
    random, kills, run = chance(f"A1 {world}"), 0, 0
    expected, name = reference(world), f"any-{world}-0"
    while kills < (TRIALS if world == 2 or TRIALS >= 10 else 1):
        with trial(f"A1 kill -9 of one rank of {world} at a random time"):
            lab.again(name)
            cluster, victim = lab.start(name, world), random.randrange(world)
            time.sleep(random.uniform(0.5, 4.0 if world == 2 else 8.0))
            if all(program.process.exitcode is None for program in cluster.programs):
                cluster.kill(victim)
                finished = cluster.wait()
                check_survivors(cluster, finished, victim)
                assert steps_done(lab, name) - max(valid(lab, name), default=0) <= SAVE_STEPS
                kills += 1
            else:
                assert [ended.returncode for ended in cluster.wait()] == [0] * world
        if steps_done(lab, name) == expected.step:
            run, done, name = run + 1, name, f"any-{world}-{run + 1}"
            assert lab.complete(done, world) == expected
    lab.again(name)
    assert lab.complete(name, world) == expected


@pytest.mark.timeout(7200)
def test_kill_at_each_io_point_of_a_save(lab, reference, trial):
    """A chain of kills: each start saves once or twice and is killed in that save; the end is still exact."""
    random = chance("A2")
    orders = [(point, rank, nth) for point in IO_POINTS for rank in (0, 1) for nth in (1, 2)]
    random.shuffle(orders)
    orders = (orders * -(-TRIALS // len(orders)))[:TRIALS]
    name, run = "io-0", 0
    for point, rank, nth in orders:
        with trial("A2 kill -9 at an I/O point of a save"):
            if steps_done(lab, name) > reference().step - 3 * SAVE_STEPS:
                lab.again(name)
                assert lab.complete(name) == reference()
                run, name = run + 1, f"io-{run + 1}"
            lab.again(name)
            before = valid(lab, name)
            finished, cluster = lab.run(name, 2, [{"rank": rank, "at": point, "nth": nth, "do": "kill"}])
            check_survivors(cluster, finished, rank)
            after = valid(lab, name)
            assert after == [int(step.removeprefix("step-")) for step in lab.checkpoints(name)], "a name is a promise"
            saved = (before[-1] if before else 0) + nth * SAVE_STEPS
            # Killed before the rename the old one is the newest, after it the new one; another rank may be slower.
            newest = max(after, default=0)
            assert newest == saved or (point, rank) != ("dirsync", 0)
            assert newest in ((saved - SAVE_STEPS,) if point in ("write", "fsync", "manifest") and rank == 0 else (
                saved - SAVE_STEPS, saved)), (point, rank, nth, before, after)  # fmt: skip
    lab.again(name)
    assert lab.complete(name) == reference()
    assert not list((lab.output(name) / "checkpoints").glob("*.tmp"))


@pytest.mark.timeout(7200)
def test_kill_all_ranks_at_once(lab, reference, trial):
    random = chance("A3")
    for number in range(max(1, TRIALS // 5)):
        name = f"all-{number}"
        with trial("A3 kill -9 of all ranks at once"):
            cluster = lab.start(name, 2, [{"rank": 0, "at": f"step {random.randrange(1, 24)}", "do": "sleep 0.3"}])
            cluster.happened()
            cluster.kill(0, 1)
            assert [ended.returncode for ended in cluster.wait()] == [-9, -9]
            assert lab.complete(name) == reference()


@pytest.mark.timeout(7200)
def test_kill_while_resuming_writes_nothing(lab, reference, trial):
    random, name = chance("A4"), "resuming"
    lab.run(name, 2, [{"rank": 1, "at": "step 10", "do": "kill"}])
    before = contents(lab.output(name) / "checkpoints")
    for _ in range(max(2, TRIALS // 10 * 5)):
        with trial("A4 kill -9 while a checkpoint is being loaded"):
            lab.again(name)
            fault = {"rank": random.randrange(2), "at": "read", "nth": random.randrange(1, 80 * LAYERS), "do": "kill"}
            finished, cluster = lab.run(name, 2, [fault])
            check_survivors(cluster, finished, fault["rank"])
            assert contents(lab.output(name) / "checkpoints") == before
    lab.again(name)
    assert lab.complete(name) == reference()


def contents(root):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}


def test_a_fault_at_the_same_step_each_time_stops_after_three_starts(lab, reference, trial):
    fault = [{"rank": 1, "at": "step 3", "do": "ValueError"}]
    with trial("A8 restart loop"):
        for _ in range(3):
            finished, _ = lab.run("loop", 2, fault)
            assert [ended.returncode for ended in finished] == [71, 1]
        finished, _ = lab.run("loop", 1, fault, "train.per_device_train_batch_size=2")
        assert finished[0].returncode == 76
        assert "3 starts in a row" in finished[0].stderr and "after the start" in finished[0].stderr
        assert "rank 1 failed at step 3: ValueError: put in by the test" in finished[0].stderr
        assert finished[0].stderr.count("\n") == 1 and not (lab.output("loop") / "lock.json").exists()
        lab.again("loop")
        assert lab.complete("loop") == reference()


@pytest.mark.timeout(7200)
@beyond_make_test
def test_kill_between_the_steps_of_a_rotation(lab, reference, trial):
    name = "rotation"
    for number in range(max(1, TRIALS // 5)):
        with trial("B7 kill -9 between the steps of a rotation"):
            if steps_done(lab, name) >= 16:
                lab.again(name)
                assert lab.complete(name) == reference()
                name = f"rotation-{number}"
            lab.again(name)
            finished, cluster = lab.run(
                name, 2, [{"rank": 0, "at": "rotate", "do": "kill"}], "checkpoint.save_total_limit=1"
            )
            check_survivors(cluster, finished, 0)
            assert valid(lab, name)[-1] == steps_done(lab, name), "what was just saved is valid"
    lab.again(name)
    assert lab.complete(name) == reference()
