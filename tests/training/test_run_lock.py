"""The lock on a run directory: one holder, dead ones replaced, sleeping ones waited for."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from abba.errors import CheckpointError, RankLostError
from abba.training import run_lock
from abba.training.processes import launchers_above, machine, process_started
from abba.training.run_lock import RunLock


def silent(line):
    pass


def hold(path, **changes):
    """A lock as another process would leave it."""
    holder = {"token": "x", "job": None, "host": "node9", "machine": "another", "pid": 1, "started": 1}
    path.write_text(json.dumps({**holder, **changes}))


def test_it_is_let_go_at_the_end_and_after_an_error(tmp_path):
    path = tmp_path / "lock.json"
    with RunLock(path, None, silent) as lock:
        lock.confirm()
        assert json.loads(path.read_text())["pid"] == os.getpid()
    with pytest.raises(ZeroDivisionError), RunLock(path, None, silent):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_living_process_of_this_machine_is_refused_even_with_the_same_job(tmp_path):
    with (
        RunLock(tmp_path / "lock.json", "7", silent),
        pytest.raises(CheckpointError, match=r"another run \(job 7 on .*\) is alive in it"),
        RunLock(tmp_path / "lock.json", "7", silent),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_dead_process_and_its_namesake_of_this_machine_are_replaced(tmp_path):
    for pid, started in ((4_000_000, 5), (os.getpid(), 5)):
        said = []
        hold(tmp_path / "lock.json", machine=machine(), pid=pid, started=started)
        with RunLock(tmp_path / "lock.json", None, said.append) as lock:
            lock.confirm()
        assert len(said) == 1 and f"its process {pid} is gone" in said[0]


def test_another_machine_is_watched_for_a_sign_of_life(tmp_path, monkeypatch):
    path, said, stop = tmp_path / "lock.json", [], threading.Event()
    hold(path)

    def beat():
        while not stop.wait(0.3):
            os.utime(path)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(CheckpointError, match="is alive in it"), RunLock(path, None, said.append):
            pass
    finally:
        stop.set()
        beating.join()
    assert json.loads(path.read_text())["token"] == "x"
    monkeypatch.setattr(run_lock, "DEAD_AFTER_SECONDS", 2)
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.5)
    started = time.monotonic()
    with RunLock(path, None, said.append):
        assert 1 < time.monotonic() - started < 60
    assert any("its last sign of life is" in line for line in said)


def test_of_many_that_take_over_at_once_one_has_it(tmp_path):
    hold(tmp_path / "lock.json", machine=machine(), pid=4_000_000)
    holders, refused, done = [], [], threading.Barrier(8)

    def take():
        try:
            with RunLock(tmp_path / "lock.json", None, silent) as lock:
                holders.append(lock.token)
                done.wait()
        except CheckpointError:
            refused.append(1)
            done.wait()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(holders) == 1 and len(refused) == 7


def test_the_heartbeat_keeps_it_and_a_loss_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.1)
    path = tmp_path / "lock.json"
    with RunLock(path, None, silent) as lock:
        os.utime(path, (1, 1))
        time.sleep(0.5)
        assert time.time() - path.stat().st_mtime < 5
        hold(path)
        with pytest.raises(RankLostError, match="another run has taken over"):
            lock.confirm()
    assert json.loads(path.read_text())["host"] == "node9", "another's lock stays"


def test_processes_are_told_apart():
    assert process_started(os.getpid()) == process_started(os.getpid()) is not None
    assert process_started(4_000_000) is None
    child = os.fork()
    if child == 0:
        os._exit(0)
    while Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert process_started(child) is None, "a zombie is dead"
    os.waitpid(child, 0)
    assert launchers_above() == {}
