"""PEFT's own layers, for the methods that ABBA is compared with: put into a model, with the same rules for targets."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from abba.adapter.config import BaselineConfig, MethodConfig, factors_of
from abba.adapter.initialize import reproducible, seed_for
from abba.adapter.inject import InjectionReport, counted, find_targets
from abba.errors import CheckpointError, RecipeError, first_line

# As in setup.cfg; by its own name, because a checkout that is mounted into a container is not installed.
PEFT_MISSING = "needs peft, which is not installed: pip install 'peft>=0.20,<0.22'"


def require_peft(config: MethodConfig) -> None:
    """Raises RecipeError where a method of PEFT's is to be trained without it."""
    if isinstance(config, BaselineConfig) and find_spec("peft") is None:
        raise RecipeError(f"adapter.method: {config.method}: {PEFT_MISSING}")


def inject_baseline(
    model: nn.Module,
    config: BaselineConfig,
    seed: int = 0,
    gathered: Callable[[nn.Linear], AbstractContextManager] = nullcontext,
) -> InjectionReport:
    """Freeze the model and put PEFT's layer around each of its target layers, with PEFT's own initial values.

    One module at a time: PEFT wants to see whole weights (DoRA's norms, LoHa's shapes), and no rank can hold all.
    Values depend on `seed` and the module's name alone.

    Args:
        gathered: a context in which the weight of a layer is whole.

    Raises:
        RecipeError: see `find_targets`; or peft is not installed.
    """
    require_peft(config)
    from peft import get_peft_config, inject_adapter_in_model

    targets = find_targets(model, config)
    peft_config = get_peft_config({**config.peft_options, "target_modules": ["linear"]})
    model.requires_grad_(False)
    for name, linear in targets.items():
        holder = nn.ModuleDict({"linear": linear})
        with gathered(linear), reproducible(linear.weight.device, seed_for(name, seed)):
            inject_adapter_in_model(peft_config, holder)
        model.set_submodule(name, holder["linear"])
    report = counted(model, targets)
    present = {name: _shape(p) for name, p in model.named_parameters() if p.requires_grad}
    assert present == factors_of(config, report.shapes), "PEFT names or shapes its parameters otherwise"
    return report


def read_elsewhere(
    model: nn.Module, config: BaselineConfig, modules: Iterable[str]
) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """(module, parameters) where a forward reads parameters that are not the module's own: ZeRO-3 has to be told.

    HiRA computes with the base's weight and LoHa with its shape, their factors are in dictionaries; DoRA's module for
    the magnitudes reads the weight, and of both factors the shapes before it calls them.
    """
    for name in modules:
        layer = model.get_submodule(name)
        if config.method in ("hira", "loha"):
            yield layer, list(layer.parameters())
        elif config.method == "dora":
            read = [layer.base_layer.weight, *layer.lora_A.parameters(), *layer.lora_B.parameters()]
            yield layer.lora_magnitude_vector["default"], read


def load_by_peft(model: nn.Module, directory: Path) -> None:
    """Put a saved adapter into a model in place, by PEFT itself, in the model's dtype.

    Raises:
        CheckpointError: peft is not installed, or does not find every tensor in its place.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise CheckpointError(f"{directory}: {PEFT_MISSING}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # to PEFT a missing tensor is a warning
        try:
            PeftModel.from_pretrained(model, directory, autocast_adapter_dtype=False)
        except (UserWarning, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{directory}: PEFT does not load it into this base: {first_line(error)}") from None


@torch.no_grad()
def attach(model: nn.Module, config: BaselineConfig, factors: Mapping[str, Sequence[Tensor]]) -> None:
    """Put trained tensors, of each module in the order of `config.factor_shapes`, into a plain base in place."""
    report = inject_baseline(model, config)
    for name, shape in report.shapes.items():
        for factor, value in zip(config.factor_shapes(*shape), factors[name], strict=True):
            model.get_parameter(f"{name}.{factor}").copy_(value)


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(parameter.shape)
