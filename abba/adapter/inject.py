"""Choosing the layers, and putting factors into them: two steps, because sharded weights need work between them."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from abba.adapter.config import AdapterConfig, BaselineConfig
from abba.adapter.initialize import Factors, check_ranks, initial_factors, seed_for
from abba.adapter.linear import AbbaLinear, abba_modules
from abba.errors import CheckpointError, RecipeError


@dataclass(frozen=True)
class InjectionReport:
    """What was changed: the replaced modules, each with its (out, in), and how many elements train or are frozen."""

    shapes: dict[str, tuple[int, int]]
    trainable_parameters: int
    frozen_parameters: int

    @property
    def replaced(self) -> tuple[str, ...]:
        return tuple(self.shapes)


def find_targets(model: nn.Module, config: AdapterConfig | BaselineConfig) -> dict[str, nn.Linear]:
    """The linear layers that `config` names, by module name, in the model's order.

    Raises:
        RecipeError: nothing matches; one of the listed suffixes matches nothing; a match is no nn.Linear, is the
            output head, or already has an adapter.
    """
    head = _output_head(model)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    head_name = next((name for name in linears if model.get_submodule(name) is head), None)
    chosen = choose_names([name for name, _ in model.named_modules() if name], linears, head_name, config)
    targets = {}
    for name in chosen:
        module = model.get_submodule(name)
        if module is head:
            raise RecipeError(f"adapter.target_modules: {name} is the output head, never adapted; leave it out")
        if isinstance(module, AbbaLinear):
            raise RecipeError(f"adapter: {name} has an ABBA adapter already; inject into a fresh base model")
        if not isinstance(module, nn.Linear):
            raise RecipeError(f"adapter.target_modules: {name} is a {type(module).__name__}, not a linear layer")
        if isinstance(config, AdapterConfig):  # an SVD has no more; LoRA may waste what it likes
            check_ranks(name, (module.out_features, module.in_features), config.r1, config.r2)
        targets[name] = module
    return targets


def choose_names(
    modules: Sequence[str], linears: Sequence[str], head: str | None, config: AdapterConfig | BaselineConfig
) -> list[str]:
    """The names among `modules` that `config` means, in their order; `linears` and `head` are among them.

    Raises:
        RecipeError: nothing matches, one of the listed suffixes matches nothing, or there are fewer layers.
    """
    wanted = config.target_modules
    if wanted == "all-linear":
        chosen = [name for name in linears if name != head]
    else:
        chosen = _matching(modules, wanted, sorted(_last_parts(linears)))
    if config.layer_range is not None:
        first, stop = config.layer_range
        layers = 1 + max((index for name in linears if (index := layer_index(name)) is not None), default=-1)
        if stop > layers:
            raise RecipeError(f"adapter.layer_range: ({first}, {stop}) goes beyond the model's {layers} layers")
        chosen = [name for name in chosen if (index := layer_index(name)) is not None and first <= index < stop]
    if not chosen:
        _refuse_joined(wanted, _last_parts(linears))
        raise RecipeError(
            f"adapter.target_modules: {wanted!r} with layer_range {config.layer_range} matches no module; "
            f"the model's linear layers end in {', '.join(sorted(_last_parts(linears)))}"
        )
    return chosen


def inject(
    model: nn.Module, config: AdapterConfig, seed: int = 0, factors: Mapping[str, Factors] | None = None
) -> InjectionReport:
    """Freeze the model and turn its target layers into AbbaLinear, in place.

    Args:
        model: any module built from nn.Linear; its parameter names do not change.
        seed: of the initial factors; each module derives its own from it and its name.
        factors: by module name, instead of an SVD of each weight: from a saved adapter, or for sharded weights.

    Raises:
        RecipeError: see `find_targets`; `factors` are not those of exactly the target modules; or the model has an
            adapter already, which would be frozen.
        CheckpointError: factors have other shapes than their module needs, or cannot train.
    """
    if abba_modules(model):
        raise RecipeError("adapter: this model has one already; name all target_modules at once, in a model without")
    targets = find_targets(model, config)
    if factors is not None and factors.keys() != targets.keys():
        different = sorted(factors.keys() ^ targets.keys())
        raise RecipeError(f"adapter: {len(different)} modules differ from the given factors, such as {different[0]}")
    model.requires_grad_(False)
    for name, linear in targets.items():
        if factors is not None:
            given = factors[name]
        else:
            given = initial_factors(linear.weight, config.r1, config.r2, seed_for(name, seed), config.init)
        check_factors(name, given, linear, config)
        AbbaLinear.adopt(linear, given, config)
    return counted(model, targets)


def counted(model: nn.Module, targets: Mapping[str, nn.Linear]) -> InjectionReport:
    """The report on a model whose `targets` were adapted."""
    trainable = sum(_full_size(p) for p in model.parameters() if p.requires_grad)
    frozen = sum(_full_size(p) for p in model.parameters() if not p.requires_grad)
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in targets.items()}
    return InjectionReport(shapes, trainable, frozen)


def factor_shapes(linear: nn.Linear, config: AdapterConfig) -> Factors:
    """The shape of each factor of a module, as Factors of tuples."""
    return Factors(**config.factor_shapes(linear.out_features, linear.in_features))


def check_factors(name: str, factors: Factors, linear: nn.Linear, config: AdapterConfig) -> None:
    """Raises CheckpointError for factors that do not fit module `name`, or with which nothing would ever train."""
    for key, factor, shape in zip(Factors._fields, factors, factor_shapes(linear, config), strict=True):
        if tuple(factor.shape) != shape:
            raise CheckpointError(
                f"adapter: {key} of {name} is {tuple(factor.shape)}, this model needs {shape}; "
                "the adapter was made for another model, r1 or r2"
            )
    if not factors.B1.any() and not factors.B2.any():
        raise CheckpointError(f"adapter: B1 and B2 of {name} are all zero, so no factor of it has a gradient")


def layer_index(name: str) -> int | None:
    """The decoder layer that a module name belongs to: its first numeric part. model.layers.7.mlp.up_proj -> 7"""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _output_head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if find is not None else None


def _refuse_joined(wanted: tuple[str, ...] | str, known: set[str]) -> None:
    """Raises RecipeError for a text such as q_proj,v_proj, which is meant as a list."""
    names = list(map(str.strip, wanted.split(","))) if isinstance(wanted, str) else []
    if names and known.issuperset(names):
        raise RecipeError(
            f"adapter.target_modules: {wanted!r}: a text is a regular expression for whole names; write a list: "
            f"[{', '.join(names)}]"
        )


def _last_parts(names: Iterable[str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in names}


def _matching(names: Sequence[str], wanted: tuple[str, ...] | str, known: list[str]) -> list[str]:
    """PEFT's rules: a string is a regular expression for the whole name, a list holds suffixes of it."""
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise RecipeError(f"adapter.target_modules: {wanted!r} is no regular expression: {error}") from error
        return [name for name in names if pattern.fullmatch(name)]
    matches = {suffix: [n for n in names if n == suffix or n.endswith(f".{suffix}")] for suffix in wanted}
    for suffix, found in matches.items():
        if not found:
            near = difflib.get_close_matches(suffix, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the model has {', '.join(known)}"
            raise RecipeError(f"adapter.target_modules: {suffix!r} matches no module of the model; {hint}")
    chosen = {name for found in matches.values() for name in found}
    return [name for name in names if name in chosen]


def _full_size(parameter: nn.Parameter) -> int:
    # A ZeRO-3 partition keeps the size of the whole in ds_numel; its own storage is empty.
    return getattr(parameter, "ds_numel", None) or parameter.numel()
