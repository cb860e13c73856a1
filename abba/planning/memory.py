"""Bytes per GPU by part, and per node in host memory and on disk.

The first group (base to reduce bucket) is what ZeRO-3 allocates, and exact. Activations and logits follow what autograd
saves for each operation of the model's code; the margin is an assumption.
"""

from abba.planning.job import Job

GIB = 2**30
FP32 = 4
# Assumed: CUDA context, NCCL's buffers and cuBLAS's workspace; then fragments of the caching allocator.
CONTEXT_BYTES, FRAGMENTS = int(1.25 * GIB), 0.05
HOST_BYTES_PER_RANK = 5 * GIB  # assumed: the process with its libraries
DOWNLOAD_ELEMENT_BYTES = 2  # bases are published in bf16
MASTER_AND_MOMENTS = 3 * FP32


def gpu_parts(job: Job) -> dict[str, int]:
    """Bytes on the fullest GPU at the fullest moment of a training step, by part."""
    parts = {**allocated_parts(job), "gathered layers": gathered_bytes(job)}
    parts["activations"] = activation_bytes(job)
    parts["logits and loss"] = logit_bytes(job)
    in_a_step = sum(parts[name] for name in ("gathered layers", "activations", "logits and loss"))
    if (start := start_bytes(job) - in_a_step) > 0:
        parts["start, beyond a step"] = start
    parts["context and fragments"] = CONTEXT_BYTES + int(FRAGMENTS * sum(parts.values()))
    return parts


def allocated_parts(job: Job) -> dict[str, int]:
    """What is allocated from the first step to the last."""
    zero, element = job.sharding, job.element_bytes
    replicated = [p for p in (*job.base, *job.factors) if p.replicated]
    trained = job.shard(job.factors)
    moments_only = element == FP32  # an fp32 partition is its own master
    return {
        "base shard": 0 if zero.offload else job.shard(job.base) * element,
        "hpz second copy": 0 if zero.offload else second_copy_elements(job) * element,
        "factors and norms": (sum(p.numel for p in replicated) if job.gpus > 1 else 0) * element + trained * element,
        "gradients": trained * FP32,
        "masters and moments": trained * (MASTER_AND_MOMENTS - (FP32 if moments_only else 0)),
        "reduce bucket": zero.reduce_bucket * FP32,
    }


def second_copy_elements(job: Job) -> int:
    """A rank's part of the copy that `hpz` ranks share, of what is padded for all ranks."""
    if job.sharding.hpz == 1:
        return 0
    return sum(job.gathered(p.numel) // job.sharding.hpz for p in job.base)


def gathered_bytes(job: Job) -> int:
    """Weights gathered at once.

    Prefetching goes on until max_live elements are there, and the last one passes it by a bucket, which holds at least
    one weight. Recomputation gathers a whole layer beyond that limit, and keeps it until the layer's last module has
    done its backward.
    """
    if job.gpus == 1 and not job.sharding.offload:
        return 0
    zero, sizes = job.sharding, [p.numel for p in job.base if not p.replicated]
    ahead = zero.max_live + max(sizes) if zero.prefetch and zero.max_live else 0
    layer = job.architecture.layer_matrices if job.checkpointing != "none" else 0
    live = min(sum(sizes), max(ahead + layer, max(sizes)))
    copied = min(zero.prefetch, live)  # several weights are gathered as one and then copied apart
    return (live + copied) * job.element_bytes


def activation_bytes(job: Job) -> int:
    """What autograd keeps from forward for backward, at most at once, and backward's own temporaries."""
    model, element, tokens = job.architecture, job.element_bytes, job.micro_tokens
    layer = layer_activation_bytes(job)
    boundaries = model.layers * model.hidden * element * tokens
    kept = layer * model.layers if job.checkpointing == "none" else boundaries + layer
    rank = job.adapter.r1 * job.adapter.r2
    wide = max((out + into for out, into in job.targets.values()), default=0)
    # Gradients of the MLP's three wide tensors, of its input and of the residual; Khatri-Rao factors and gradients.
    backward = tokens * (3 * model.mlp * element + 2 * model.hidden * (element + FP32)) + 2 * rank * wide * element
    return kept + backward


def layer_activation_bytes(job: Job) -> int:
    """What autograd saves in the forward pass of one layer."""
    model, element = job.architecture, job.element_bytes
    rank = job.adapter.r1 * job.adapter.r2
    query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
    adapted = -(-len(job.targets) // model.layers)
    per_token = model.norms * model.hidden * FP32  # a norm works in fp32
    per_token += 2 * model.hidden * element  # the inputs of attention and MLP
    per_token += adapted * rank * element  # x A_kr of every adapted linear
    per_token += 4 * query * element + 2 * key * element  # q, k and v for all heads, the output; k and v before
    per_token += 4 * model.mlp * element  # gate, its activation, up, their product
    if job.attention == "eager" or (job.attention == "auto" and model.attention_cap):
        # Scores, if capped also their tanh, and probabilities in fp32 and rounded.
        per_token += model.heads * job.tokens * (element * (2 + model.attention_cap) + FP32)
    else:
        per_token += model.heads * FP32  # log-sum-exp of each row of scores
    return per_token * job.micro_tokens


def logit_bytes(job: Job) -> int:
    """Logits, and in fp32 their log-softmax, its gradient and theirs; every token counted as supervised."""
    per_logit = job.element_bytes * (1 + 2 * job.architecture.logit_cap) + 3 * FP32
    return job.micro_tokens * job.architecture.vocab * per_logit


def start_bytes(job: Job) -> int:
    """Before the first step: every factor in fp32 and in the model's dtype, and two weights, one also in fp32."""
    largest = max((out * into for out, into in job.targets.values()), default=0)
    return job.trainable_parameters * (FP32 + job.element_bytes) + largest * (2 * job.element_bytes + FP32)


def host_parts(job: Job, gpus_per_node: int) -> dict[str, int]:
    """Host memory of a node."""
    zero, on_node = job.sharding, min(gpus_per_node, job.gpus)
    shard = job.shard(job.base) + second_copy_elements(job)
    return {
        "processes": on_node * HOST_BYTES_PER_RANK,
        "base shards": on_node * shard * job.element_bytes if zero.offload else 0,
        "a checkpoint's slices": on_node * job.shard(job.factors) * MASTER_AND_MOMENTS,
    }


def disk_parts(job: Job) -> dict[str, int]:
    """Disk: the base as downloaded, and what a run leaves. One checkpoint more than is kept exists during a save."""
    r1, r2 = job.adapter.r1, job.adapter.r2
    padded = job.trainable_parameters * 2 * max(r1, r2) // (r1 + r2)  # PEFT's LoHa has one rank
    return {
        "base": job.base_parameters * DOWNLOAD_ELEMENT_BYTES,
        "checkpoints": (job.kept_checkpoints + 1) * job.trainable_parameters * MASTER_AND_MOMENTS,
        "adapter": padded * FP32,
    }
