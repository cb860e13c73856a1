"""A job on a cluster: what it needs, whether it fits, and the nearest settings that do."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from abba.errors import RecipeError
from abba.planning.job import Cluster, Job
from abba.planning.memory import GIB, disk_parts, gpu_parts, host_parts
from abba.planning.speed import Times, Traffic, flop, times, traffic

MOST_GPUS = 1024  # that are suggested
MOST_SUGGESTIONS = 3


@dataclass(frozen=True)
class Plan:
    """What a job needs on a cluster.

    Raises:
        RecipeError: the GPUs do not share the global batch, or do not form groups of hpz.
    """

    job: Job
    cluster: Cluster

    def __post_init__(self) -> None:
        hpz = self.job.sharding.hpz
        if self.job.accumulation and (hpz > self.job.gpus or self.job.gpus % hpz):
            raise RecipeError(
                f"deepspeed.zero_optimization.zero_hpz_partition_size: {self.job.gpus} GPUs do not form groups of {hpz}"
            )

    @cached_property
    def gpu(self) -> dict[str, int]:
        return gpu_parts(self.job)

    @cached_property
    def host(self) -> dict[str, int]:
        return host_parts(self.job, self.cluster.gpus_per_node)

    @cached_property
    def disk(self) -> dict[str, int]:
        return disk_parts(self.job)

    @cached_property
    def traffic(self) -> Traffic:
        return traffic(self.job, self.cluster)

    @cached_property
    def flop(self) -> dict[str, int]:
        return flop(self.job)

    @cached_property
    def times(self) -> Times:
        return times(self.job, self.cluster)

    @property
    def gib(self) -> float:
        """Of a GPU's memory, at the fullest moment."""
        return sum(self.gpu.values()) / GIB

    @property
    def fits(self) -> bool:
        return self.gib <= self.cluster.gpu_memory_gib

    @property
    def limit(self) -> str:
        """What keeps the job from being faster, or from running."""
        return self.times.limit if self.fits else "GPU memory"


def plan(job: Job, nodes_and_memory: Cluster) -> Plan:
    """The plan of `job`; its GPUs are those of the cluster."""
    return Plan(replace(job, gpus=nodes_and_memory.gpus), nodes_and_memory)


def nearest(wanted: Plan) -> list[tuple[str, Plan]]:
    """(what to change, the plan then) of settings near `wanted` that fit: one change each, or else several together."""
    job, cluster = wanted.job, wanted.cluster
    found = [(text, p) for text, changed in _single_changes(job) if (p := _fitting(changed, cluster))]
    if not found:
        texts = []
        for text, change in _cumulative(job):
            texts.append(text)
            job = change
            if p := _fitting(job, cluster):
                found.append((" ".join(texts), p))
                break
    return [*found[: MOST_SUGGESTIONS - 1], *_more_gpus(wanted)][:MOST_SUGGESTIONS]


def _fitting(job: Job, cluster: Cluster) -> Plan | None:
    try:
        candidate = plan(job, cluster)
    except RecipeError:
        return None
    return candidate if candidate.fits else None


def smaller_micro_batches(job: Job) -> Iterator[Job]:
    """Largest first: those that the global batch is a multiple of."""
    for micro in range(job.micro_batch - 1, 0, -1):
        if job.global_batch % (micro * job.gpus) == 0:
            yield replace(job, micro_batch=micro)


def _single_changes(job: Job) -> Iterator[tuple[str, Job]]:
    for smaller in smaller_micro_batches(job):
        yield f"train.per_device_train_batch_size={smaller.micro_batch}", smaller
    yield from _cheaper_settings(job)


def _cheaper_settings(job: Job) -> Iterator[tuple[str, Job]]:
    zero = "deepspeed.zero_optimization"
    if job.checkpointing == "none":
        yield "train.gradient_checkpointing=non_reentrant", replace(job, checkpointing="non_reentrant")
    if job.sharding.hpz > 1:
        without = replace(job, sharding=replace(job.sharding, hpz=1))
        yield f"{zero}.zero_hpz_partition_size=1", without
    if job.sharding.max_live and job.sharding.prefetch and job.gpus > 1:
        tight = replace(job, sharding=replace(job.sharding, max_live=0, prefetch=0))
        yield f"{zero}.stage3_max_live_parameters=0 {zero}.stage3_prefetch_bucket_size=0", tight
    if not job.sharding.offload:
        yield f"{zero}.offload_param.device=cpu", replace(job, sharding=replace(job.sharding, offload=True))


def _cumulative(job: Job) -> Iterator[tuple[str, Job]]:
    """Each on top of the ones before."""
    if smallest := list(smaller_micro_batches(job)):
        job = smallest[-1]
        yield "train.per_device_train_batch_size=1", job
    while change := next(_cheaper_settings(job), None):
        job = change[1]
        yield change


def _more_gpus(wanted: Plan) -> Iterator[tuple[str, Plan]]:
    """The fewest, first within a node and then in whole nodes, at these settings or at the smallest micro-batch."""
    for job in (wanted.job, replace(wanted.job, micro_batch=1)):
        cluster = wanted.cluster
        while cluster.gpus < min(MOST_GPUS, job.global_batch):
            if cluster.nodes == 1 and cluster.gpus_per_node < 8:
                cluster = replace(cluster, gpus_per_node=cluster.gpus_per_node + 1)
            else:
                cluster = replace(cluster, nodes=cluster.nodes + 1)
            if found := _fitting(job, cluster):
                text = f"--nodes {cluster.nodes} --gpus-per-node {cluster.gpus_per_node}"
                if job is not wanted.job:
                    text += " train.per_device_train_batch_size=1"
                yield text, found
                return
