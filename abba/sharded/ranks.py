"""Who am I among the processes of this job, as the launcher's environment variables say."""

import os
from dataclasses import dataclass
from pathlib import Path

from abba.errors import RankLostError, RecipeError

# Launcher -> its variables for rank, ranks in all, rank on this node, ranks on this node (the first that is set).
LAUNCHERS = {
    "deepspeed or torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"),
    "mpirun": (  # before srun, with which it starts its daemons: their variables are not the ranks'
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "srun": (
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_NTASKS_PER_NODE",
    ),
}
# For want of the step's number. In a shell that salloc or srun opened it may be the job's, or missing.
JOB_TASKS = "SLURM_NTASKS"
# What other MPIs' launchers set. Taken for plain starts, their processes would each train a model of their own.
FOREIGN = ("PMI_SIZE", "PMI_RANK", "PMIX_RANK", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_SIZE")

MOST_SUGGESTED = 1024  # ranks


@dataclass(frozen=True)
class Ranks:
    """This process among all: its rank, the number of ranks, its rank on this node; who started it, for which job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"
    job: str | None = None  # SLURM's job id, which a requeued job keeps
    requeued: int = 0  # times that SLURM has started this job again

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """The launcher's word, without starting anything. A process started plainly is one rank alone.

    Raises:
        RankLostError: a launcher's variables are incomplete or contradict each other, or are of a foreign MPI.
    """
    job, requeued = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    of_job = (job, int(requeued) if requeued.isdecimal() else 0)
    for launcher, names in LAUNCHERS.items():
        rank, size = (os.environ.get(name) for name in names[:2])
        if launcher == "srun":
            if "SLURM_STEP_ID" not in os.environ:
                continue  # a batch script or a login shell: no task of its own
            size = size or os.environ.get(JOB_TASKS)
        if rank is None and size is None:
            continue
        try:
            local_rank = int(os.environ.get(names[2], 0))
            on_node = next((os.environ[name] for name in names[3:] if name in os.environ), size)
            ranks = Ranks(int(rank), int(size), local_rank, min(_of_this_node(on_node), int(size)), launcher, *of_job)
        except (TypeError, ValueError, IndexError):
            raise RankLostError(f"{names[0]}={rank!r} and {names[1]}={size!r}: both must be whole numbers") from None
        if not 0 <= ranks.rank < ranks.world_size:
            raise RankLostError(f"{names[0]}={rank} is not below {names[1]}={size}; check the launcher's arguments")
        return ranks
    for name in FOREIGN:
        if name in os.environ:
            raise RankLostError(
                f"{name}={os.environ[name]}, but no rank that we know: started by an MPI other than Open MPI; "
                "use Open MPI's mpirun, deepspeed, torchrun or srun, or set RANK, WORLD_SIZE and LOCAL_RANK"
            )
    return Ranks(job=job, requeued=of_job[1])


def accumulation_steps(global_batch: int, micro_batch: int, ranks: int, what: str = "ranks") -> int:
    """Micro-batches that each of `ranks` computes in a step. `what`: as the user calls them.

    Raises:
        RecipeError: the global batch cannot be shared out evenly.
    """
    accumulation, rest = divmod(global_batch, micro_batch * ranks)
    if rest or not accumulation:
        smaller = next((size for size in range(micro_batch - 1, 0, -1) if global_batch % (size * ranks) == 0), None)
        first = f"set train.per_device_train_batch_size={smaller}, or " if smaller else ""
        most = min(global_batch // micro_batch, MOST_SUGGESTED)
        fitting = [str(number) for number in range(1, most + 1) if global_batch % (micro_batch * number) == 0]
        raise RecipeError(
            f"train.global_batch_size: {global_batch} cannot be shared by {ranks} {what} in micro-batches of "
            f"{micro_batch}; {first}make it a multiple of {micro_batch * ranks}; with these sizes the number of {what} "
            f"can be {', '.join(fitting)}"
        )
    return accumulation


def refuse_hierarchy(size: int, ranks: Ranks) -> None:
    """A further copy of the base is for the fast links within a node, and DeepSpeed counts ranks without looking.

    Raises:
        RecipeError: `size` is not that of the nodes, or there is one node.
    """
    key, on_node = "deepspeed.zero_optimization.zero_hpz_partition_size", ranks.local_world_size
    if size <= 1:
        return
    if on_node == ranks.world_size:
        raise RecipeError(
            f"{key}: {size}: all {on_node} ranks are on one node, which needs no copy; set it to 1, or take more nodes"
        )
    if ranks.world_size % size:
        raise RecipeError(f"{key}: {size} does not divide the {ranks.world_size} ranks; set it to 1 or {on_node}")
    if size != on_node:
        raise RecipeError(f"{key}: {size} is not the {on_node} ranks of this node; set it to 1 or {on_node}")


def go_alone(ranks: Ranks) -> None:
    """Make this rank a process by itself that sees one GPU, for libraries that read the environment when imported.

    Raises:
        RankLostError: there are more ranks than GPUs on this node.
    """
    if ranks.world_size == 1:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = _nvidia_gpus() or ranks.local_world_size  # of another make they are not counted
    gpus = [str(index) for index in range(count)] if visible is None else visible.split(",")
    if visible is None or len(gpus) > 1:  # a launcher may have given each rank its own already; "" hides them all
        if ranks.local_rank >= len(gpus):
            where = f"{count} GPU{'s' * (count != 1)}" if visible is None else f"CUDA_VISIBLE_DEVICES={visible}"
            raise RankLostError(f"{ranks.local_world_size} ranks on a node with {where}; start one for each GPU")
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[ranks.local_rank]
    for name in {name for names in LAUNCHERS.values() for name in names} | {JOB_TASKS, "MASTER_ADDR", "MASTER_PORT"}:
        os.environ.pop(name, None)


def leave_torchruns_store() -> None:
    """For a library with process groups of its own, which under torchrun would wait for its store at their port."""
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)


def _nvidia_gpus() -> int:
    """Of this node, counted without CUDA."""
    return sum(path.name[len("nvidia") :].isdecimal() for path in Path("/dev").glob("nvidia*"))


def _of_this_node(counts: str) -> int:
    """A number of ranks; or SLURM's 8(x2),4 for two nodes of 8 ranks and one of 4."""
    nodes: list[int] = []
    for part in counts.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        nodes += [int(count)] * int(times or 1)
    return nodes[int(os.environ.get("SLURM_NODEID", 0)) if len(nodes) > 1 else 0]
