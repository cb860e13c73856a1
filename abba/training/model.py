"""The base model as it is trained: partitioned, filled from disk, with gradient checkpointing."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import prevent_arange_dtype_change

from abba.base_model import choose_attention, load_config
from abba.sharded.loading import load_base, partitioned_from_birth
from abba.sharded.ranks import Ranks


def load_partitioned(
    directory: Path,
    dtype: torch.dtype,
    attention: str,
    engine_config: dict,
    device: torch.device,
    ranks: Ranks,
    say: Callable[[str], None],
) -> PreTrainedModel:
    """The base model under ZeRO-3, filled by every rank from its own slices of the files. Collective.

    Args:
        attention: an implementation by name, or "auto".

    Raises:
        CheckpointError: see `load_base`.
    """
    started = time.monotonic()
    config = load_config(directory)
    attention, why = choose_attention(config, attention, device.type)
    # The order matters: entered after zero.Init, the first would leave RoPE's inv_freq in bf16.
    with prevent_arange_dtype_change(), no_init_weights(), partitioned_from_birth(engine_config):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()  # from_config leaves it to the weight initialisation that was skipped
    wrong = {p.ds_tensor.dtype for p in model.parameters()} - {dtype}
    assert not wrong, f"partitions are {wrong}, not {dtype}"
    loaded = load_base(model, directory, ranks.rank, ranks.world_size)
    say(f"model: {directory}, {config.model_type}, {dtype}, {attention} attention because {why}")
    say(
        f"model: {loaded.elements:,} parameters in {loaded.tensors} tensors; each rank read its 1/{ranks.world_size}, "
        f"rank 0 {loaded.bytes_read:,} bytes, in {time.monotonic() - started:.1f} s; checksum {loaded.checksum:x}"
    )
    for ignored in loaded.ignored:
        say(f"model: passed over {ignored}")
    return model


def enable_checkpointing(model: PreTrainedModel, mode: str) -> None:
    """Gradient checkpointing of every decoder layer: `non_reentrant`, `reentrant` or `none`."""
    if mode == "none":
        return
    # Renamed in transformers 5; the old name is deprecated.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": mode == "reentrant"})
    if mode == "reentrant":  # it needs an input with a gradient, and the embeddings are frozen
        model.enable_input_require_grads()
