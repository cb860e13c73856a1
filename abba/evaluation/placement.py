"""Which engine generates, on how many GPUs: arithmetic on bytes that the caller has measured, nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass

from abba.errors import ArgumentError
from abba.storage import in_gb

MARGIN = 0.1  # of a GPU's memory: CUDA's own, the activations of a prompt, fragmentation


@dataclass(frozen=True)
class Gpus:
    """The visible ones: how many, and bytes of the smallest, in all and not taken by anybody."""

    count: int
    total: int
    free: int

    @property
    def usable(self) -> int:
        return max(0, self.free - int(MARGIN * self.total))


@dataclass(frozen=True)
class Demand:
    """Bytes that an engine needs: shared among the GPUs are weights, KV cache and adapter; on each is `replicated`."""

    weights: int
    kv_cache: int
    adapter: int = 0
    replicated: int = 0

    def on_each(self, gpus: int) -> int:
        return -(-(self.weights + self.kv_cache + self.adapter) // gpus) + self.replicated

    def for_weights(self, usable: int) -> int:
        """What weights may take of a GPU's `usable`, so that the cache and the factors of these layers fit beside."""
        return usable * self.weights // (self.weights + self.kv_cache + self.adapter)


@dataclass(frozen=True)
class Placement:
    """The engine, how many GPUs it takes (0: the CPU), and the line that says why."""

    engine: str
    gpus: int
    line: str


def kv_cache_bytes(layers: int, kv_heads: int, head_dim: int, sequences: int, tokens: int, itemsize: int) -> int:
    """Keys and values of `sequences` of `tokens` each, in every layer."""
    return 2 * layers * kv_heads * head_dim * sequences * tokens * itemsize


def tensor_parallel_size(gpus: int, heads: int, kv_heads: int, width: int) -> int:
    """The most GPUs that vLLM can split attention heads and the MLP's `width` over; it can repeat KV heads."""
    sizes = [n for n in range(1, gpus + 1) if heads % n == 0 and width % n == 0]
    return max((n for n in sizes if kv_heads % n == 0 or n % kv_heads == 0), default=1)


def choose(
    wanted: str,
    gpus: Gpus,
    most: Mapping[str, int],
    demands: Mapping[str, Demand],
    refusal: str | None,
    ranks: int = 1,
) -> Placement:
    """One GPU if the model fits there, else as many as the engine can use; vLLM before transformers where it can.

    Args:
        wanted: vllm, transformers or auto.
        most: engine -> how many GPUs it can split this model over.
        demands: engine -> what it needs.
        refusal: why vLLM does not serve this model here, or None. Not None when vLLM is wanted is the caller's mistake.
        ranks: that share the rows, each with GPUs of its own.

    Raises:
        ArgumentError: it does not fit.
    """
    weights = in_gb(demands["transformers"].weights)
    if gpus.count == 0:
        engine = "vllm" if wanted == "vllm" else "transformers"
        return Placement(engine, 0, f"model: {weights} of weights, no GPU: {engine} on the CPU")
    have = f"{gpus.count} GPU{'s' * (gpus.count > 1)} of {in_gb(gpus.total)}"
    notes = []
    for engine in ("vllm", "transformers") if wanted == "auto" else (wanted,):
        if engine == "vllm" and refusal is not None:
            notes.append(refusal)
            continue
        fitting = [n for n in (1, most[engine]) if demands[engine].on_each(n) <= gpus.usable]
        if fitting:
            line = f"model: {weights} of weights, {have}: {engine} {_over(engine, fitting[0])}"
            return Placement(engine, fitting[0], "; ".join([line, *notes]))
        notes.append(_too_much(engine, most[engine], demands[engine], gpus))
    together = "start it as one process, which takes all GPUs of the node, or "
    way_out = f"each of {ranks} ranks has its own; {together}" if ranks > 1 else ""
    raise ArgumentError(
        f"the model has {weights} of weights, there {'is' if gpus.count == 1 else 'are'} {have}: {'; '.join(notes)}; "
        f"{way_out}use more or larger GPUs, or a smaller batch size and fewer new tokens"
    )


def _over(engine: str, gpus: int) -> str:
    how = {"vllm": "tensor parallel", "transformers": "device_map"}[engine]
    return f"over {gpus} GPUs ({how})" if gpus > 1 else "on one"


def _too_much(engine: str, gpus: int, demand: Demand, have: Gpus) -> str:
    return (
        f"{engine} needs {in_gb(demand.on_each(gpus))} on each of {gpus}, KV cache of {in_gb(demand.kv_cache)} "
        f"included, and can use {in_gb(have.usable)}"
    )
