"""What a method makes of the base, and the state that its training starts from: the one place that tells them apart."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from abba.adapter.baseline import inject_baseline, read_elsewhere
from abba.adapter.config import AdapterConfig, FullConfig, MethodConfig
from abba.adapter.inject import InjectionReport, counted, find_targets, inject
from abba.checkpoint.format import ShardReader
from abba.errors import CheckpointError
from abba.sharded.base import gather_for, gathered, slices_of_base
from abba.sharded.ranks import Ranks
from abba.training.resume import ResumePoint, starting_point

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
    if isinstance(config, AdapterConfig):
        targets = find_targets(model, config)
        with starting_point(point, targets, config, seed, init_from, cache, ranks, say) as (factors, read):
            yield inject(model, config, factors=factors), read
        return
    if isinstance(config, FullConfig):
        report = train_all(model)
    else:
        report = inject_baseline(model, config, seed, gathered)
        gather_for(read_elsewhere(model, config, report.shapes))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trained.items()}
    if point is None:
        yield report, (slices_of_base if isinstance(config, FullConfig) else slices_of_values)(trained)
        return
    if shapes != point.state.tensors:
        wrong = sorted(shapes.items() ^ point.state.tensors.items())[0][0]
        raise CheckpointError(f"{point.directory}: {wrong} is not as this base and adapter need it")
    with ShardReader(point.directory, point.state) as reader:
        yield report, reader.read_range


def train_all(model: nn.Module) -> InjectionReport:
    """Every parameter trains; nothing is added."""
    model.requires_grad_(True)
    return counted(model, {})


def slices_of_values(parameters: Mapping[str, nn.Parameter]) -> Read:
    """Of parameters that are whole on every rank, as they are now: the engine will partition them."""
    values = {name: parameter.detach().float().flatten() for name, parameter in parameters.items()}

    def read(kind: str, name: str, start: int, stop: int) -> Tensor:
        return values[name][start:stop]

    return read
