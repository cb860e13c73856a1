"""The shapes of a base model from its config.json: every parameter by name, in the order of the forward pass."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from abba.adapter.config import AdapterConfig, BaselineConfig, factors_of
from abba.adapter.initialize import check_ranks
from abba.adapter.inject import choose_names
from abba.errors import RecipeError

FAMILIES = ("llama", "mistral", "qwen2", "gemma2")
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"
NORMS = {
    "gemma2": (
        ("input_layernorm", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    )
}
TWO_NORMS = (("input_layernorm",), ("post_attention_layernorm",))


@dataclass(frozen=True)
class Parameter:
    """A tensor of the model: its name, its shape, and whether it trains."""

    name: str
    shape: tuple[int, ...]
    trains: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def replicated(self) -> bool:
        """Kept whole on every rank, besides its partition: factors and 1-D tensors."""
        return self.trains or len(self.shape) == 1


@dataclass(frozen=True)
class Architecture:
    """A decoder of one of FAMILIES. Sizes in elements."""

    family: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    attention_cap: bool = False  # caps attention logits, which only eager attention does
    logit_cap: bool = False
    window: int | None = None  # tokens back that every layer sees

    def linears(self) -> dict[str, tuple[int, int, bool]]:
        """(out, in, has a bias) of the seven linears of a layer, in the order of the forward pass."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (query, self.hidden, self.qkv_bias),
            "self_attn.k_proj": (key, self.hidden, self.qkv_bias),
            "self_attn.v_proj": (key, self.hidden, self.qkv_bias),
            "self_attn.o_proj": (self.hidden, query, self.o_bias),
            "mlp.gate_proj": (self.mlp, self.hidden, self.mlp_bias),
            "mlp.up_proj": (self.mlp, self.hidden, self.mlp_bias),
            "mlp.down_proj": (self.hidden, self.mlp, self.mlp_bias),
        }

    @property
    def norms(self) -> int:
        """Norms in a layer."""
        return sum(map(len, NORMS.get(self.family, TWO_NORMS)))

    @property
    def layer_matrices(self) -> int:
        """Elements of a layer's 2-D weights."""
        return sum(out * into for out, into, _ in self.linears().values())

    def base(self) -> Iterator[Parameter]:
        """Every parameter of the base; a tied head is the embedding, and counted once."""
        yield Parameter(f"{EMBEDDING}.weight", (self.vocab, self.hidden))
        for layer in range(self.layers):
            for name, (out, into, bias) in self.linears().items():
                yield Parameter(f"model.layers.{layer}.{name}.weight", (out, into))
                if bias:
                    yield Parameter(f"model.layers.{layer}.{name}.bias", (out,))
            for group in NORMS.get(self.family, TWO_NORMS):
                for norm in group:
                    yield Parameter(f"model.layers.{layer}.{norm}.weight", (self.hidden,))
        yield Parameter(f"{FINAL_NORM}.weight", (self.hidden,))
        if not self.tied:
            yield Parameter(f"{HEAD}.weight", (self.vocab, self.hidden))

    def targets(self, config: AdapterConfig | BaselineConfig) -> dict[str, tuple[int, int]]:
        """(out, in) of each linear that `config` adapts, by module name.

        Raises:
            RecipeError: as abba.adapter.inject.find_targets does.
        """
        linears = {
            f"model.layers.{layer}.{name}": (out, into)
            for layer in range(self.layers)
            for name, (out, into, _) in self.linears().items()
        }
        linears[HEAD] = (self.vocab, self.hidden)
        chosen = choose_names([*self._containers(), *linears], list(linears), HEAD, config)
        for name in chosen:
            if name not in linears:
                raise RecipeError(f"adapter.target_modules: {name} is not a linear layer")
            if name == HEAD:
                raise RecipeError(f"adapter.target_modules: {name} is the output head, never adapted; leave it out")
            if isinstance(config, AdapterConfig):
                check_ranks(name, linears[name], config.r1, config.r2)
        return {name: linears[name] for name in chosen}

    def _containers(self) -> Iterator[str]:
        yield from ("model", EMBEDDING, "model.layers", FINAL_NORM)
        norms = [norm for group in NORMS.get(self.family, TWO_NORMS) for norm in group]
        for layer in range(self.layers):
            for part in ("", ".self_attn", ".mlp", ".mlp.act_fn", *(f".{norm}" for norm in norms)):
                yield f"model.layers.{layer}{part}"


def factors(targets: Mapping[str, tuple[int, int]], config: AdapterConfig | BaselineConfig) -> list[Parameter]:
    """The factors of every target."""
    return [Parameter(name, shape, trains=True) for name, shape in factors_of(config, targets).items()]


def architecture_of(config: Mapping[str, Any], source: str) -> Architecture:
    """The architecture that a config.json describes. `source`: what it is called in messages.

    Raises:
        RecipeError: it is of another family, or lacks a key.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise RecipeError(
            f"{source}: model_type {family!r} cannot be planned; known are {', '.join(FAMILIES)}, "
            f"from the keys {', '.join(NEEDED)}, num_key_value_heads, head_dim and tie_word_embeddings of config.json"
        )
    hidden, mlp, layers, heads, vocab = (_size(config, key, source) for key in NEEDED)
    # Where transformers has defaults that are those of one model, the files of all others state the value.
    kv_heads = heads if family == "llama" and config.get("num_key_value_heads") is None else None
    head_dim = hidden // heads if family != "gemma2" and config.get("head_dim") is None else None
    return Architecture(
        family,
        hidden,
        mlp,
        layers,
        heads,
        kv_heads or _size(config, "num_key_value_heads", source),
        head_dim or _size(config, "head_dim", source),
        vocab,
        tied=bool(config.get("tie_word_embeddings", family == "gemma2")),
        qkv_bias=family == "qwen2" or bool(config.get("attention_bias")),
        o_bias=family != "qwen2" and bool(config.get("attention_bias")),
        mlp_bias=family == "llama" and bool(config.get("mlp_bias")),
        attention_cap=family == "gemma2" and config.get("attn_logit_softcapping", 50.0) is not None,
        logit_cap=family == "gemma2" and config.get("final_logit_softcapping", 30.0) is not None,
        window=config.get("sliding_window", 4096) if family == "mistral" else None,
    )


def _size(config: Mapping[str, Any], key: str, source: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise RecipeError(f"{source}: config.json needs {key}, a whole number of at least 1, and has {value!r}")
    return value
