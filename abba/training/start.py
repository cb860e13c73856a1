"""What a method makes of the base, and the state that its training starts from."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from abba.adapter.baseline import inject_baseline, read_elsewhere
from abba.adapter.config import AdapterConfig, FullConfig, MethodConfig
from abba.adapter.initialize import Factors
from abba.adapter.inject import InjectionReport, counted, factor_shapes, find_targets, inject
from abba.checkpoint.format import ShardReader
from abba.errors import CheckpointError
from abba.sharded.base import gather_for, gathered, slices_of_base
from abba.sharded.initialize import starting_factors
from abba.sharded.ranks import Ranks
from abba.training.resume import ResumePoint

Read = Callable[[str, str, int, int], Tensor]  # see start_engine


@contextmanager
def injected(
    model: nn.Module,
    config: MethodConfig,
    point: ResumePoint | None,
    seed: int,
    init_from: str | None,
    cache: Path | None,
    ranks: Ranks,
    say: Callable[[str], None],
) -> Iterator[tuple[InjectionReport, Read]]:
    """(what was changed, how to read slices of the training state) of a sharded base, changed in place. Collective.

    Raises:
        RecipeError: see `find_targets`.
        CheckpointError: the checkpoint's tensors are not those that train.
    """
    factors: dict[str, Factors] = {}
    if isinstance(config, AdapterConfig):
        targets = find_targets(model, config)
        if point is None:
            factors = starting_factors(targets, config, seed, init_from, cache, ranks, say)
        else:  # the engine replaces them, and no rank reads more than its slices
            factors = {name: _ones(linear, config) for name, linear in targets.items()}
        report = inject(model, config, factors=factors)
    elif isinstance(config, FullConfig):
        report = train_all(model)
    else:
        report = inject_baseline(model, config, seed, gathered)
        gather_for(read_elsewhere(model, config, report.shapes))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if point is None:
        if factors:
            yield report, slices_of_factors(factors)
        else:
            yield report, (slices_of_base if isinstance(config, FullConfig) else slices_of_values)(trained)
        return
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trained.items()}
    if shapes != point.state.tensors:
        wrong = sorted(shapes.items() ^ point.state.tensors.items())[0][0]
        raise CheckpointError(f"{point.directory}: {wrong} is not as this base and adapter need it")
    with ShardReader(point.directory, point.state) as reader:
        yield report, reader.read_range


def train_all(model: nn.Module) -> InjectionReport:
    """Every parameter trains; nothing is added."""
    model.requires_grad_(True)
    return counted(model, {})


def _ones(linear: nn.Linear, config: AdapterConfig) -> Factors:
    return Factors(*(torch.ones(shape, device=linear.weight.device) for shape in factor_shapes(linear, config)))


def slices_of_factors(factors: Mapping[str, Factors]) -> Read:
    """In fp32, as they were computed and before the model's dtype rounds them."""

    def read(kind: str, name: str, start: int, stop: int) -> Tensor:
        module, _, factor = name.rpartition(".")
        return getattr(factors[module], factor).flatten()[start:stop]

    return read


def slices_of_values(parameters: Mapping[str, nn.Parameter]) -> Read:
    """Of parameters that are whole on every rank, as they are now: the engine will partition them."""
    values = {name: parameter.detach().float().flatten() for name, parameter in parameters.items()}

    def read(kind: str, name: str, start: int, stop: int) -> Tensor:
        return values[name][start:stop]

    return read
