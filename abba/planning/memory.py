"""Bytes per GPU by part, and per node in host memory and on disk.

The first group (base to reduce bucket) is what ZeRO-3 allocates, and exact. Activations and loss follow what autograd
saves for each operation of the model's code; the margin is an assumption. Every token counts as supervised.
"""

from abba.adapter.config import AdapterConfig
from abba.planning.job import Job

GIB = 2**30
FP32 = 4
CHUNK = 512  # supervised tokens whose logits are there at once; abba/training/loss.py
# Assumed: CUDA context, NCCL's buffers and cuBLAS's workspace; then fragments of the caching allocator.
CONTEXT_BYTES, FRAGMENTS = int(1.25 * GIB), 0.05
HOST_BYTES_PER_RANK = 5 * GIB  # assumed: the process with its libraries
DOWNLOAD_ELEMENT_BYTES = 2  # bases are published in bf16
MASTER_AND_MOMENTS = 3 * FP32


def gpu_parts(job: Job) -> dict[str, int]:
    """Bytes on the fullest GPU at the fullest moment of a training step, by part."""
    parts = {**allocated_parts(job), "gathered layers": gathered_bytes(job)}
    parts["activations kept"] = kept_bytes(job)
    parts["loss or a layer's backward"] = max(loss_bytes(job), backward_bytes(job))
    in_a_step = parts["activations kept"] + parts["loss or a layer's backward"]
    parts["start, beyond a step"] = max(0, start_bytes(job) - parts["gathered layers"] - in_a_step)
    parts["evaluation, beyond a step"] = max(0, evaluation_bytes(job) - in_a_step)
    parts["context and fragments"] = CONTEXT_BYTES + int(FRAGMENTS * sum(parts.values()))
    return parts


def allocated_parts(job: Job) -> dict[str, int]:
    """What is allocated from the first step to the last."""
    zero, element = job.sharding, job.element_bytes
    # A rank alone uses its partitions, which are whole, as they lie.
    whole = job.gathered(*job.replicated) if job.gpus > 1 else 0
    trained = job.shard(job.factors)
    return {
        "base shard": 0 if zero.offload else job.shard(job.base) * element,
        "hpz second copy": 0 if zero.offload else second_copy_elements(job) * element,
        "factors and norms": (whole + (0 if zero.offload else trained)) * element,
        "gradients": trained * FP32,
        "masters and moments": trained * MASTER_AND_MOMENTS,
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
    done its backward. So may, without it, the distance within which a weight that is used again is kept.
    """
    if job.gpus == 1 and not job.sharding.offload:
        return 0
    zero, sizes = job.sharding, [p.numel for p in job.base if not p.replicated]
    ahead = zero.max_live + max(sizes) if zero.prefetch and zero.max_live else 0
    layer = job.architecture.layer_matrices if job.checkpointing != "none" or zero.reuse else 0
    live = min(sum(sizes), max(ahead + layer, max(sizes)))
    copied = min(zero.prefetch, live)  # several weights are gathered as one and then copied apart
    return (live + copied) * job.element_bytes


def kept_bytes(job: Job) -> int:
    """What autograd keeps from forward to backward: the inputs of checkpointed layers, all that the others save.

    And once what all layers share: cosine and sine of the positions, the mask.
    """
    model, again = job.architecture, job.checkpointed_layers
    inputs = again * model.hidden * job.element_bytes * job.micro_tokens
    return inputs + (model.layers - again) * layer_bytes(job) + job.micro_tokens * shared_bytes(job)


def shared_bytes(job: Job) -> int:
    """Of a token: cosine and sine; its row of the mask, which is added to scores, or for sdpa says yes or no."""
    mask = job.element_bytes if job.attention_kind == "eager" else 1
    return 2 * job.architecture.head_dim * job.element_bytes + job.masked * job.tokens * mask


def layer_bytes(job: Job) -> int:
    """What autograd saves in the forward pass of one layer."""
    model, element, scores = job.architecture, job.element_bytes, job.architecture.heads * job.tokens
    query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
    per_token = model.norms * (model.hidden + 1) * FP32  # a norm works in fp32
    per_token += job.adapted * job.rank * element  # x A_kr of every adapted linear
    per_token += 3 * model.mlp * element  # gate, its activation, up
    if job.dropped_out:
        per_token += job.dropped_out * (element + 1)  # what dropout leaves of each linear's input, and which
    else:
        per_token += (2 * model.hidden + model.mlp) * element  # the inputs of attention, MLP and down_proj
    per_token += (2 + job.by_row) * query * element  # q and the output; that of each row, and of all together
    per_token += 2 * (query if job.masked else key) * element  # k and v: with a mask they are repeated for every head
    if job.attention_kind == "eager":
        per_token += scores * (FP32 + element * (1 + model.attention_cap))  # softmax, rounded; of capped scores tanh
    else:
        per_token += model.heads * FP32 + job.masked * job.tokens * element  # log-sum-exp; the mask as it is added
    return per_token * job.micro_tokens


def loss_bytes(job: Job) -> int:
    """The final norm in fp32, the hidden states, the supervised ones, their gradient; and of a chunk the logits."""
    model = job.architecture
    per_token = (model.hidden + 1) * FP32 + 3 * model.hidden * job.element_bytes
    per_logit = (2 + model.logit_cap) * FP32  # logits and log-softmax, with a cap its slope
    return job.micro_tokens * per_token + min(CHUNK, job.micro_tokens) * model.vocab * per_logit


def backward_bytes(job: Job) -> int:
    """The fullest moment of the backward pass: of the final norm, or of the last layer, after what it recomputes.

    Where that layer is not checkpointed, it has freed as much when the one before recomputes.
    """
    model, element, tokens = job.architecture, job.element_bytes, job.micro_tokens
    hidden, mlp, products = model.hidden * element, model.mlp * element, job.rank * element
    norm = 5 * model.hidden * FP32  # in fp32 five tensors
    wide = max(out + into for out, into in job.targets.values())
    moments = {
        # Gradients: of the inputs of down_proj, and of the Khatri-Rao factors of the widest linear.
        "last linear": tokens * (hidden + mlp + products) + products * wide,
        # Of the product, the activation, up; the product itself and what down_proj saved are gone.
        "product": tokens * (hidden + 2 * mlp - products),
    }
    if model.norms > 2:
        moments["norm after the MLP"] = tokens * (hidden + norm)
    if job.attention_kind == "eager":
        # Of the probabilities, before and after the softmax, in fp32; what the MLP saved is gone.
        mlp_saved = model.norms // 2 * model.hidden * FP32 + hidden + 4 * mlp + 4 * products
        probabilities = model.heads * job.tokens * (2 * FP32 - element)
        moments["softmax"] = tokens * (hidden + probabilities - mlp_saved)
    recomputed = layer_bytes(job) if job.is_checkpointed(model.layers - 1) else 0
    return max(tokens * (model.hidden * FP32 + norm), recomputed + max(moments.values()))


def evaluation_bytes(job: Job) -> int:
    """The fullest moment of a forward pass over held-out rows: of a layer's MLP or attention, or of the loss."""
    model, element, tokens = job.architecture, job.element_bytes, job.eval_batch * job.tokens
    hidden, query, key = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim
    around = 3 * hidden * element + shared_bytes(job)  # embedded, the layer's input, and normed
    moments = [around + (hidden + 3 * model.mlp) * element]  # the residual; activation, up, product
    if job.attention_kind == "eager":  # q; k and v, and repeated; scores, also in fp32, and their softmax
        moments.append(around + (3 * query + 2 * key) * element + model.heads * job.tokens * (element + 2 * FP32))
    logits = min(CHUNK, tokens) * model.vocab * 2 * FP32
    return max(tokens * max(moments), tokens * 2 * hidden * element + logits)


def start_bytes(job: Job) -> int:
    """Before the first step: every factor in fp32 and in the model's dtype, and two weights, one also in fp32."""
    largest = max(out * into for out, into in job.targets.values())
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
    stored = job.trainable_parameters
    if isinstance(job.adapter, AdapterConfig):  # PEFT's LoHa has one rank
        stored = stored * 2 * max(job.adapter.r1, job.adapter.r2) // job.adapter.width
    return {
        "base": job.base_parameters * DOWNLOAD_ELEMENT_BYTES,
        "checkpoints": (job.kept_checkpoints + 1) * job.trainable_parameters * MASTER_AND_MOMENTS,
        "adapter": stored * FP32,
    }
