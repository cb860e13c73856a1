"""Under Open MPI: ranks meet without an address, exit codes and signals come through, strangers are refused."""

import os
import shutil
import signal
import socket
import subprocess
import time

import pytest

from abba.training.processes import process_started
from tests import warm
from tests.distributed.ranks import environment, read_metrics
from tests.faults.test_launchers import descendants

pytestmark = pytest.mark.timeout(900)
without_mpirun = pytest.mark.skipif(
    shutil.which("mpirun.openmpi") is None, reason="Open MPI's mpirun is not installed; make test-slurm installs it"
)
# Tests may run as root, on fewer cores than ranks.
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
MPIRUN = ["mpirun.openmpi", "-np", "2", "--oversubscribe", "--bind-to", "none"]


def train(run, *more):
    fixed = ["data.eval_rows=0", "train.eval_steps=null", "data.max_rows=32", "adapter.layer_range=[0, 1]"]
    fixed += ["train.global_batch_size=4", "train.per_device_train_batch_size=2", f"output_dir={run}"]
    return ["launch/train.py", "--recipe", "quickstart", *fixed, *more]


@pytest.fixture
def start():
    """start(command, log file) -> the launcher's process, which does not outlive the test."""
    processes = []

    def started(command, log):
        with log.open("w") as file:
            variables = environment(**AS_ROOT)
            processes.append(subprocess.Popen(command, cwd=warm.ROOT, env=variables, stdout=file, stderr=file))
        return processes[-1]

    yield started
    for process in processes:
        process.terminate()
        process.wait(60)


@pytest.mark.slurm
@without_mpirun
def test_two_ranks_meet_and_end_well(tmp_path, start):
    process = start([*MPIRUN, "python", *train(tmp_path / "run", "train.max_steps=2")], tmp_path / "log")
    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    assert "engine: 2 rank(s)" in (tmp_path / "log").read_text()
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


@pytest.mark.slurm
@without_mpirun
def test_a_signal_saves_and_a_killed_rank_fails_the_job(tmp_path, start):
    command = [*MPIRUN, "python", *train(tmp_path / "run", "train.max_steps=100000")]
    process = start(command, tmp_path / "first")
    wait_for_steps(process, tmp_path, "first", 2)
    process.send_signal(signal.SIGUSR1)  # which mpirun passes on
    assert process.wait(60) == 75, (tmp_path / "first").read_text()
    assert "which is saved; start the same command again" in (tmp_path / "first").read_text()

    done = len(read_metrics(tmp_path / "run"))
    process = start(command, tmp_path / "second")
    below = wait_for_steps(process, tmp_path, "second", done + 2)
    os.kill(next(pid for pid, command in below.items() if is_training(command)), signal.SIGKILL)
    assert process.wait(60) in (128 + signal.SIGKILL, 71), (tmp_path / "second").read_text()
    assert not any(process_started(pid) for pid in below), "processes survive"


@pytest.mark.slurm
@without_mpirun
def test_deepspeeds_runner_starts_mpirun(tmp_path, start):
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    options = "--mca btl_tcp_if_include lo --oversubscribe --bind-to none"
    launcher = ["deepspeed", "--hostfile", str(tmp_path / "hostfile"), "--launcher", "openmpi", "--force_multi"]
    launcher += ["--no_ssh_check", "--master_addr", "127.0.0.1"]  # or it would ask ssh
    launcher += ["--launcher_args", options]
    process = start([*launcher, *train(tmp_path / "run", "train.max_steps=100000")], tmp_path / "log")
    below = wait_for_steps(process, tmp_path, "log", 2)
    os.kill(next(pid for pid, command in below.items() if is_training(command)), signal.SIGKILL)
    code = process.wait(60)
    assert code in (128 + signal.SIGKILL, 71), (tmp_path / "log").read_text()
    assert "engine: 2 rank(s)" in (tmp_path / "log").read_text()


@pytest.mark.slurm
@without_mpirun
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a process another host name")
def test_two_nodes_meet_where_rank_0_is(tmp_path, start):
    """mpirun starts its daemon of the second node through ssh; here, on this machine under another name."""
    ssh = tmp_path / "start-elsewhere"
    ssh.write_text('#!/bin/sh\nhost=$1; shift; exec unshare --uts sh -c "hostname $host; $*"\n')
    ssh.chmod(0o755)
    mpirun = ["mpirun.openmpi", "-np", "4", "--bind-to", "none", "--host", f"{socket.gethostname()}:2,elsewhere:2"]
    mpirun += [
        "--mca",
        "plm_rsh_agent",
        str(ssh),
        "--mca",
        "oob_tcp_if_include",
        "lo",
        "--mca",
        "btl_tcp_if_include",
        "lo",
    ]
    more = ["train.max_steps=2", "train.per_device_train_batch_size=1"]
    more += ["deepspeed.zero_optimization.zero_hpz_partition_size=2"]
    process = start([*mpirun, "python", *train(tmp_path / "run", *more)], tmp_path / "log")
    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    assert "each rank read its 1/4 and 1/2 for its node's copy" in (tmp_path / "log").read_text()
    assert "engine: 4 rank(s)" in (tmp_path / "log").read_text()


@pytest.mark.slurm
@without_mpirun
def test_an_mpi_that_sees_another_world_is_refused(tmp_path):
    """Each process alone, as when mpi4py is bound to another MPI than the mpirun's: here, without any mpirun."""
    promised = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    alone = warm.run(tmp_path / "out", *train(tmp_path / "run", "train.max_steps=2"), **AS_ROOT, **promised)
    assert alone.returncode == 71 and "mpirun promised rank 0 of 2, but mpi4py's Open MPI" in alone.stderr, alone.stderr
    assert "sees rank 0 of 1; install the libmpi of this mpirun" in alone.stderr


@pytest.mark.slurm
@pytest.mark.skipif(shutil.which("mpiexec.hydra") is None, reason="MPICH's mpiexec.hydra is not installed")
def test_another_mpis_launcher_is_refused(tmp_path, start):
    process = start(
        ["mpiexec.hydra", "-n", "2", "python", *train(tmp_path / "run", "train.max_steps=1")], tmp_path / "log"
    )
    assert process.wait(120) == 71, (tmp_path / "log").read_text()
    check_refused((tmp_path / "log").read_text(), tmp_path)


@pytest.mark.parametrize("name", ["PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS"])
def test_a_process_of_an_unknown_launcher_is_refused(tmp_path, name):
    finished = warm.run(tmp_path / "out", *train(tmp_path / "run", "train.max_steps=1"), **{name: "2"})
    assert finished.returncode == 71 and f"{name}=2" in finished.stderr
    check_refused(finished.stderr, tmp_path)


def check_refused(text, tmp_path):
    assert "started by an MPI other than Open MPI" in text and "Traceback" not in text
    assert not (tmp_path / "run").exists()


def is_training(command):
    return "python" in command.split()[0] and "launch/train.py" in command.split()[1:3]


def wait_for_steps(process, tmp_path, log, steps):
    """pid -> command line of what runs below the launcher, once so many steps are done."""
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.time() + 300
    while not (metrics.exists() and metrics.read_text().count("loss") >= steps):
        assert process.poll() is None and time.time() < deadline, (tmp_path / log).read_text()
        time.sleep(0.2)
    return descendants(process.pid)
