"""Joining the other ranks."""

import os
import socket
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from deepspeed.accelerator import get_accelerator

from abba.errors import RankLostError, first_line
from abba.sharded.ranks import Ranks


def start_process_group(ranks: Ranks, timeout_seconds: int = 1800) -> torch.device:
    """Join the other ranks (nccl on GPUs, gloo on CPUs) and return this rank's device.

    Args:
        timeout_seconds: how long a collective waits for a rank that hangs.

    Raises:
        RankLostError: the group has another size than the launcher promised, its address is unknown, or this node of
            several has lost its GPUs.
    """
    if ranks.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", _free_port())
    elif ranks.launcher == "mpirun" and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        host, port = _meeting_point(ranks)
        os.environ.setdefault("MASTER_ADDR", host)
        os.environ.setdefault("MASTER_PORT", port)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise RankLostError(f"{name} is not set for {ranks.world_size} ranks under {ranks.launcher}; export it")
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        _refuse_lost_gpus(ranks)
    index = ranks.local_rank if on_cpu else _device_index(ranks.local_rank, accelerator.device_count())
    # DeepSpeed takes LOCAL_RANK for the number of the GPU, and with mpirun wants its variable to agree.
    variables = {"RANK": ranks.rank, "WORLD_SIZE": ranks.world_size, "LOCAL_RANK": index}
    variables |= {name: index for name in ("OMPI_COMM_WORLD_LOCAL_RANK",) if name in os.environ}
    os.environ.update({name: str(value) for name, value in variables.items()})
    if on_cpu:
        # Its shared-memory collective is compiled with g++ at the first use, and gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world_size))
    else:
        # Before the first allocation: micro-batches differ in length, and blocks that cannot grow leave gaps.
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        accelerator.set_device(index)
    backend = "gloo" if on_cpu else accelerator.communication_backend_name()
    # DeepSpeed makes further groups with torch's defaults: 10 minutes on GPUs, whatever the run has asked for.
    timeout = c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timedelta(seconds=timeout_seconds)
    try:
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    except RuntimeError as error:
        raise RankLostError(_not_met(ranks.rank, error)) from None
    if dist.get_world_size() != ranks.world_size or dist.get_rank() != ranks.rank:
        raise RankLostError(
            f"joined as rank {dist.get_rank()} of {dist.get_world_size()} where {ranks.launcher} promised "
            f"{ranks.rank} of {ranks.world_size}; is the MPI that started us the one we were built for?"
        )
    if on_cpu:
        return torch.device("cpu")
    return torch.device(accelerator.device_name(index))


def _refuse_lost_gpus(ranks: Ranks) -> None:
    """A node whose driver is broken would wait with gloo for others that wait with nccl."""
    several_nodes = ranks.local_world_size < ranks.world_size
    if several_nodes and torch.version.cuda is not None and "DS_ACCELERATOR" not in os.environ:
        raise RankLostError(
            f"rank {ranks.rank} sees no GPU on {socket.gethostname()}, one of several nodes, with a torch for CUDA "
            f"{torch.version.cuda}; see nvidia-smi there, or set DS_ACCELERATOR=cpu on all nodes to train without GPUs"
        )


def _not_met(rank: int, error: RuntimeError) -> str:
    who = f"rank {rank} on {socket.gethostname()} cannot meet the others at "
    who += f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: "
    if isinstance(error, dist.DistBackendError):  # nccl's: what is wrong stands on its later lines
        said = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
        return f"{who}{said}; NCCL_DEBUG=INFO says more, NCCL_SOCKET_IFNAME names the network interface"
    return f"{who}{first_line(error)}; if another job holds the port, choose one with --master_port"


def _device_index(local_rank: int, visible: int) -> int:
    """Which of the visible GPUs is this rank's: the only one, where the launcher shows each rank its own."""
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise RankLostError(
            f"rank {local_rank} of this node has no GPU: {visible} are visible; start as many ranks as there are GPUs"
        )
    return local_rank


def _meeting_point(ranks: Ranks) -> tuple[str, str]:
    """(host, port) that rank 0 chooses and sends through MPI: mpirun gives ranks their numbers, but no address.

    MPI ends here again: to mpirun the ranks are plain processes, whose signals and exit codes it passes on.
    """
    import mpi4py

    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    way_out = "install the libmpi of this mpirun (Debian: libopenmpi-dev), or export MASTER_ADDR and MASTER_PORT"
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RankLostError(f"mpi4py finds no MPI: {first_line(error)}; {way_out}") from None
    MPI.Init()
    world = MPI.COMM_WORLD
    seen = (world.Get_rank(), world.Get_size())
    if seen == (ranks.rank, ranks.world_size):
        host = "127.0.0.1" if ranks.local_world_size == ranks.world_size else socket.gethostname()
        address = bytearray(f"{host} {_free_port()}".encode().ljust(300))
        world.Bcast(address, root=0)
        MPI.Finalize()
        host, port = bytes(address).decode().split()
        return host, port
    library = MPI.Get_library_version().split(",")[0]
    MPI.Finalize()
    raise RankLostError(
        f"mpirun promised rank {ranks.rank} of {ranks.world_size}, but mpi4py's {library} sees rank {seen[0]} of "
        f"{seen[1]}; {way_out}"
    )


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])
