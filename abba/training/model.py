"""The base model as it is trained: partitioned, filled from disk, with gradient checkpointing."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import prevent_arange_dtype_change
from transformers.modeling_layers import GradientCheckpointingLayer

from abba.base_model import build_empty
from abba.sharded.loading import load_base, partitioned_from_birth
from abba.sharded.ranks import Ranks
from abba.training.startup import Startup


def load_partitioned(
    directory: Path,
    dtype: torch.dtype,
    attention: str,
    engine_config: dict,
    ranks: Ranks,
    startup: Startup,
    say: Callable[[str], None],
) -> tuple[PreTrainedModel, int]:
    """(base model under ZeRO-3, checksum of its weights), filled by every rank from its own slices. Collective.

    Args:
        attention: an implementation by name.

    Raises:
        CheckpointError: see `load_base`.
    """
    # The order matters: entered after zero.Init, the first would leave RoPE's inv_freq in bf16.
    with prevent_arange_dtype_change(), no_init_weights(), partitioned_from_birth(engine_config):
        model = build_empty(directory, dtype, attention)
    wrong = {p.ds_tensor.dtype for p in model.parameters()} - {dtype}
    assert not wrong, f"partitions are {wrong}, not {dtype}"
    startup.done("architecture")
    loaded = load_base(model, directory, ranks.rank, ranks.world_size)
    startup.done("weights")
    name = str(dtype).removeprefix("torch.")
    say(f"model: {directory}, {model.config.model_type}, {name}")
    copy = f" and 1/{loaded.copy_ranks} for its node's copy" if loaded.copy_ranks else ""
    say(
        f"model: {loaded.elements:,} parameters in {loaded.tensors} tensors; each rank read its 1/{ranks.world_size}"
        f"{copy}, rank 0 {loaded.bytes_read:,} bytes, in {startup.seconds['weights']:.1f} s; "
        f"checksum {loaded.checksum:016x}"
    )
    for ignored in loaded.ignored:
        say(f"model: passed over {ignored}")
    return model, loaded.checksum


def enable_checkpointing(model: PreTrainedModel, mode: str) -> None:
    """Gradient checkpointing: of every decoder layer (`reentrant`, `non_reentrant`), of every second (`selective`).

    Reentrant is the rule: what else is recomputed under ZeRO-3 is gathered a third time (abba/planning/speed.py). To be
    called when the engine is there: transformers makes the embedded tokens need a gradient, and its hook has to come
    after DeepSpeed's own, which would take that for a reason to gather the embedding for backward.
    """
    if mode == "none":
        return
    # Renamed in transformers 5; the old name is deprecated.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": mode != "non_reentrant"})
    if mode == "selective":
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for layer in layers[1::2]:
            layer.gradient_checkpointing = False
