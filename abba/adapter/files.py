"""A standalone adapter: a directory that stock PEFT loads, written whole or not at all, re-opened before it counts.

adapter_model.safetensors  the tensors, in PEFT's LoHa or LoRA form
adapter_config.json        PEFT's configuration
abba_config.json           what PEFT has no field for: r1, r2, alpha, module names, form
README.md                  a model card
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from abba.adapter import export
from abba.adapter.config import AdapterConfig
from abba.adapter.initialize import Factors
from abba.adapter.inject import check_factors, inject
from abba.adapter.linear import abba_modules
from abba.errors import CheckpointError, RecipeError
from abba.storage import Spec, make_directory, publish_directory, read_json, write_json, write_safetensors

WEIGHTS, PEFT_CONFIG, ABBA_CONFIG, CARD = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "abba_config.json",
    "README.md",
)
FORMAT_VERSION = 1


@dataclass(frozen=True)
class AdapterDescription:
    """abba_config.json: everything about an adapter but its numbers."""

    config: AdapterConfig
    format: str
    modules: dict[str, tuple[int, int]]  # name -> (out, in)
    base_model: str | None


@dataclass(frozen=True)
class AdapterSummary:
    """What re-opening an adapter showed."""

    tensors: int
    bytes: int
    changes_nothing: bool  # every B2, and so delta W, is exactly zero


def write_adapter(
    directory: Path,
    description: AdapterDescription,
    load: Callable[[str], Factors],
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> AdapterSummary:
    """Write a standalone adapter, one module in memory at a time, re-open and check it, then give it its name.

    Args:
        load: the factors of a module by its name; called once for each.
        overwrite: replace a directory that stands there already.

    Raises:
        CheckpointError: `directory` is not empty, cannot be written, or does not hold what was meant when re-opened.
    """
    directory = directory.resolve()
    refuse_occupied(directory, overwrite)
    make_directory(directory.parent, "adapter directory")
    temporary = directory.with_name(f".{directory.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        layout = _layout(description, dtype)
        write_safetensors(temporary / WEIGHTS, layout, _tensors(description, load, dtype), {"format": "pt"})
        modules, config = list(description.modules), description.config
        write_json(
            temporary / PEFT_CONFIG, export.peft_config(description.format, config, modules, description.base_model)
        )
        write_json(
            temporary / ABBA_CONFIG, {"format_version": FORMAT_VERSION, **asdict(description), "scale": config.scale}
        )
        (temporary / CARD).write_text(model_card(description, dtype))
        summary = verify_adapter(temporary)
        publish_directory(temporary, directory)
    except OSError as error:
        raise CheckpointError(f"adapter directory {directory}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def refuse_occupied(directory: Path, overwrite: bool) -> None:
    """Raises CheckpointError when `directory` holds something that is not an adapter, or is not to be replaced."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not (directory / ABBA_CONFIG).is_file():
        raise CheckpointError(f"adapter directory {directory}: holds something that is no adapter; choose another")
    if not overwrite:
        raise CheckpointError(f"adapter directory {directory}: is not empty; choose another or pass --force")


def verify_adapter(directory: Path) -> AdapterSummary:
    """Re-open an adapter with the safetensors library: every tensor present, of its shape, finite, nothing extra.

    Raises:
        CheckpointError: names the first thing that is wrong.
    """
    description = read_description(directory)
    path = directory / WEIGHTS
    peft = read_json(directory / PEFT_CONFIG)
    if not isinstance(peft, dict):
        raise CheckpointError(f"{directory / PEFT_CONFIG}: is no PEFT configuration")
    base = peft.get("base_model_name_or_path")  # whoever moves the base says so there
    expected_config = export.peft_config(description.format, description.config, list(description.modules), base)
    wrong = sorted(key for key in peft.keys() | expected_config.keys() if peft.get(key) != expected_config.get(key))
    if wrong:
        raise CheckpointError(
            f"{directory / PEFT_CONFIG}: {wrong[0]} is {peft.get(wrong[0])!r} "
            f"where {ABBA_CONFIG} means {expected_config.get(wrong[0])!r}"
        )
    expected = _shapes(description)
    zero = True
    with _opened(path) as file:
        different = sorted(set(file.keys()) ^ expected.keys())
        if different:
            raise CheckpointError(f"{path}: {different[0]} is missing or does not belong there")
        for key, shape in expected.items():
            tensor = file.get_tensor(key)
            if tuple(tensor.shape) != shape:
                raise CheckpointError(f"{path}: {key} is {tuple(tensor.shape)}, its module needs {shape}")
            if not tensor.isfinite().all():
                raise CheckpointError(f"{path}: {key} holds NaN or infinity; the training that made it diverged")
            if key.endswith((export.LOHA_KEYS["B2"], "lora_B.weight")):
                zero = zero and not tensor.any()
    return AdapterSummary(len(expected), path.stat().st_size, zero)


def read_description(directory: Path) -> AdapterDescription:
    """Raises CheckpointError when the directory is no adapter of ours."""
    if not (directory / ABBA_CONFIG).is_file():
        raise CheckpointError(
            f"{directory}: is not an ABBA adapter: it has no {ABBA_CONFIG} (a run's adapter is RUN/adapter)"
        )
    raw = read_json(directory / ABBA_CONFIG)
    try:
        if raw["format_version"] != FORMAT_VERSION or raw["format"] not in export.FORMATS:
            raise CheckpointError(
                f"{directory / ABBA_CONFIG}: version {raw['format_version']}, form {raw['format']!r}; "
                f"this program reads version {FORMAT_VERSION}, {' or '.join(export.FORMATS)}"
            )
        config = AdapterConfig(**raw["config"])
        modules = {str(name): (int(out), int(into)) for name, (out, into) in raw["modules"].items()}
        return AdapterDescription(config, raw["format"], modules, raw["base_model"])
    except (KeyError, TypeError, ValueError, AttributeError, RecipeError) as error:
        raise CheckpointError(f"{directory / ABBA_CONFIG}: does not describe an adapter: {error!r}") from error


def read_factors(directory: Path) -> tuple[AdapterDescription, dict[str, Factors]]:
    """An adapter in LoHa form, back as factors.

    Raises:
        CheckpointError: damaged, or in LoRA form, from which the factors cannot be told.
    """
    description = read_description(directory)
    if description.format != "loha":
        raise CheckpointError(
            f"{directory}: is in {description.format} form, which no longer holds the four factors; "
            "convert the checkpoint again with --format loha"
        )
    verify_adapter(directory)
    with _opened(directory / WEIGHTS) as file:
        read = {key: file.get_tensor(key) for key in _shapes(description)}
    return description, {name: export.factors_from_loha(read, name, description.config) for name in description.modules}


def describe(model: nn.Module, config: AdapterConfig, format: str, base_model: str | None) -> AdapterDescription:
    """The description of a model's live adapter."""
    shapes = {name: (module.out_features, module.in_features) for name, module in abba_modules(model).items()}
    return AdapterDescription(config, format, shapes, base_model)


def save_adapter(model: nn.Module, directory: str | os.PathLike, overwrite: bool = False) -> AdapterSummary:
    """Write the adapter of a model in one process in PEFT's LoHa form, in fp32.

    Raises:
        CheckpointError: the model has no adapter, or see `write_adapter`.
    """
    modules = abba_modules(model)
    if not modules:
        raise CheckpointError("adapter: the model has no AbbaLinear; call abba.inject first")
    config = next(iter(modules.values())).adapter_config
    base_model = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    description = describe(model, config, "loha", base_model)
    return write_adapter(Path(directory), description, lambda name: modules[name].factors, overwrite=overwrite)


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> AdapterDescription:
    """Put a saved adapter into a model: injects it into a plain base, or copies into a matching injected model.

    Raises:
        CheckpointError: damaged, or its modules are not those of the model.
    """
    description, factors = read_factors(Path(directory))
    present = abba_modules(model)
    if not present:
        inject(model, description.config, factors=factors)
        return description
    if present.keys() != factors.keys():
        different = sorted(present.keys() ^ factors.keys())
        raise CheckpointError(f"{directory}: {len(different)} modules differ from the model's, such as {different[0]}")
    for name, module in present.items():
        check_factors(name, factors[name], module, description.config)
    with torch.no_grad():
        for name, module in present.items():
            for live, saved in zip(module.factors, factors[name], strict=True):
                if live.shape != saved.shape:
                    raise CheckpointError(
                        f"{directory}: {name} has a factor {tuple(saved.shape)}, not {tuple(live.shape)}"
                    )
                live.copy_(saved)
            module.adapter_config = description.config
    return description


def model_card(description: AdapterDescription, dtype: torch.dtype) -> str:
    """README.md of an adapter: what it is and how to load it."""
    config, base = description.config, description.base_model or "the base model"
    kind = "LoHa" if description.format == "loha" else f"LoRA of rank {config.r1 * config.r2}"
    header = f"---\nbase_model: {description.base_model}\nlibrary_name: peft\ntags: [abba]\n---\n"
    vllm = f"\nNote: {export.vllm_advice(config)}.\n" if description.format == "lora" else ""
    return (
        f"{header}\n# ABBA adapter for {base}\n\n"
        f"delta W = s (B1 A1) * (B2 A2), r1 = {config.r1}, r2 = {config.r2}, alpha = {config.alpha:g}, "
        f"s = {config.scale:g}, {len(description.modules)} modules, {str(dtype).removeprefix('torch.')}. "
        f"Stored as PEFT {kind}; the two are the same function.\n\n"
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        'model = PeftModel.from_pretrained(base, "THIS_DIRECTORY")\n```\n'
        f"{vllm}"
    )


def _shapes(description: AdapterDescription) -> dict[str, tuple[int, int]]:
    return {
        key: shape
        for name, size in description.modules.items()
        for key, shape in export.tensor_shapes(description.format, name, size, description.config).items()
    }


def _layout(description: AdapterDescription, dtype: torch.dtype) -> Mapping[str, Spec]:
    return {key: Spec(shape, dtype) for key, shape in _shapes(description).items()}


def _tensors(description: AdapterDescription, load: Callable[[str], Factors], dtype: torch.dtype) -> Iterator[Tensor]:
    for name in description.modules:
        yield from export.tensors(description.format, load(name), description.config, dtype)


def _opened(path: Path):
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {error}") from error
