"""Initial factors of sharded weights: gathered one at a time, decomposed in turn by the ranks, sent as factors."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from abba.adapter.config import AdapterConfig
from abba.adapter.files import read_factors
from abba.adapter.initialize import Factors, initial_factors, seed_for
from abba.adapter.inject import factor_shapes
from abba.errors import CheckpointError, RecipeError
from abba.sharded.factor_cache import FactorFile, factor_file
from abba.sharded.ranks import Ranks


def starting_factors(
    targets: Mapping[str, nn.Linear],
    config: AdapterConfig,
    seed: int,
    init_from: str | None,
    cache: Path | None,
    ranks: Ranks,
    say: Callable[[str], None],
) -> dict[str, Factors]:
    """fp32 factors to train from: by `initial_factors` of each sharded weight, or a saved adapter. Collective.

    Args:
        cache: the directory where an earlier start may have kept what they are, or this one will; or None.

    Raises:
        RecipeError: the saved adapter has other ranks, another scale or other modules.
        CheckpointError: it is damaged.
    """
    if init_from is not None:
        return _of_adapter(Path(init_from), targets, config, say)
    started = time.monotonic()
    file = factor_file(cache, targets, config, seed, ranks) if cache is not None else None
    factors = _kept(file, targets, config, ranks, say) if file is not None else None
    if factors is not None:
        say(f"factors: read from {file.path} in {time.monotonic() - started:.1f} s")
        return factors
    factors = factors_of_sharded(targets, config, seed, ranks)
    drawn = "drawn" if config.init == "kaiming" else "computed by SVD"
    made = f"{drawn} in {time.monotonic() - started:.1f} s"
    if file is None:
        say(f"factors: {made}, and not kept, as adapter.cache_factors=false says")
    elif ranks.is_main:
        try:
            file.write(factors)
            say(f"factors: {made} and kept in {file.path}")
        except CheckpointError as error:  # the next start computes them again
            say(f"factors: WARNING: {made} and not kept: {error.reason}")
    return factors


def _kept(
    file: FactorFile, targets: Mapping[str, nn.Linear], config: AdapterConfig, ranks: Ranks, say: Callable[[str], None]
) -> dict[str, Factors] | None:
    """What an earlier start has kept, if it can be used: nothing is lost with a damaged file, which is made again."""
    kept = None
    if ranks.is_main:
        try:
            kept = file.read()
        except CheckpointError as error:
            say(f"factors: WARNING: {error.reason}; they are computed anew")
    found = torch.tensor(int(kept is not None), device=next(iter(targets.values())).weight.device)
    dist.broadcast(found, src=0)
    if not found:
        return None
    return {
        name: _broadcast(kept.pop(name) if ranks.is_main else None, 0, linear, config)
        for name, linear in targets.items()
    }


def _of_adapter(
    directory: Path, targets: Mapping[str, nn.Linear], config: AdapterConfig, say: Callable[[str], None]
) -> dict[str, Factors]:
    description, factors = read_factors(directory)
    for key in ("r1", "r2", "alpha", "scale_rule"):
        saved, wanted = getattr(description.config, key), getattr(config, key)
        if saved != wanted:
            raise RecipeError(f"adapter.{key}: {wanted} is not the {saved} of adapter.init_from={directory}; set it so")
    if factors.keys() != targets.keys():
        different = sorted(factors.keys() ^ targets.keys())
        raise RecipeError(f"adapter.init_from: {directory} differs from the targets in {different[0]}")
    say(f"factors: those of {directory}, as adapter.init_from says")
    device = next(iter(targets.values())).weight.device
    return {name: Factors(*(factor.float().to(device) for factor in factors[name])) for name in targets}


def factors_of_sharded(
    targets: Mapping[str, nn.Linear], config: AdapterConfig, seed: int, ranks: Ranks
) -> dict[str, Factors]:
    """fp32 factors of every target, the same on every rank and bit-equal at any world size.

    Rank (i mod world_size) keeps and decomposes weight i while the others do theirs, so no rank holds more than two
    full weights: the one it keeps and the one being gathered.
    """
    factors: dict[str, Factors] = {}
    pairs = list(targets.items())
    for first in range(0, len(pairs), ranks.world_size):
        group = pairs[first : first + ranks.world_size]
        kept = None
        for owner, (_, linear) in enumerate(group):
            with deepspeed.zero.GatheredParameters([linear.weight]):
                if ranks.rank == owner:
                    kept = linear.weight.detach().clone()
        mine = None
        if kept is not None:
            mine = initial_factors(kept, config.r1, config.r2, seed_for(group[ranks.rank][0], seed), config.init)
            del kept
        for owner, (name, linear) in enumerate(group):
            factors[name] = _broadcast(mine if ranks.rank == owner else None, owner, linear, config)
    return factors


def _broadcast(mine: Factors | None, owner: int, linear: nn.Linear, config: AdapterConfig) -> Factors:
    """The owner's factors on every rank, on its device."""
    shapes = factor_shapes(linear, config)
    sizes = [a * b for a, b in shapes]
    if mine is not None:
        flat = torch.cat([factor.flatten() for factor in mine]).to(linear.weight.device)
    else:
        flat = torch.empty(sum(sizes), device=linear.weight.device)
    dist.broadcast(flat, src=owner)
    return Factors(*(part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)))
