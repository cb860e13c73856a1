"""What is planned: a recipe's values and the cluster they would run on. GiB are 2**30 bytes, Gbit 1e9 bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from abba.adapter.config import AdapterConfig, BaselineConfig, FullConfig, MethodConfig
from abba.errors import RecipeError
from abba.planning.architecture import Architecture, Parameter, factors
from abba.sharded.ranks import accumulation_steps


@dataclass(frozen=True)
class Cluster:
    """GPUs and the links between them; a GPU is a rank."""

    nodes: int = 1
    gpus_per_node: int = 8
    gpu_memory_gib: float = 80.0
    intra_node_gbps: float = 3600.0  # of a GPU, in one direction: NVLink of H100, 450 GB/s
    inter_node_gbps: float = 400.0  # of a node, in one direction, all its adapters together
    gpu_tflops: float = 989.0  # dense bf16: H100 SXM

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Sharding:
    """What a recipe's `deepspeed.zero_optimization` decides; the defaults are DeepSpeed's, but for reduce_bucket."""

    hpz: int = 1  # ranks that share a second copy of the base; 1: there is none
    offload: bool = False  # the base's shard lies in host memory
    prefetch: int = 50_000_000  # elements gathered ahead of use, at a time
    max_live: int = 1_000_000_000  # elements gathered beyond which nothing is prefetched
    reuse: int = 1_000_000_000  # elements within which a weight that is used again is kept
    reduce_bucket: int = 5_000_000  # elements of gradients reduced at a time


@dataclass(frozen=True)
class Job:
    """A recipe as far as it decides memory, traffic and time, on `gpus` ranks."""

    architecture: Architecture
    adapter: AdapterConfig | BaselineConfig  # of those that have a LoRA form; see `refuse_unplanned`
    gpus: int
    global_batch: int
    micro_batch: int
    tokens: int  # of a row, all counted as full
    checkpointing: str = "reentrant"  # or non_reentrant, selective (every second layer), or none
    element_bytes: int = 2  # bf16
    attention: str = "auto"
    sharding: Sharding = Sharding()
    eval_batch: int = 0  # rows of a micro-batch of held-out rows; 0: none are held out
    kept_checkpoints: int = 2
    packing: bool = False

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank in a step.

        Raises:
            RecipeError: the global batch cannot be shared out evenly.
        """
        return accumulation_steps(self.global_batch, self.micro_batch, self.gpus, "GPUs")

    @property
    def micro_tokens(self) -> int:
        return self.micro_batch * self.tokens

    @property
    def step_tokens(self) -> int:
        return self.global_batch * self.tokens

    def is_checkpointed(self, layer: int) -> bool:
        """Its input alone is kept for the backward pass, which computes it again."""
        return self.checkpointing != "none" and not (self.checkpointing == "selective" and layer % 2)

    @cached_property
    def checkpointed_layers(self) -> int:
        return sum(map(self.is_checkpointed, range(self.architecture.layers)))

    @property
    def attention_kind(self) -> str:
        """The implementation. `auto` counts as without flash-attn, which takes no more than sdpa."""
        if self.attention != "auto":
            return self.attention
        return "eager" if self.architecture.attention_cap else "sdpa"

    @property
    def masked(self) -> bool:
        """Attention takes a mask of (tokens, tokens) for each row: eager always, sdpa for more than causality."""
        windowed = self.architecture.window is not None and self.tokens >= self.architecture.window
        return self.attention_kind == "eager" or (self.attention_kind == "sdpa" and windowed)

    @property
    def by_row(self) -> bool:
        """Attention is computed for one row of a line after the other."""
        return self.packing and self.attention_kind == "sdpa"

    @property
    def rank(self) -> int:
        """Of an update: columns of its Khatri-Rao factors, or of LoRA's."""
        return self.adapter.lora_rank

    @property
    def adapted(self) -> int:
        """Adapted linears of a layer, at most."""
        return -(-len(self.targets) // self.architecture.layers)

    @property
    def dropped_out(self) -> int:
        """Input features of a layer's adapted linears, at most, where each LoRA drops some out on its own."""
        if not getattr(self.adapter, "dropout", 0.0):
            return 0
        return -(-sum(into for _, into in self.targets.values()) // self.architecture.layers)

    @cached_property
    def targets(self) -> Mapping[str, tuple[int, int]]:
        return self.architecture.targets(self.adapter)

    @cached_property
    def base(self) -> list[Parameter]:
        return list(self.architecture.base())

    @cached_property
    def factors(self) -> list[Parameter]:
        return factors(self.targets, self.adapter)

    @property
    def replicated(self) -> list[int]:
        """Elements of each parameter that is whole on every rank."""
        return [p.numel for p in (*self.base, *self.factors) if p.replicated]

    @property
    def base_parameters(self) -> int:
        return sum(p.numel for p in self.base)

    @property
    def trainable_parameters(self) -> int:
        return sum(p.numel for p in self.factors)

    def part(self, numel: int) -> int:
        """Elements of a rank's partition of a parameter, which is padded on its own to a multiple of the ranks."""
        return -(-numel // self.gpus)

    def shard(self, parameters: list[Parameter]) -> int:
        """Elements of a rank's partitions."""
        return sum(self.part(p.numel) for p in parameters)

    def gathered(self, *numels: int) -> int:
        """Elements of these parameters gathered whole, with their padding."""
        return sum(self.part(numel) for numel in numels) * self.gpus


def refuse_unplanned(config: MethodConfig, architecture: Architecture) -> None:
    """Raises RecipeError for a method whose memory is not that of two thin factors beside a frozen weight."""
    if isinstance(config, FullConfig):
        total = sum(parameter.numel for parameter in architecture.base())
        raise RecipeError(
            f"adapter.method: full trains all {total:,} parameters, whose gradients, masters and moments are not "
            "counted here; plan another method, and add 16 bytes for each of them, shared by all GPUs"
        )
    if not config.lora_rank:
        trained = sum(parameter.numel for parameter in factors(architecture.targets(config), config))
        raise RecipeError(
            f"adapter.method: {config.method} trains {trained:,} parameters and forms whole weights in every layer, "
            "whose memory is not counted here; plan lora of the same r, and leave room for them"
        )
