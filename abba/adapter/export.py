"""The same update in the forms that the world loads: PEFT LoHa (the factors themselves) and LoRA of rank r1*r2.

A baseline has one form, its own in PEFT, and its tensors go there as they are.

Shapes: O out, I in, R = r1, Q = r2, K = r1*r2. Key names and scales as stock PEFT 0.21 reads them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from abba.adapter.config import AdapterConfig, BaselineConfig
from abba.adapter.directory import ADAPTER_FORMATS, AdapterDescription
from abba.adapter.functional import khatri_rao
from abba.adapter.initialize import Factors
from abba.errors import CheckpointError

LOHA_KEYS = {"A1": "hada_w1_b", "B1": "hada_w1_a", "A2": "hada_w2_b", "B2": "hada_w2_a"}
PREFIX = "base_model.model."
PEFT_NAMES = {"loha": "LoHa", "lora": "LoRA", "dora": "DoRA", "hira": "HiRA"}  # by form
ZERO_AT_START = {"loha": "hada_w2_b", "lora": "lora_B.weight", "dora": "lora_B.weight", "hira": "hira_B"}  # baselines
# What vLLM's max_lora_rank accepts (vllm/config/lora.py).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def tensor_shapes(description: AdapterDescription, name: str) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor that module `name` becomes."""
    (out_features, in_features), config = description.modules[name], description.config
    if isinstance(config, BaselineConfig):
        shapes = config.factor_shapes(out_features, in_features)
        return {f"{PREFIX}{name}.{_saved_name(key)}": shape for key, shape in shapes.items()}
    if description.format == "loha":
        rank = max(config.r1, config.r2)
        sides = {"A": (rank, in_features), "B": (out_features, rank)}
        return {f"{PREFIX}{name}.{key}": sides[factor[0]] for factor, key in LOHA_KEYS.items()}
    return {
        f"{PREFIX}{name}.lora_A.weight": (description.lora_rank, in_features),
        f"{PREFIX}{name}.lora_B.weight": (out_features, description.lora_rank),
    }


def zero_at_start(description: AdapterDescription) -> str:
    """How the key ends of each tensor that is zero, and with it the update, until something is trained."""
    if isinstance(description.config, BaselineConfig):
        return ZERO_AT_START[description.format]
    return LOHA_KEYS["B2"] if description.format == "loha" else "lora_B.weight"


def why_nothing_changes(description: AdapterDescription) -> str:
    """What `changes_nothing` was seen from."""
    if description.format not in ADAPTER_FORMATS:
        return "every weight is the base's"
    abba = isinstance(description.config, AdapterConfig)
    return f"every {'B2' if abba else zero_at_start(description)} is zero"


def tensors(
    format: str, factors: Sequence[Tensor], config: AdapterConfig | BaselineConfig, dtype: torch.dtype
) -> list[Tensor]:
    """The tensors of one module, in the order of `tensor_shapes`.

    LoHa holds copies of the factors, zero-padded to the larger rank, which changes nothing in the products. LoRA (of
    the whole rank) holds the Khatri-Rao factors with s folded into B; they are multiplied in fp32 and rounded once.
    """
    if isinstance(config, BaselineConfig):
        return [factor.detach().to(dtype) for factor in factors]
    factors = Factors(*(factor.detach() for factor in factors))
    if format == "loha":
        rank = max(config.r1, config.r2)
        return [_padded(factor, name, rank).to(dtype) for name, factor in factors._asdict().items()]
    wide = Factors(*(factor.float() for factor in factors))
    a_KI = khatri_rao(wide.A1, wide.A2)
    b_OK = khatri_rao(wide.B1.T, wide.B2.T * config.scale).T.contiguous()
    return [a_KI.to(dtype), b_OK.to(dtype)]


def factors_from_loha(read: Mapping[str, Tensor], name: str, config: AdapterConfig) -> Factors:
    """The factors of module `name` back from LoHa tensors, without their padding."""
    found = {factor: read[f"{PREFIX}{name}.{key}"] for factor, key in LOHA_KEYS.items()}
    r1, r2 = config.r1, config.r2
    padding = [found["A1"][r1:], found["B1"][:, r1:], found["A2"][r2:], found["B2"][:, r2:]]
    if any(part.count_nonzero() for part in padding):
        raise CheckpointError(f"adapter: {name} has non-zero values past its ranks {r1} and {r2}; the files disagree")
    return Factors(found["A1"][:r1], found["B1"][:, :r1], found["A2"][:r2], found["B2"][:, :r2])


def peft_config(description: AdapterDescription) -> dict:
    """adapter_config.json for stock PEFT. LoHa scales by alpha / r, LoRA by lora_alpha / r."""
    config = description.config
    common = {
        "base_model_name_or_path": description.base_model,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "target_modules": _peft_targets(config, list(description.modules)),
    }
    if description.base_revision is not None:
        common["revision"] = description.base_revision
    if isinstance(config, BaselineConfig):
        return {**config.peft_options, **common}
    if description.format == "loha":
        rank = max(config.r1, config.r2)
        return {"peft_type": "LOHA", "r": rank, "alpha": config.scale * rank, **common}
    rank = description.lora_rank
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "lora_dropout": 0.0, **common}


def _saved_name(live: str) -> str:
    """PEFT saves a tensor without its adapter's name, and DoRA's magnitudes as older versions named them."""
    if live.startswith("lora_magnitude_vector."):
        return "lora_magnitude_vector"
    return live.replace(".default", "")


def vllm_rank(rank: int) -> int | None:
    """The max_lora_rank with which vLLM serves a LoRA of this rank, if there is one."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def vllm_advice(description: AdapterDescription) -> str:
    """The flag that vLLM needs to serve an adapter in LoRA form, or why it cannot."""
    rank = description.lora_rank
    enough = vllm_rank(rank)
    if enough is None:
        way_out = "merge it into its base with PEFT's merge_and_unload()"
        if isinstance(description.config, AdapterConfig):
            way_out = "convert its source again with --format merged, or with --format lora --rank 256"
        return f"rank {rank} is above vLLM's limit of {VLLM_RANKS[-1]}: it cannot serve this adapter; {way_out}"
    return f"serve it with vLLM: --enable-lora --max-lora-rank {enough}"


def _peft_targets(config: AdapterConfig | BaselineConfig, modules: list[str]) -> list[str] | str:
    # A layer range has no exact counterpart in PEFT, full names do; suffixes and patterns mean the same to both.
    if config.layer_range is not None:
        return modules
    if config.target_modules == "all-linear":
        return sorted({name.rsplit(".", 1)[-1] for name in modules})
    return config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)


def _padded(factor: Tensor, name: str, rank: int) -> Tensor:
    missing = rank - (factor.shape[0] if name.startswith("A") else factor.shape[1])
    return F.pad(factor, (0, 0, 0, missing) if name.startswith("A") else (0, missing))
