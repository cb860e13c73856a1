"""A rank that holds up the others is named, with its node and the cause, on real ranks tied at each layer by ZeRO-3."""

import os
import re
import signal
import socket
import time

import pytest

from tests import warm
from tests.distributed.ranks import free_port, read_metrics, run_ranks
from tests.faults.harness import beyond_make_test

STEPS = [
    "train.max_steps=4",
    "train.logging_steps=2",
    "train.global_batch_size=2",  # little to compute: what is put in stands out on a machine that is busy
    "data.eval_rows=0",
    "train.eval_steps=",
]
LINE = re.compile(
    r"slow: rank (\d+) on node (\S+): (\S+) s a step of its own, the others' median \S+ s \(data (\S+) s.*steps (.*)"
)


def slow_run(tmp_path, arguments, where, rank, seconds):
    command = ["tests/distributed/slow.py", where, rank, str(seconds), *arguments(tmp_path / "run", *STEPS)]
    finished = run_ranks(tmp_path / "ranks", [command, command])
    assert [ended.returncode for ended in finished] == [0, 0], finished[0].stderr
    intervals = [record for record in read_metrics(tmp_path / "run") if "slowest_rank" in record]
    assert [record["step"] for record in intervals] == [2, 4]
    return LINE.findall(finished[0].stdout), intervals


def test_a_rank_that_is_slow_at_its_data(tmp_path, arguments):
    lines, intervals = slow_run(tmp_path, arguments, "data", "1", 3)
    node = socket.gethostname()
    assert [(line[0], line[1], line[4]) for line in lines] == [("1", node, "1-2"), ("1", node, "3-4")]
    for found in intervals:
        assert found["slowest_rank"] == 1 and 3 <= found["slowest_rank_data_seconds"] < 3.5
        assert found["other_ranks_median_data_seconds"] < 0.5
        assert found["other_ranks_median_waited_seconds"] > 2, "the other one waits for it"
        assert found["slowest_rank_own_seconds"] - found["other_ranks_median_own_seconds"] == pytest.approx(3, rel=0.3)


@beyond_make_test
def test_a_rank_that_is_slow_at_computing(tmp_path, arguments):
    """Each of 14 layers, in forward and in its recomputation, while the other rank waits at the next one."""
    lines, intervals = slow_run(tmp_path, arguments, "forward", "1", 0.08)
    assert [int(line[0]) for line in lines] == [1, 1]
    for found in intervals:
        assert found["slowest_rank_data_seconds"] < 0.5, "it is not the data"
        excess = found["slowest_rank_own_seconds"] - found["other_ranks_median_own_seconds"]
        assert 0.7 < excess / (2 * 14 * 0.08) < 2  # a sleep takes longer than it says where processors are few


@beyond_make_test
def test_ranks_that_are_equally_slow_are_not_named(tmp_path, arguments):
    lines, intervals = slow_run(tmp_path, arguments, "forward", "all", 0.1)
    assert lines == []
    assert all(record["other_ranks_median_own_seconds"] > 2 * 14 * 0.1 for record in intervals)


@beyond_make_test
def test_a_rank_whose_process_is_stopped_again_and_again(tmp_path, arguments):
    """As on a machine that swaps, or that somebody else uses: the kernel stops rank 0 three quarters of the time."""
    run = tmp_path / "run"
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = ["tests/distributed/slow.py", "forward", "all", "0.02", *arguments(run, *STEPS)]
    ranks = [
        warm.Program(tmp_path / str(rank), command, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    victim = ranks[0].process
    try:
        while not (run / "metrics.jsonl").exists() and victim.exitcode is None:
            time.sleep(0.05)
        while victim.exitcode is None and len((run / "metrics.jsonl").read_text().splitlines()) < 4:
            os.kill(victim.pid, signal.SIGSTOP)
            time.sleep(0.6)
            os.kill(victim.pid, signal.SIGCONT)
            time.sleep(0.2)
        finished = [rank.wait() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [ended.returncode for ended in finished] == [0, 0], finished[1].stderr
    lines = LINE.findall(finished[0].stdout)
    assert lines and {int(line[0]) for line in lines} == {0}, finished[0].stdout
