"""The ZeRO-3 engine: base partitioned, factors and 1-D tensors replicated, masters exact, state as slices."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import compiler
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from pydantic import ValidationError
from torch import Tensor, nn

from abba.checkpoint.format import MASTER, MOMENTS
from abba.checkpoint.slices import slice_bounds
from abba.errors import RecipeError, first_line
from abba.sharded.owned_keys import SWITCHES, TRACKERS
from abba.sharded.ranks import Ranks, refuse_hierarchy
from abba.sharded.replicated import replicate


def engine_config(
    dtype: torch.dtype,
    micro_batch: int,
    accumulation: int,
    max_grad_norm: float,
    extra: Mapping[str, Any],
    ranks: Ranks,
) -> dict[str, Any]:
    """A DeepSpeed configuration; `extra` is the recipe's own `deepspeed:` section, without OWNED_KEYS.

    Raises:
        RecipeError: DeepSpeed does not know a key of `extra`, or not this value of it; or it does not suit these ranks.
    """
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            # Only factors have gradients: DeepSpeed's 5e8 elements would hold 1 GB per rank for nothing.
            "reduce_bucket_size": 5_000_000,
            "overlap_comm": True,
            "contiguous_gradients": True,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 1_000_000_000,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU at each micro-batch; the loop has its own
    }
    zero = {**config["zero_optimization"], **extra.get("zero_optimization", {})}
    config = {**config, **extra, "zero_optimization": zero}
    refuse_hierarchy(checked_section(extra).zero_hpz_partition_size, ranks)
    return config


def checked_section(extra: Mapping[str, Any]) -> DeepSpeedZeroConfig:
    """The recipe's `deepspeed:` section, every key of it known to DeepSpeed; gives its zero_optimization.

    Raises:
        RecipeError: DeepSpeed does not know a key, or not this value of it.
    """
    for key, value in extra.items():
        if key in SWITCHES and not isinstance(value, int):
            raise RecipeError(f"deepspeed.{key}: {value!r} is no whole number, true or false")
        if key not in SWITCHES and not isinstance(value, Mapping):
            raise RecipeError(
                f"deepspeed.{key}: {value!r} is no section; write {{enabled: true}} and what else it needs"
            )
        if key in TRACKERS and value.get("enabled") and not _is_installed(key):
            raise RecipeError(f"deepspeed.{key}: {key} is not installed; pip install {key}, or leave the section out")
        if key != "zero_optimization":
            with _in_one_line(f"deepspeed.{key}"):
                DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, key: value})
    with _in_one_line("deepspeed.zero_optimization"):
        checked = DeepSpeedZeroConfig(**{"stage": 3, **extra.get("zero_optimization", {})})
    if checked.offload_param is not None and checked.offload_param.device == OffloadDeviceEnum.nvme:
        raise RecipeError("deepspeed.zero_optimization.offload_param.device: nvme is not supported; write cpu")
    return checked


def _is_installed(package: str) -> bool:
    """Not by a directory of its name alone, which wandb leaves where a run was started."""
    found = find_spec(package)
    return found is not None and found.origin is not None


@contextmanager
def _in_one_line(section: str) -> Iterator[None]:
    """A mistake that DeepSpeed finds, as a RecipeError."""
    try:
        yield
    except ValidationError as error:
        mistake = error.errors()[0]
        parts = [str(part) for part in mistake["loc"] if f"deepspeed.{part}" != section]
        reason = f"{mistake['input']!r}: {mistake['msg']}"
        if mistake["type"] == "extra_forbidden":
            near = difflib.get_close_matches(parts[-1], _zero_keys() if "zero" in section else [], n=1)
            reason = "; ".join(["DeepSpeed knows no such key", *(f"did you mean {key}?" for key in near)])
        raise RecipeError(f"{'.'.join([section, *parts])}: {first_line(reason)}") from None
    except (TypeError, ValueError, AssertionError, AttributeError, KeyError) as error:
        raise RecipeError(f"{section}: {first_line(error)}") from None


def _zero_keys() -> list[str]:
    return [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]


def start_engine(
    model: nn.Module,
    config: Mapping[str, Any],
    adam: Mapping[str, Any],
    read: Callable[[str, str, int, int], Tensor],
    step: int = 0,
) -> deepspeed.DeepSpeedEngine:
    """Wrap an injected, partitioned model whose optimizer has done `step` steps.

    Args:
        adam: arguments of torch.optim.AdamW.
        read: `read(kind, name, start, stop)` gives elements of a flattened trainable tensor in fp32: its master and,
            after the first step, its moments. DeepSpeed builds its masters from the bf16 parameters, which would round
            them; they are set here from the unrounded values, and the bf16 copies from them.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    added = {id(parameter) for parameter in trainable if not hasattr(parameter, "ds_id")}  # to the partitioned base
    fused = {"fused": True} if next(model.parameters()).device.type == "cuda" else {}
    import_muon()
    optimizer = torch.optim.AdamW(trainable, **adam, **fused)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepcopy(dict(config)))
    if step:
        _create_adam_state(engine, step)
        engine.global_samples = step * engine.train_batch_size()  # over which it logs
    for name, parameter in trainable_parameters(engine):
        for kind in (MASTER, *MOMENTS) if step else (MASTER,):
            _set_local(parameter, kind, read(kind, name, *_bounds(parameter)))
    replicate(engine, added)
    return engine


class _Passed:
    """In place of the two autograd functions in which DeepSpeed gathers a module's weights for backward."""

    @staticmethod
    def apply(tensor: Tensor) -> Tensor:
        return tensor


def needs_no_weight_in_backward(module: nn.Module) -> None:
    """Before the engine starts: spare the gather for a frozen module whose backward reads saved tensors alone."""
    module.pre_bwd_fn = module.post_bwd_fn = _Passed  # DeepSpeed makes its own where a module has none


def track(engine: deepspeed.DeepSpeedEngine, values: Mapping[str, float]) -> None:
    """Log to what the recipe's `deepspeed:` section names: DeepSpeed alone would tell it the learning rate only.

    As DeepSpeed does, over the number of training examples so far.
    """
    if engine.monitor.enabled:
        seen = engine.global_samples
        engine.monitor.write_events([(f"Train/Samples/{name}", value, seen) for name, value in values.items()])


def import_muon() -> None:
    """What ZeRO-3 imports to see that an optimizer is not Muon, without torch's compiler, which its decorators start.

    It would take two seconds and 50 MB of each rank's start, for nothing that trains here.
    """
    kept, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = kept


def trainable_parameters(engine: deepspeed.DeepSpeedEngine) -> list[tuple[str, nn.Parameter]]:
    """(name in the model, parameter) of everything that trains, in the model's order."""
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def local_slices(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of the training state: `KIND/NAME` and a 1-D fp32 tensor without padding. No communication."""
    yield from local_masters(engine)
    for name, parameter in trainable_parameters(engine):
        for kind in MOMENTS:
            yield f"{kind}/{name}", _without_padding(parameter, safe_get_local_optimizer_state(parameter, kind))


def local_masters(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    """This rank's slices of the fp32 masters as `master/NAME`; also before the first step, when no moments exist."""
    for name, parameter in trainable_parameters(engine):
        yield f"{MASTER}/{name}", _without_padding(parameter, safe_get_local_fp32_param(parameter))


def release(engine: deepspeed.DeepSpeedEngine) -> None:
    """Give the memory of the sharded model back; the engine is of no use afterwards.

    DeepSpeed's hooks keep engine and model alive in C++, where Python's garbage collector does not see the cycle.
    """
    parameters, inner = list(engine.module.parameters()), engine.optimizer.optimizer
    engine.destroy()
    inner.state.clear()
    for parameter in parameters:
        for held in (parameter, parameter.ds_tensor, parameter.ds_secondary_tensor):
            if held is not None:
                held.data = held.data.new_empty(0)


def _without_padding(parameter: nn.Parameter, local: Tensor) -> Tensor:
    start, stop = _bounds(parameter)
    return local[: stop - start].detach().float().cpu().clone()


def _bounds(parameter: nn.Parameter) -> tuple[int, int]:
    return slice_bounds(parameter.ds_numel, parameter.ds_zero_partition_rank, parameter.ds_zero_partition_world_size)


def _create_adam_state(engine: deepspeed.DeepSpeedEngine, step: int) -> None:
    """The state that AdamW makes in its first step; DeepSpeed can only set what is there."""
    inner = engine.optimizer.optimizer
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        count = torch.tensor(float(step), device=flat.device if inner.defaults["fused"] else "cpu")
        inner.state[flat] = {"step": count, **{kind: torch.zeros_like(flat) for kind in MOMENTS}}


def _set_local(parameter: nn.Parameter, kind: str, values: Tensor) -> None:
    local = torch.zeros(parameter.ds_tensor.numel(), device=parameter.ds_tensor.device)
    local[: values.numel()] = values
    if kind == MASTER:
        safe_set_local_fp32_param(parameter, local)
        parameter.ds_tensor.data.copy_(local)  # before the first gather, or a stale copy would be used silently
        parameter.ds_secondary_tensor = None  # of hierarchical partitioning; DeepSpeed too drops it at every step
    else:
        safe_set_local_optimizer_state(parameter, local, kind)
