"""Who am I among the processes of this job, as the launcher's environment variables say."""

import os
from dataclasses import dataclass

from abba.errors import RankLostError

# Launcher -> its variables for rank, ranks in all, rank on this node, ranks on this node.
LAUNCHERS = {
    "deepspeed or torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    "mpirun": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
}


@dataclass(frozen=True)
class Ranks:
    """This process among all: its rank, the number of ranks, its rank on this node; who started it, for which job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"
    job: str | None = None  # SLURM's job id, which a requeued job keeps

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """The launcher's word, without starting anything. A process started plainly is one rank alone.

    Raises:
        RankLostError: a launcher's variables are incomplete or contradict each other.
    """
    job = os.environ.get("SLURM_JOB_ID")
    for launcher, names in LAUNCHERS.items():
        rank, size = (os.environ.get(name) for name in names[:2])
        if launcher == "srun" and "SLURM_STEP_ID" not in os.environ:
            continue  # a batch script or a login shell: no task of its own
        if rank is None and size is None:
            continue
        try:
            local_rank = int(os.environ.get(names[2], 0))
            local_size = int(os.environ.get(names[3], size or 1))
            ranks = Ranks(int(rank), int(size), local_rank, min(local_size, int(size)), launcher, job)
        except (TypeError, ValueError):
            raise RankLostError(f"{names[0]}={rank!r} and {names[1]}={size!r}: both must be whole numbers") from None
        if not 0 <= ranks.rank < ranks.world_size:
            raise RankLostError(f"{names[0]}={rank} is not below {names[1]}={size}; check the launcher's arguments")
        return ranks
    return Ranks(job=job)
