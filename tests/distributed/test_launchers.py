"""Who a process is, as each launcher's variables say it."""

import os
import socket
from types import SimpleNamespace

import pytest
import torch

from abba.errors import RankLostError
from abba.sharded import process_group
from abba.sharded.process_group import _device_index
from abba.sharded.ranks import Ranks, ranks_from_environment
from tests import warm

TORCHRUN = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
DEEPSPEED = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "8"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "9", "OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
MPIRUN |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "PMIX_RANK": "9"}
SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_NODEID": "1",
}
DAEMON = {
    **SRUN,
    "SLURM_PROCID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_LOCALID": "0",
}


BY_NTASKS = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NUM_TASKS"}
# A shell that salloc opens, SLURM's interactive step: one task, whatever the job was given.
SHELL = {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}
SHELL |= {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_JOB_ID": "7"}


@pytest.fixture
def under(monkeypatch):
    """under(variables) -> what a process with them is"""

    def process(variables):
        for name in list(os.environ):
            if name.startswith(warm.LAUNCHERS):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return ranks_from_environment()

    return process


@pytest.mark.parametrize(
    "variables, launcher",
    [
        (TORCHRUN, "deepspeed or torchrun"),
        (DEEPSPEED, "deepspeed or torchrun"),
        (MPIRUN, "mpirun"),
        ({**DAEMON, **MPIRUN}, "mpirun"),  # in a SLURM job, where srun starts mpirun's daemons
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, "srun"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4,8,4"}, "srun"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "PMIX_RANK": "9", "PMI_SIZE": "16"}, "srun"),
        ({**SRUN, "SLURM_NTASKS_PER_NODE": "8"}, "srun"),
        ({**SRUN, "SLURM_NTASKS_PER_NODE": "8", "SLURM_NTASKS": "32"}, "srun"),  # the job's: srun --preserve-env
        ({**BY_NTASKS, "SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8"}, "srun"),
    ],
)
def test_the_second_rank_of_the_second_node_of_eight(under, variables, launcher):
    assert under(variables) == Ranks(9, 16, 1, 8, launcher)


def test_without_a_launcher_a_process_is_alone(under):
    assert under({}) == Ranks()
    assert under({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "7"}) == Ranks(job="7")  # a batch script


@pytest.mark.parametrize("of_job", [{}, {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "8"}])
def test_a_shell_within_a_job_is_alone(under, of_job):
    assert under({**SHELL, **of_job}) == Ranks(launcher="srun", job="7")


@pytest.mark.parametrize(
    "variables, said",
    [
        ({**TORCHRUN, "RANK": "16"}, "RANK=16 is not below WORLD_SIZE=16"),
        ({**TORCHRUN, "RANK": "x"}, "RANK='x' and WORLD_SIZE='16'"),
        ({"RANK": "0"}, "RANK='0' and WORLD_SIZE=None"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "8,x"}, "both must be whole numbers"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "PMI_SIZE=2, but no rank that we know"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK=1, but no rank that we know"),
    ],
)
def test_what_makes_no_rank_is_refused(under, variables, said):
    with pytest.raises(RankLostError, match="^rank lost: ") as error:
        under(variables)
    assert said in str(error.value)


@pytest.mark.parametrize(("local_rank", "visible", "index"), [(0, 8, 0), (7, 8, 7), (3, 1, 0)])
def test_each_rank_has_a_gpu_its_own_or_the_only_one_it_is_shown(local_rank, visible, index):
    assert _device_index(local_rank, visible) == index


def test_deepspeed_is_told_the_number_of_the_gpu_and_not_of_the_rank(monkeypatch):
    """It makes its device of LOCAL_RANK. There is no GPU here: what joins, and what counts GPUs, are stand-ins."""
    gpus = SimpleNamespace(
        device_name=lambda index=None: "cuda" if index is None else f"cuda:{index}",
        device_count=lambda: 1,
        set_device=lambda index: None,
        communication_backend_name=lambda: "nccl",
    )
    monkeypatch.setattr(process_group, "get_accelerator", lambda: gpus)
    monkeypatch.setattr(process_group.deepspeed, "init_distributed", lambda *_, **__: None)
    monkeypatch.setattr(process_group, "dist", SimpleNamespace(get_world_size=lambda: 8, get_rank=lambda: 3))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")  # to be put back
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    device = process_group.start_process_group(Ranks(3, 8, 3, 8, "mpirun"))
    assert (device.type, device.index) == ("cuda", 0)
    assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "0" and os.environ["RANK"] == "3"


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(RankLostError, match="rank 4 of this node has no GPU: 4 are visible; start as many ranks"):
        _device_index(4, 4)


def test_a_node_without_gpus_among_several_is_refused_before_it_waits_with_gloo(monkeypatch):
    monkeypatch.setattr(process_group.torch.version, "cuda", "12.8")
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)
    process_group._refuse_lost_gpus(Ranks(9, 16, 1, 8, "srun"))
    monkeypatch.delenv("DS_ACCELERATOR")
    with pytest.raises(
        RankLostError, match=r"rank 9 sees no GPU on .*, one of several nodes, with a torch for CUDA 12.8"
    ):
        process_group.start_process_group(Ranks(9, 16, 1, 8, "srun"))
    process_group._refuse_lost_gpus(Ranks(1, 8, 1, 8, "torchrun"))  # a machine alone may train without


def test_what_nccl_says_is_told_whole(monkeypatch):
    def fails(*_, **__):
        raise torch.distributed.DistBackendError("NCCL error in: a.cpp:1\nLast error:\nCall to ibv_reg_mr failed\n")

    monkeypatch.setattr(process_group.deepspeed, "init_distributed", fails)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(RankLostError) as error:
        process_group.start_process_group(Ranks(1, 2, 1, 2, "torchrun"))
    assert "NCCL error in: a.cpp:1; Last error:; Call to ibv_reg_mr failed; NCCL_DEBUG=INFO" in str(error.value)
    assert "--master_port" not in str(error.value) and socket.gethostname() in str(error.value)


def test_every_group_has_the_timeout_of_the_run(monkeypatch, tmp_path):
    def joined(backend, *, timeout, **_):
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)

    monkeypatch.setattr(process_group.deepspeed, "init_distributed", joined)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(process_group.c10d, name, None)  # to be put back
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    process_group.start_process_group(Ranks(), 4321)
    try:
        for group in (torch.distributed.new_group([0]), torch.distributed.group.WORLD):
            assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 4321
        assert process_group.c10d.default_pg_nccl_timeout.total_seconds() == 4321
    finally:
        torch.distributed.destroy_process_group()
