"""Full, failing and vanishing disks: the old checkpoint stays, nobody hangs, and the run goes on where it can."""

import re
import subprocess

import pytest

from tests.faults.harness import CHECKPOINT_BYTES, TRIALS, beyond_make_test, chance, some

pytestmark = pytest.mark.timeout(7200)


@pytest.fixture
def small_disk(lab):
    """A file system of 3 MB for one run's directory."""
    mounted = []

    def mount(run):
        target = lab.output(run)
        target.mkdir(parents=True)
        result = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(target)], capture_output=True)
        if result.returncode != 0:
            pytest.skip(f"needs the right to mount a tmpfs: {result.stderr.decode().strip()}")
        mounted.append(target)

    yield mount
    for target in mounted:
        subprocess.run(["umount", "-l", str(target)], check=True)


SIZES = [int(share * CHECKPOINT_BYTES) for share in (0, 0.005, 0.1, 0.3, 0.48, 0.52, 0.7, 0.9, 0.97, 0.99)]


@pytest.mark.parametrize("left", some(SIZES, SIZES[3:4]))
def test_a_disk_that_is_full_for_all_is_waited_for(lab, reference, trial, small_disk, left):
    name = f"full-{left}"
    small_disk(name)
    with trial("B1 disk full for all, and emptied again"):
        full = {"rank": 0, "at": "step 6", "do": f"fill {left}"}
        finished, _ = lab.run(name, 2, [full, {"rank": 0, "at": "step 10", "do": "free"}])
        assert [ended.returncode for ended in finished] == [0, 0], finished[0].stderr
        assert "WARNING" in finished[0].stdout and "no space: this save needs" in finished[0].stdout
        assert "training goes on, the next save tries again" in finished[0].stdout
        assert lab.outcome(name) == reference()


def test_a_disk_that_stays_full_stops_the_run_after_three_saves(lab, reference, trial, small_disk):
    small_disk("stays-full")
    with trial("B1 disk full for all, for good"):
        finished, _ = lab.run("stays-full", 2, [{"rank": 0, "at": "step 6", "do": f"fill {CHECKPOINT_BYTES // 2}"}])
        assert [ended.returncode for ended in finished] == [66, 66]
        needed, free = re.search(r"no space: this save needs (\d+) kB, (\d+) kB are free", finished[0].stderr).groups()
        assert float(needed) > float(free) > 0
        assert finished[0].stdout.count("the next save tries again") == 2
        assert lab.checkpoints("stays-full") == ["step-000004"]
        assert not list((lab.output("stays-full") / "checkpoints").glob("*.tmp"))
        (lab.output("stays-full") / "ballast").unlink()
        assert lab.complete("stays-full") == reference()


POINTS = ("write", "fsync", "manifest", "rename", "dirsync")


@pytest.mark.parametrize("error", some(["ENOSPC", "EIO", "EROFS"], ["EIO"]))
def test_an_error_of_one_ranks_disk(lab, reference, trial, error):
    random = chance(f"B5 {error}")
    for number in range(max(1, TRIALS // 5)):
        point, rank = random.choice(POINTS), random.randrange(2)
        rank = rank if point in ("write", "fsync") else 0
        name = f"{error}-{number}"
        with trial("B1, B5 an error of one rank's disk in one save"):
            finished, _ = lab.run(name, 2, [{"rank": rank, "at": point, "nth": 2, "do": error}])
            assert [ended.returncode for ended in finished] == [0, 0], finished[0].stderr
            assert f"WARNING: rank {rank}: " in finished[0].stdout
            assert "the next save tries again" in finished[0].stdout
            assert lab.outcome(name) == reference()


@beyond_make_test
def test_a_slow_disk_is_waited_for(lab, reference, trial):
    seconds = 30 if TRIALS > 10 else 2
    with trial("B5 slow fsync"):
        finished, _ = lab.run(
            "slow-disk", 2, [{"rank": 1, "at": "fsync", "nth": 2, "do": f"sleep {seconds}"}], "train.ddp_timeout=60"
        )
        assert [ended.returncode for ended in finished] == [0, 0]
        assert lab.outcome("slow-disk") == reference()


def test_a_directory_that_vanishes_is_made_again(lab, reference, trial):
    with trial("B5 checkpoints removed during the run"):
        finished, _ = lab.run("vanished", 2, [{"rank": 0, "at": "step 6", "do": "remove"}])
        assert [ended.returncode for ended in finished] == [0, 0], finished[0].stderr
        assert lab.outcome("vanished") == reference()


@beyond_make_test
def test_checkpoints_behind_a_symbolic_link(lab, reference, trial, tmp_path):
    with trial("B5 checkpoints behind a symbolic link"):
        lab.output("linked").mkdir(parents=True)
        (lab.output("linked") / "checkpoints").symlink_to(tmp_path)
        lab.run("linked", 2, [{"rank": 0, "at": "step 6", "do": "kill"}])
        assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]
        assert lab.complete("linked") == reference()


def test_too_little_space_is_refused_before_the_first_step(lab, trial, small_disk):
    small_disk("too-small")
    with trial("B2 too little space at the start"):
        (lab.output("too-small") / "ballast").write_bytes(bytes(2_500_000))
        finished, _ = lab.run("too-small", 2)
        assert [ended.returncode for ended in finished] == [66, 66], finished[0].stderr
        assert "3 checkpoints and the adapter need 1." in finished[0].stderr
        assert finished[0].stderr.count("\n") == 1 and "step 1/" not in finished[0].stdout
        assert lab.checkpoints("too-small") == []
