"""A job on a cluster: what it needs, whether it fits, and the nearest settings that do."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

from abba.errors import RecipeError
from abba.planning.job import Cluster, Job
from abba.planning.memory import GIB, disk_parts, gpu_parts, host_parts
from abba.planning.speed import Times, Traffic, flop, times, traffic
from abba.sharded.ranks import Ranks, refuse_hierarchy

MOST_GPUS = 1024  # that are suggested
MOST_SUGGESTIONS = 3


@dataclass(frozen=True)
class Plan:
    """What a job needs on a cluster.

    Raises:
        RecipeError: the GPUs do not share the global batch, or hpz does not suit them.
    """

    job: Job
    cluster: Cluster

    def __post_init__(self) -> None:
        _ = self.job.accumulation  # raises
        refuse_hierarchy(
            self.job.sharding.hpz, Ranks(world_size=self.cluster.gpus, local_world_size=self.cluster.gpus_per_node)
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
    def group(self) -> int:
        """GPUs that gather the base together."""
        return self.job.sharding.hpz if self.job.sharding.hpz > 1 else self.job.gpus

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


def plan(job: Job, cluster: Cluster) -> Plan:
    """The plan of `job` on all GPUs of the cluster."""
    return Plan(replace(job, gpus=cluster.gpus), cluster)


def nearest(wanted: Plan) -> list[tuple[str, Plan]]:
    """(what to change, the plan then) of settings near `wanted` that fit: one change each, or else several together."""
    job, fitting = wanted.job, partial(_fitting, cluster=wanted.cluster)
    found = [(_micro_batch(p.job), p) for p in map(fitting, smaller_micro_batches(job)) if p][:1]
    single: dict[str, tuple[str, Plan]] = {}  # of each key the least change
    for text, changed in _cheaper_settings(job):
        if _key(text) not in single and (p := fitting(changed)):
            single[_key(text)] = (text, p)
    found += single.values()
    if not found:
        texts: dict[str, str] = {}
        for text, change in _cumulative(job):
            texts[_key(text)] = text
            job = change
            if p := fitting(job):
                found.append((" ".join(texts.values()), p))
                break
    return [*found[: MOST_SUGGESTIONS - 1], *_more_gpus(wanted)][:MOST_SUGGESTIONS]


def largest_micro_batch(job: Job, cluster: Cluster) -> Plan | None:
    """With as many rows in a micro-batch as fit, offloading the base if it must; None where one row does not."""
    whole = replace(job, gpus=cluster.gpus, micro_batch=job.global_batch // cluster.gpus + 1)
    for offload in (False, True):
        for smaller in smaller_micro_batches(replace(whole, sharding=replace(job.sharding, offload=offload))):
            if found := _fitting(smaller, cluster):
                return found
    return None


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


def _key(text: str) -> str:
    return text.partition("=")[0]


def _micro_batch(job: Job) -> str:
    return f"train.per_device_train_batch_size={job.micro_batch}"


def _cheaper_settings(job: Job) -> Iterator[tuple[str, Job]]:
    zero = "deepspeed.zero_optimization"
    if job.eval_batch > 1:
        yield "train.per_device_eval_batch_size=1", replace(job, eval_batch=1)
    modes = {"none": ("selective", "reentrant"), "selective": ("reentrant",)}  # those that keep less
    for mode in modes.get(job.checkpointing, ()):
        yield f"train.gradient_checkpointing={mode}", replace(job, checkpointing=mode)
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
        yield _micro_batch(job), job
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
                    text += f" {_micro_batch(job)}"
                yield text, found
                return
