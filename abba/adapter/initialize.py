"""The factors that training starts from: a truncated SVD of the frozen weight in one pair, delta W = 0 by the other."""

import contextlib
import hashlib
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from abba.errors import RecipeError

# Measured by benchmarks/startup.py: the rank-16 error of a 4096 x 4096 weight is within 1.001 of the best, also where
# singular values decay slowly or none stands out; with two iterations it is not. Method: Halko et al. 2011.
OVERSAMPLING, POWER_ITERATIONS = 8, 4


class Factors(NamedTuple):
    """The four factors of one module, in the order in which every function of this package takes them."""

    A1: Tensor  # (r1, in)
    B1: Tensor  # (out, r1)
    A2: Tensor  # (r2, in)
    B2: Tensor  # (out, r2)


def seed_for(name: str, seed: int) -> int:
    """A seed of its own for every module, so that no factor depends on the order of initialisation."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def check_ranks(name: str, shape: torch.Size | tuple[int, int], r1: int, r2: int) -> None:
    """Refuse ranks that the weight (out, in) of module `name` cannot have."""
    for key, rank in (("r1", r1), ("r2", r2)):
        if rank > min(shape):
            raise RecipeError(
                f"adapter.{key}: {rank} is above the rank of {name}, whose weight is {tuple(shape)}; "
                f"choose at most {min(shape)}"
            )


@contextlib.contextmanager
def reproducible(device: torch.device, seed: int) -> Iterator[None]:
    """One thread and a private random stream: torch.svd_lowrank is not bit-equal across thread counts."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@torch.no_grad()
def initial_factors(weight_OI: Tensor, r1: int, r2: int, seed: int, init: str = "svd") -> Factors:
    """The factors that training starts from, in fp32 on the weight's device; delta W = 0.

    svd: see `factors_from_svd`. reference: the same as the published code has it, which takes the SVD without
    oversampling and with 10 power iterations. kaiming: A1 and B1 drawn as A2 is, whatever the weight.

    Raises:
        RecipeError: a rank above min(out, in).
    """
    if init == "svd":
        return factors_from_svd(weight_OI, r1, r2, seed)
    if init == "reference":
        return factors_from_svd(weight_OI, r1, r2, seed, oversampling=0, power_iterations=10)
    out_features, in_features = weight_OI.shape
    check_ranks("a module", weight_OI.shape, r1, r2)
    empty = partial(torch.empty, device=weight_OI.device)
    with reproducible(weight_OI.device, seed):
        a1_RI, b1_OR, a2_QI = (
            _kaiming(empty(shape)) for shape in ((r1, in_features), (out_features, r1), (r2, in_features))
        )
    return Factors(a1_RI, b1_OR, a2_QI, torch.zeros(out_features, r2, device=weight_OI.device))


@torch.no_grad()
def factors_from_svd(
    weight_OI: Tensor,
    r1: int,
    r2: int,
    seed: int,
    oversampling: int = OVERSAMPLING,
    power_iterations: int = POWER_ITERATIONS,
) -> Factors:
    """Initial factors of a frozen weight (out, in), in fp32 on the weight's device.

    B1 = U sqrt(S), A1 = sqrt(S) V^T from the rank-r1 truncated SVD; B2 = 0; A2 Kaiming-uniform with a = 0, that is
    U(-b, b) with b = sqrt(6 / in), as the paper's code does. Only B2 has a gradient in the first step.

    Raises:
        RecipeError: a rank above min(out, in).
    """
    out_features, in_features = weight_OI.shape
    check_ranks("a module", weight_OI.shape, r1, r2)
    with reproducible(weight_OI.device, seed):
        oversampled = min(r1 + oversampling, out_features, in_features)
        u_OK, s_K, v_IK = torch.svd_lowrank(weight_OI.float(), q=oversampled, niter=power_iterations)
        root_R = s_K[:r1].sqrt()
        a2_QI = _kaiming(torch.empty(r2, in_features, device=weight_OI.device))
    return Factors(
        A1=(v_IK[:, :r1] * root_R).T.contiguous(),
        B1=(u_OK[:, :r1] * root_R).contiguous(),
        A2=a2_QI,
        B2=torch.zeros(out_features, r2, device=weight_OI.device),
    )


def _kaiming(factor: Tensor) -> Tensor:
    """Filled with U(-b, b), b = sqrt(6 / columns)."""
    bound = (6 / factor.shape[1]) ** 0.5
    return factor.uniform_(-bound, bound)
