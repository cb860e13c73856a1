"""A plan in words and numbers: the table for people, the dictionary for programs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from abba.planning.job import Cluster, Job
from abba.planning.memory import GIB
from abba.planning.plan import Plan, largest_micro_batch

SECONDS_PER_HOUR = 3600
BF16 = 2  # bytes


def as_dict(plan: Plan, nearest: list[tuple[str, Plan]], rows: int | None, steps: int | None) -> dict[str, Any]:
    """Bytes, elements, FLOP and seconds; what is not known is null."""
    job, times, moved = plan.job, plan.times, plan.traffic
    return {
        "fits": plan.fits,
        "limit": plan.limit,
        "base_parameters": job.base_parameters,
        "trainable_parameters": job.trainable_parameters,
        "gpus": job.gpus,
        "micro_batch": job.micro_batch,
        "accumulation": job.accumulation,
        "gpu_memory_bytes": plan.gpu,
        "gpu_memory_total_bytes": sum(plan.gpu.values()),
        "gpu_memory_available_bytes": int(plan.cluster.gpu_memory_gib * GIB),
        "host_memory_bytes_per_node": plan.host,
        "disk_bytes": plan.disk,
        "traffic_bytes_per_step": {
            "gathered_per_gpu": moved.gathered,
            "reduced_per_gpu": moved.reduced,
            "received_per_gpu": round(moved.within),
            "received_per_node_from_others": round(moved.between),
            "read_from_host_per_gpu": moved.from_host,
        },
        "flop_per_step": plan.flop,
        "step_seconds": {"least": times.least, "likely": times.likely},
        "tokens_per_second": {"most": job.step_tokens / times.least, "likely": job.step_tokens / times.likely},
        "steps": steps,
        "rows": rows,
        "hours": steps * times.likely / SECONDS_PER_HOUR if steps else None,
        "nearest_that_fit": [{"change": text, "gpu_memory_gib": other.gib} for text, other in nearest],
    }


def table(plan: Plan, name: str, rows: int | None, steps: int | None) -> str:
    """The plan for people."""
    job, cluster, times, moved = plan.job, plan.cluster, plan.times, plan.traffic
    gpus = f"{job.gpus} GPU{'s' * (job.gpus > 1)} ({cluster.nodes} x {cluster.gpus_per_node})"
    share = job.trainable_parameters / job.base_parameters
    slower = "; as if in bf16, fp32 takes longer" if job.element_bytes > BF16 else ""
    lines = [
        f"{name}: {job.base_parameters:,} parameters, {job.trainable_parameters:,} train ({share:.2%})",
        f"{gpus}, global batch {job.global_batch} = {job.gpus} x {job.micro_batch} rows x {job.accumulation}, "
        f"{job.tokens} tokens a row, checkpointing {job.checkpointing}",
        "",
        "memory of a GPU, GiB",
        *(_line(part, size / GIB, "{:10.2f}") for part, size in plan.gpu.items() if size),
        _line("total", plan.gib, "{:10.2f}")
        + f"   {'fits' if plan.fits else 'does not fit'} {cluster.gpu_memory_gib:g}",
        "",
        "memory of a node, GiB",
        *(_line(part, size / GIB, "{:10.2f}") for part, size in plan.host.items() if size),
        "disk, GiB",
        *(_line(part, size / GIB, "{:10.2f}") for part, size in plan.disk.items()),
        "",
        "a step",
        _line("gathered by a GPU, GB", moved.gathered / 1e9, "{:10.2f}"),
        _line("reduced by a GPU, GB", moved.reduced / 1e9, "{:10.2f}"),
        _line("into a GPU, GB", moved.within / 1e9, "{:10.2f}"),
        _line("into a node from others, GB", moved.between / 1e9, "{:10.2f}"),
        _line("computed by a GPU, TFLOP", sum(plan.flop.values()) / job.gpus / 1e12, "{:10.2f}"),
        _line("seconds, at least", times.least, "{:10.3g}"),
        _line("seconds, likely", times.likely, "{:10.3g}") + f"   limited by {plan.limit}{slower}",
        _line("tokens/s, likely", job.step_tokens / times.likely, "{:10,.0f}"),
        "",
        *duration(plan, rows, steps),
    ]
    return "\n".join(lines)


def duration(plan: Plan, rows: int | None, steps: int | None) -> list[str]:
    """How long the run and an epoch take, or why that is not known."""
    step = plan.times.likely / SECONDS_PER_HOUR
    lines = []
    if steps:
        lines.append(f"{steps:,} steps: {_hours(steps * step)}")
    if rows:
        lines.append(f"an epoch of {rows:,} rows: {_hours(rows / plan.job.global_batch * step)}")
    if not steps and not rows:
        per_rows = _hours(10_000 / plan.job.global_batch * step)
        lines.append(f"rows are not counted; give --rows. 1,000 steps: {_hours(1000 * step)}, 10,000 rows: {per_rows}")
    return lines


def refusal(plan: Plan, nearest: list[tuple[str, Plan]]) -> str:
    """One line: the need, the limit, the way out."""
    biggest = sorted(plan.gpu.items(), key=lambda part: -part[1])[:3]
    most = ", ".join(f"{part} {size / GIB:.1f}" for part, size in biggest)
    line = f"needs {plan.gib:.1f} GiB of {plan.cluster.gpu_memory_gib:g} on {_gpus(plan.job.gpus)} ({most})"
    if not nearest:
        return f"{line}; no setting or number of GPUs near this one fits"
    return f"{line}; fits with " + ", or with ".join(f"{text} ({other.gib:.1f} GiB)" for text, other in nearest)


def grid(job: Job, cluster: Cluster, gpus: Sequence[int], memories: Sequence[int]) -> str:
    """A Markdown table: for each number and size of GPUs the largest micro-batch that fits, and what it takes. A number
    that the nodes' GPUs do not divide is rounded up to whole nodes.

    zero_hpz_partition_size, where the job has one, is that of the nodes, and left out on one node.
    """
    lines = [
        "| GPUs | " + " | ".join(f"{memory} GB" for memory in memories) + " |",
        "|---|" + "---|" * len(memories),
    ]
    for count in gpus:
        per_node = min(count, cluster.gpus_per_node)
        sized = replace(cluster, nodes=-(-count // per_node), gpus_per_node=per_node)
        hpz = per_node if job.sharding.hpz > 1 and sized.nodes > 1 else 1
        of_size = replace(job, sharding=replace(job.sharding, hpz=hpz))
        plans = [largest_micro_batch(of_size, replace(sized, gpu_memory_gib=float(memory))) for memory in memories]
        lines.append(f"| {sized.gpus} | " + " | ".join(map(_cell, plans)) + " |")
    if job.sharding.hpz > 1:
        lines.append("\non several nodes with the zero_hpz_partition_size of their GPUs, on one without")
    return "\n".join(lines)


def _cell(plan: Plan | None) -> str:
    if plan is None:
        return "no"
    rows = f"{plan.job.micro_batch} row{'s' * (plan.job.micro_batch > 1)}"
    return f"{rows}, {plan.gib:.1f}" + (", base in host memory" if plan.job.sharding.offload else "")


def _gpus(count: int) -> str:
    return f"each of {count} GPUs" if count > 1 else "the one GPU"


def _line(what: str, value: float, form: str) -> str:
    return f"  {what:<30}{form.format(value)}"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:.1f} hours"
