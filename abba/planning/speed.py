"""Traffic of a step, its FLOP, and its time: the least that the hardware allows, and a likely one.

DeepSpeed 0.19 gathers a sharded weight in forward, once more in backward, and with non-reentrant checkpointing a third
time: what recomputation gathers is released with the module whose backward asked for it, before the others' turn.
"""

from dataclasses import dataclass

from abba.planning.job import Cluster, Job

FP32 = 4
# NVIDIA NeMo AutoModel's LoRA on Llama-3 8B, one H100, 4,096 tokens a row: 402 of 989 TFLOP/s.
LIKELY_SHARE_OF_PEAK = 0.40
# Assumed: of the bandwidth that a data sheet names, what collectives reach; of the shorter of computing and
# communicating, what the longer one hides while DeepSpeed prefetches; host to GPU, PCIe 5.0 x16.
LIKELY_SHARE_WITHIN, LIKELY_SHARE_BETWEEN, LIKELY_SHARE_HOST = 0.75, 0.5, 0.75
LIKELY_HIDDEN = 0.5
HOST_GBPS = 512.0


@dataclass(frozen=True)
class Traffic:
    """Bytes of a step, in the steady state after the first few."""

    gathered: int  # output of all gathers, on a GPU
    reduced: int  # input of all reductions, on a GPU
    within: float  # received by a GPU
    between: float  # received by a node from others, at least
    from_host: int  # read by a GPU from host memory


def used_elements(job: Job) -> int:
    """Elements of the base that a GPU gathers for one micro-batch, with their padding; alone it has them, or reads them
    from the host.
    """
    model = job.architecture
    layer = {name: job.gathered(out * into) for name, (out, into, _) in model.linears().items()}
    whole = sum(layer.values())
    # Backward ends at the first adapted layer, but where checkpointing asks for the embedding's gradient.
    first = 0 if job.checkpointed_layers else min(int(name.split(".")[2]) for name in job.targets)
    gathered = whole * (2 * model.layers - first)
    if job.checkpointing == "non_reentrant":
        # The layer's last module starts the recomputation. It is gathered once, if it is the linear.
        once = 0 if model.norms > 2 else layer["mlp.down_proj"]
        gathered += (whole - once) * job.checkpointed_layers
    embedding = job.gathered(model.vocab * model.hidden)
    # Embedding and head, in forward alone: backward asks for neither (enable_checkpointing, FrozenHeadLoss).
    return gathered + 2 * embedding


def traffic(job: Job, cluster: Cluster) -> Traffic:
    """Bytes of one optimizer step."""
    used = used_elements(job) * job.element_bytes * job.accumulation
    base = used if job.gpus > 1 else 0
    again = job.gathered(*job.replicated) * job.element_bytes if job.gpus > 1 else 0  # after the update
    reduced = job.gathered(*(p.numel for p in job.factors)) * FP32 * job.accumulation
    group = job.sharding.hpz if job.sharding.hpz > 1 else job.gpus
    everyone, others = (job.gpus - 1) / job.gpus, (cluster.nodes - 1) / cluster.nodes
    crossing = 1 - 1 / -(-group // cluster.gpus_per_node)
    return Traffic(
        gathered=base + again,
        reduced=reduced,
        within=base * (group - 1) / group + (again + reduced) * everyone,
        between=base * crossing + (again + reduced) * others,
        from_host=used // group if job.sharding.offload else 0,
    )


def flop(job: Job) -> dict[str, int]:
    """FLOP of one optimizer step over all GPUs, by part; what causal attention skips is not counted."""
    model = job.architecture
    again = job.checkpointed_layers  # their forward is computed a second time
    adapted = recomputed = 0
    for name, (out, into) in job.targets.items():
        adapted += out + into
        recomputed += (out + into) * job.is_checkpointed(int(name.split(".")[2]))
    scores = model.heads * model.head_dim * job.tokens // 2
    return {
        "base": (4 * model.layers + 2 * again) * model.layer_matrices * job.step_tokens,
        "adapter": (6 * adapted + 2 * recomputed) * job.rank * job.step_tokens,
        "attention": (12 * model.layers + 4 * again) * scores * job.step_tokens,
        "head": 4 * model.vocab * model.hidden * job.step_tokens,
    }


@dataclass(frozen=True)
class Times:
    """Seconds of a step: each part alone at its likely speed, all at the least, all as is likely."""

    compute: float
    network: float
    host: float
    least: float
    likely: float

    @property
    def limit(self) -> str:
        slowest = max(("compute", self.compute), ("network", self.network), ("host memory", self.host), key=_second)
        return slowest[0]


def times(job: Job, cluster: Cluster) -> Times:
    """Seconds of one optimizer step, in bf16: how fast a GPU is in fp32 the cluster does not say."""
    moved, work = traffic(job, cluster), sum(flop(job).values())
    compute = work / job.gpus / (cluster.gpu_tflops * 1e12)
    within = moved.within * 8 / (cluster.intra_node_gbps * 1e9)
    between = moved.between * 8 / (cluster.inter_node_gbps * 1e9)
    host = moved.from_host * 8 / (HOST_GBPS * 1e9)
    likely_compute = compute / LIKELY_SHARE_OF_PEAK
    likely_network = max(within / LIKELY_SHARE_WITHIN, between / LIKELY_SHARE_BETWEEN)
    likely_host = host / LIKELY_SHARE_HOST
    parts = (likely_compute, likely_network, likely_host)
    hidden = LIKELY_HIDDEN if job.sharding.prefetch and job.sharding.max_live else 0.0
    likely = max(parts) + (1 - hidden) * (sum(parts) - max(parts))
    return Times(likely_compute, likely_network, likely_host, max(compute, within, between, host), likely)


def _second(pair: tuple[str, float]) -> float:
    return pair[1]
