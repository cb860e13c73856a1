"""The formulas of a plan with its numbers put in, and where the assumed ones come from."""

from abba.adapter.config import AdapterConfig
from abba.planning import memory, speed
from abba.planning.memory import GIB
from abba.planning.plan import Plan


def explain(plan: Plan) -> str:
    """A line or two for each part of the plan."""
    return "\n".join([*_counts(plan), "", *_memory(plan), "", *_traffic(plan), "", *_time(plan)])


def _counts(plan: Plan) -> list[str]:
    job = plan.job
    ranks = "(r1 + r2)" if isinstance(job.adapter, AdapterConfig) else "r"
    widths = sum(out + into for out, into in job.targets.values())
    return [
        f"trainable = {ranks} x sum of (out + in) over {len(job.targets)} linears = {job.adapter.width} x {widths:,} "
        f"= {job.trainable_parameters:,}",
        f"partition of a parameter = ceil(elements / {job.gpus}), each padded on its own",
    ]


def _memory(plan: Plan) -> list[str]:
    job, zero = plan.job, plan.job.sharding
    model, element, tokens = job.architecture, job.element_bytes, job.micro_tokens
    base, trained, whole = job.shard(job.base), job.shard(job.factors), job.gathered(*job.replicated)
    again = job.checkpointed_layers
    kept = [f"{model.layers - again} layers x {memory.layer_bytes(job):,} B"] if again < model.layers else []
    kept += [f"{again} layer inputs x {model.hidden} x {element} B x {tokens:,} tokens"] if again else []
    kept += [f"{tokens:,} x {memory.shared_bytes(job):,} B of positions{' and mask' if job.masked else ''}"]
    loss, backward = memory.loss_bytes(job), memory.backward_bytes(job)
    lines = {
        "base shard": "in host memory" if zero.offload else f"{base:,} x {element} B",
        "hpz second copy": f"the base, padded for {job.gpus}, over {zero.hpz} GPUs x {element} B",
        "factors and norms": f"{whole:,} whole and {trained:,} of the partition x {element} B",
        "gradients": f"{trained:,} x {memory.FP32} B",
        "masters and moments": f"{trained:,} x {memory.MASTER_AND_MOMENTS} B",
        "reduce bucket": f"{zero.reduce_bucket:,} x {memory.FP32} B",
        "gathered layers": f"(max_live {zero.max_live:,} + the largest weight + "
        f"{'a layer ' + format(model.layer_matrices, ',') if again or zero.reuse else 'no layer'}, at most the base, "
        f"+ prefetched {zero.prefetch:,} as copied) x {element} B",
        "activations kept": " + ".join(kept),
        "loss or a layer's backward": f"the larger of the loss, logits of {memory.CHUNK} tokens x {model.vocab:,} "
        f"at a time, {loss:,} B, and a layer's backward, {backward:,} B",
        "start, beyond a step": "factors in fp32 and in the model's dtype, two weights, one in fp32",
        "evaluation, beyond a step": f"{job.eval_batch} rows x {job.tokens} tokens through a layer or the loss, "
        f"{memory.evaluation_bytes(job):,} B, less what a step has there",
        "context and fragments": f"assumed {memory.CONTEXT_BYTES / GIB:g} GiB + {memory.FRAGMENTS:.0%} of the rest",
    }
    return [f"{part} = {lines[part]} = {size:,} B" for part, size in plan.gpu.items() if size]


def _traffic(plan: Plan) -> list[str]:
    job, moved, group = plan.job, plan.traffic, plan.group
    again = job.gathered(*job.replicated) * job.element_bytes if job.gpus > 1 else 0
    one = speed.used_elements(job) if job.gpus > 1 else 0
    most = "" if job.sharding.reuse == 0 else "; at most: stage3_max_reuse_distance lets DeepSpeed keep some in between"
    times = "three times, a layer's last one twice" if job.checkpointing == "non_reentrant" else "twice"
    return [
        f"gathered = {one:,} elements a micro-batch (each weight of a layer {times}) x "
        f"{job.element_bytes} B x {job.accumulation} + {again:,} B of factors and norms after the update "
        f"= {moved.gathered:,} B{most}",
        f"reduced = {moved.reduced // job.accumulation:,} B of fp32 gradients a micro-batch x {job.accumulation} "
        f"= {moved.reduced:,} B",
        f"into a GPU = gathered x {group - 1}/{group} of the base, x {job.gpus - 1}/{job.gpus} of the rest "
        f"= {moved.within:,.0f} B",
        f"into a node = the part of them that the other nodes hold = {moved.between:,.0f} B",
    ]


def _time(plan: Plan) -> list[str]:
    job, cluster, times, moved = plan.job, plan.cluster, plan.times, plan.traffic
    work = sum(plan.flop.values())
    parts = ", ".join(f"{part} {value / 1e12:,.1f}" for part, value in plan.flop.items())
    return [
        f"TFLOP a step, {job.checkpointed_layers} of {job.architecture.layers} layers recomputed = {parts}, "
        f"in all {work / 1e12:,.1f}",
        f"computing = {work / job.gpus / 1e12:,.1f} TFLOP / {cluster.gpu_tflops:g} TFLOP/s, likely at "
        f"{speed.LIKELY_SHARE_OF_PEAK:.0%} (NVIDIA NeMo AutoModel, LoRA, 8B, H100) = {times.compute:.3g} s",
        f"network = the longer of {moved.within * 8 / 1e9:,.1f} Gbit / {cluster.intra_node_gbps:g} Gbit/s, likely at "
        f"{speed.LIKELY_SHARE_WITHIN:.0%}, and {moved.between * 8 / 1e9:,.1f} / {cluster.inter_node_gbps:g}, likely at "
        f"{speed.LIKELY_SHARE_BETWEEN:.0%} (both assumed) = {times.network:.3g} s",
        f"host memory = {moved.from_host * 8 / 1e9:,.1f} Gbit / {speed.HOST_GBPS:g} Gbit/s, likely at "
        f"{speed.LIKELY_SHARE_HOST:.0%} (assumed) = {times.host:.3g} s",
        f"at least = the longest of them at full speed = {times.least:.3g} s",
        f"likely = the longest + what it does not hide of the others ({speed.LIKELY_HIDDEN:.0%} while prefetching, "
        f"assumed) = {times.likely:.3g} s",
    ]
