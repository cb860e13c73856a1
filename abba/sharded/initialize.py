"""Initial factors of sharded weights: gathered one at a time, decomposed in turn by the ranks, sent as factors."""

from collections.abc import Mapping
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from abba.adapter.config import AdapterConfig
from abba.adapter.files import read_factors
from abba.adapter.initialize import Factors, initial_factors, seed_for
from abba.errors import RecipeError
from abba.sharded.ranks import Ranks


def starting_factors(
    targets: Mapping[str, nn.Linear], config: AdapterConfig, seed: int, init_from: str | None, ranks: Ranks
) -> dict[str, Factors]:
    """fp32 factors to train from: an SVD of each sharded weight, or a saved adapter. Collective.

    Raises:
        RecipeError: the saved adapter has other ranks, another scale or other modules.
        CheckpointError: it is damaged.
    """
    if init_from is None:
        return factors_of_sharded(targets, config.r1, config.r2, seed, ranks.rank, ranks.world_size, config.init)
    description, factors = read_factors(Path(init_from))
    for key in ("r1", "r2", "alpha", "scale_rule"):
        saved, wanted = getattr(description.config, key), getattr(config, key)
        if saved != wanted:
            raise RecipeError(f"adapter.{key}: {wanted} is not the {saved} of adapter.init_from={init_from}; set it so")
    if factors.keys() != targets.keys():
        different = sorted(factors.keys() ^ targets.keys())
        raise RecipeError(f"adapter.init_from: {init_from} differs from the targets in {different[0]}")
    device = next(iter(targets.values())).weight.device
    return {name: Factors(*(factor.float().to(device) for factor in factors[name])) for name in targets}


def factors_of_sharded(
    targets: Mapping[str, nn.Linear], r1: int, r2: int, seed: int, rank: int, world_size: int, init: str = "svd"
) -> dict[str, Factors]:
    """fp32 factors of every target, the same on every rank and bit-equal at any world size.

    Rank (i mod world_size) keeps and decomposes weight i while the others do theirs, so no rank holds more than two
    full weights: the one it keeps and the one being gathered.
    """
    factors: dict[str, Factors] = {}
    pairs = list(targets.items())
    for first in range(0, len(pairs), world_size):
        group = pairs[first : first + world_size]
        kept = None
        for owner, (_, linear) in enumerate(group):
            with deepspeed.zero.GatheredParameters([linear.weight]):
                if rank == owner:
                    kept = linear.weight.detach().clone()
        mine = None
        if kept is not None:
            mine = initial_factors(kept, r1, r2, seed_for(group[rank][0], seed), init)
            del kept
        for owner, (name, linear) in enumerate(group):
            factors[name] = _broadcast(mine if rank == owner else None, owner, linear, r1, r2)
    return factors


def _broadcast(mine: Factors | None, owner: int, linear: nn.Linear, r1: int, r2: int) -> Factors:
    out, into = linear.out_features, linear.in_features
    shapes = Factors((r1, into), (out, r1), (r2, into), (out, r2))
    sizes = [a * b for a, b in shapes]
    if mine is not None:
        flat = torch.cat([factor.flatten() for factor in mine])
    else:
        flat = torch.empty(sum(sizes), device=linear.weight.device)
    dist.broadcast(flat, src=owner)
    return Factors(*(part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)))
