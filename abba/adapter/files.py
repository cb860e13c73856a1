"""A standalone adapter: a directory that stock PEFT loads, written whole or not at all, re-opened before it counts.

adapter_model.safetensors  the tensors, in PEFT's LoHa, LoRA, DoRA or HiRA form
adapter_config.json        PEFT's configuration
abba_config.json           what PEFT has no field for: r1, r2, alpha, module names, form
README.md                  a model card
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from abba.adapter import export
from abba.adapter.baseline import load_by_peft
from abba.adapter.card import model_card
from abba.adapter.config import AdapterConfig, BaselineConfig, FullConfig
from abba.adapter.directory import (
    ABBA_CONFIG,
    ADAPTER_FORMATS,
    CARD,
    PEFT_CONFIG,
    WEIGHTS,
    AdapterDescription,
    KeptEnergy,
    read_description,
    refuse_occupied,
    write_description,
    written_whole,
)
from abba.adapter.initialize import Factors
from abba.adapter.inject import check_factors, inject
from abba.adapter.linear import abba_modules
from abba.adapter.truncate import truncate
from abba.errors import CheckpointError, RecipeError
from abba.names import inside
from abba.prepared import replacing
from abba.storage import SafetensorsFile, Spec, read_json, write_json, write_safetensors


@dataclass(frozen=True)
class AdapterSummary:
    """What re-opening an adapter showed."""

    tensors: int
    bytes: int
    changes_nothing: bool  # every B2 (of LoRA B, and so on), and so delta W, is exactly zero
    kept_energy: KeptEnergy | None = None  # of a truncated LoRA


def write_adapter(
    directory: Path,
    description: AdapterDescription,
    load: Callable[[str], Sequence[Tensor]],
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    scores: Mapping[str, Any] | None = None,
) -> AdapterSummary:
    """Write a standalone adapter, one module in memory at a time, re-open and check it, then give it its name.

    Args:
        load: the factors of a module by its name, in the order of its configuration's; called once for each.
        overwrite: replace a directory that stands there already.
        scores: for the card.

    Raises:
        CheckpointError: `directory` is not empty, cannot be written, or does not hold what was meant when re-opened.
    """
    refuse_occupied(directory, overwrite)
    layout = {key: Spec(shape, dtype) for key, shape in _shapes(description)}
    energies: dict[str, tuple[float, float]] = {}
    with written_whole(directory, overwrite) as temporary:
        write_safetensors(temporary / WEIGHTS, layout, _tensors(description, load, dtype, energies), {"format": "pt"})
        kept = _kept_energy(energies) if energies else None
        description = replace(description, dtype=str(dtype).removeprefix("torch."), kept_energy=kept)
        write_json(temporary / PEFT_CONFIG, export.peft_config(description))
        write_description(temporary, description)
        (temporary / CARD).write_text(model_card(description, scores), encoding="utf-8")
        return replace(verify_adapter(temporary), kept_energy=kept)


def rewrite_card(directory: Path, scores: Mapping[str, Any]) -> None:
    """Write the model card of an adapter or a merged model anew, with the scores that it got since.

    Raises:
        CheckpointError: the directory is none of ours, or cannot be written.
    """
    card = model_card(read_description(directory), scores)
    try:
        with replacing(directory / CARD) as temporary:
            temporary.write_text(card, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{directory / CARD}: cannot be written: {error.strerror}") from error


def verify_adapter(directory: Path) -> AdapterSummary:
    """Re-open an adapter with the safetensors library: every tensor present, of its shape, finite, nothing extra.

    Raises:
        CheckpointError: names the first thing that is wrong.
    """
    return _verified(directory, read_description(directory))


def _verified(directory: Path, description: AdapterDescription) -> AdapterSummary:
    if description.format not in ADAPTER_FORMATS:
        raise CheckpointError(f"{directory}: is a {description.format} model and no adapter; it loads by itself")
    path = directory / WEIGHTS
    for name in (WEIGHTS, PEFT_CONFIG, ABBA_CONFIG):
        inside(directory, directory / name)
    peft = read_json(directory / PEFT_CONFIG)
    if not isinstance(peft, dict):
        raise CheckpointError(f"{directory / PEFT_CONFIG}: is no PEFT configuration")
    base = peft.get("base_model_name_or_path")  # whoever moves the base says so there
    expected_config = export.peft_config(replace(description, base_model=base))
    keys = (peft.keys() | expected_config.keys()) - {"revision"}  # of that base
    wrong = sorted(key for key in keys if peft.get(key) != expected_config.get(key))
    if wrong:
        raise CheckpointError(
            f"{directory / PEFT_CONFIG}: {wrong[0]} is {peft.get(wrong[0])!r} "
            f"where {ABBA_CONFIG} means {expected_config.get(wrong[0])!r}"
        )
    zero, expected = True, {}
    with opened(path) as file:
        held = set(file.keys())
        for key, shape in _shapes(description):
            if key not in held:  # at the first one: a configuration can name far more than a file holds
                raise CheckpointError(f"{path}: {key} is missing")
            expected[key] = shape
        if held - expected.keys():
            raise CheckpointError(f"{path}: {min(held - expected.keys())} does not belong there")
        for key, shape in expected.items():
            tensor = file.get_tensor(key)
            if tuple(tensor.shape) != shape:
                raise CheckpointError(f"{path}: {key} is {tuple(tensor.shape)}, its module needs {shape}")
            if not tensor.isfinite().all():
                raise CheckpointError(f"{path}: {key} holds NaN or infinity; the training that made it diverged")
            if key.endswith(export.zero_at_start(description)):
                zero = zero and not tensor.any()
    return AdapterSummary(len(expected), path.stat().st_size, zero)


def read_factors(directory: Path) -> tuple[AdapterDescription, dict[str, Factors]]:
    """An adapter in LoHa form, back as factors.

    Raises:
        CheckpointError: damaged, or in LoRA or merged form, from which the factors cannot be told.
    """
    description = read_description(directory)
    return description, _factors(directory, description)


def _factors(directory: Path, description: AdapterDescription) -> dict[str, Factors]:
    if isinstance(description.config, BaselineConfig):
        raise CheckpointError(f"{directory}: is a {description.config.method} adapter and no ABBA adapter")
    if isinstance(description.config, FullConfig):
        raise CheckpointError(f"{directory}: is a whole model and no adapter; give it as the model")
    if description.format != "loha":
        raise CheckpointError(
            f"{directory}: is in {description.format} form, which no longer holds the four factors; "
            "convert the checkpoint again with --format loha"
        )
    _verified(directory, description)
    with opened(directory / WEIGHTS) as file:
        read = {key: file.get_tensor(key) for key, _ in _shapes(description)}
    return {name: export.factors_from_loha(read, name, description.config) for name in description.modules}


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
    configs = [module.adapter_config for module in modules.values()]
    config = configs[0]
    if any(other != config for other in configs):
        raise CheckpointError("adapter: its modules differ in r1, r2, alpha or targets; a saved one has one of each")
    base_model = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    description = describe(model, config, "loha", base_model)
    return write_adapter(Path(directory), description, lambda name: modules[name].factors, overwrite=overwrite)


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> AdapterDescription:
    """Put a saved adapter into a model: injects it into a plain base, or copies into a matching injected model.

    Raises:
        CheckpointError: damaged, or its modules are not those of the model.
    """
    description = read_description(Path(directory))
    if isinstance(description.config, BaselineConfig):
        _verified(Path(directory), description)
        load_by_peft(model, Path(directory))
        return description
    factors = _factors(Path(directory), description)
    present = abba_modules(model)
    if not present:
        try:
            inject(model, description.config, factors=factors)
        except RecipeError as error:
            raise CheckpointError(f"{directory}: does not fit this model: {error.reason}; give its own base") from error
        return description
    if present.keys() != factors.keys():
        different = sorted(present.keys() ^ factors.keys())
        raise CheckpointError(f"{directory}: {len(different)} modules differ from the model's, such as {different[0]}")
    for name, module in present.items():
        check_factors(name, factors[name], module, module.adapter_config)
    with torch.no_grad():
        for name, module in present.items():
            for live, saved in zip(module.factors, factors[name], strict=True):
                live.copy_(saved)
            module.adapter_config = description.config
    return description


def _shapes(description: AdapterDescription) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in description.modules:
        yield from export.tensor_shapes(description, name).items()


def _tensors(
    description: AdapterDescription,
    load: Callable[[str], Sequence[Tensor]],
    dtype: torch.dtype,
    energies: dict[str, tuple[float, float]],
) -> Iterator[Tensor]:
    for name in description.modules:
        if description.rank is None:
            yield from export.tensors(description.format, load(name), description.config, dtype)
        else:
            a_KI, b_OK, *energies[name] = truncate(load(name), description.config.scale, description.rank)
            yield from (a_KI.to(dtype), b_OK.to(dtype))


def _kept_energy(energies: Mapping[str, tuple[float, float]]) -> KeptEnergy:
    # A module whose delta W is zero loses nothing.
    shares = {name: kept / total if total else 1.0 for name, (kept, total) in energies.items()}
    worst = min(shares, key=shares.__getitem__)
    total = sum(total for _, total in energies.values())
    overall = sum(kept for kept, _ in energies.values()) / total if total else 1.0
    return KeptEnergy(overall, shares[worst], worst)


def opened(path: Path) -> safe_open:
    """Open a file with the safetensors library; CheckpointError if that fails."""
    SafetensorsFile(path).close()  # it bounds the header before it is believed
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {error}") from error
