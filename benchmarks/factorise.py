"""The best approximations W ~ f(factors) that a number of parameters can buy: LoRA, ABBA, a sum of pairs, halves.

LoRA and the halves have closed forms (Eckart and Young 1936). ABBA, (B1 A1) * (B2 A2), has none; its scale s is
left out, because free factors absorb it. On planted matrices (64 x 64, r1 = r2 = 4) Adam, L-BFGS, alternating least
squares and Gauss-Newton by rows all stopped at relative errors of 0.3 to 0.4 from random starts. Alternating least
squares with twice the ranks, under a weight decay that falls from where it just lets the factors live, then cut to
the ranks, finds the planted matrix from about every fourth start.

A name's suffix is its shape: O out, I in, R a pair's rank. All in float64, all on one device.
"""

import math

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, Tensor, Tensor]  # B1 (O, R), A1 (R, I), B2 (O, R), A2 (R, I)

SWEEPS = 100  # of alternating least squares while the decay falls, by a factor of DECAY_FALL
DECAY_FALL = 1e-3
UNDECAYED_SWEEPS = 20  # after the cut to the ranks
WIDE_UP_TO = 8  # pairs of at most this rank start twice as wide; above it was slower and no better
EXACT = 2e-3  # a start that comes this close is about to be exact: no other is needed


def relative_error(w_OI: Tensor, approximation_OI: Tensor) -> float:
    return float((w_OI - approximation_OI).norm() / w_OI.norm())


def singular_tail(w_OI: Tensor, rank: int) -> float:
    """The relative error of the best approximation of rank `rank`, from the singular values alone."""
    s_K = torch.linalg.svdvals(w_OI)
    return float(s_K[rank:].norm() / s_K.norm())


def best_low_rank(w_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (O, rank) and A (rank, I) of the truncated SVD, each with the root of the singular values."""
    u_OK, s_K, v_KI = torch.linalg.svd(w_OI, full_matrices=False)
    root_R = s_K[:rank].sqrt()
    return u_OK[:, :rank] * root_R, root_R[:, None] * v_KI[:rank]


def best_halves(w_OI: Tensor, parameters: int) -> tuple[float, int]:
    """(relative error, parameters used): one low-rank pair for each half of the outputs, or of the inputs.

    The budget buys whole ranks, which the halves share so that the error is least.
    """
    found = []
    for matrix in (w_OI, w_OI.T):
        out, into = matrix.shape
        halves = matrix[: out // 2], matrix[out // 2 :]
        squares = [torch.linalg.svdvals(half).square() for half in halves]
        prices = [half.shape[0] + into for half in halves]
        for first in range(min(halves[0].shape[0], into, parameters // prices[0]) + 1):
            second = min((parameters - first * prices[0]) // prices[1], halves[1].shape[0], into)
            left = squares[0][first:].sum() + squares[1][second:].sum()
            found.append((float(left), first * prices[0] + second * prices[1]))
    error, used = min(found)
    return math.sqrt(error) / float(w_OI.norm()), used


def product_of(factors: Factors) -> Tensor:
    b1_OR, a1_RI, b2_OR, a2_RI = factors
    return (b1_OR @ a1_RI) * (b2_OR @ a2_RI)


def sum_of(factors: Factors) -> Tensor:
    b1_OR, a1_RI, b2_OR, a2_RI = factors
    return b1_OR @ a1_RI + b2_OR @ a2_RI


def random_start(w_OI: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """Gaussian factors whose product has entries of the size of W's."""
    out, into = w_OI.shape
    shapes = ((out, rank), (rank, into), (out, rank), (rank, into))
    size = (float(w_OI.square().mean().sqrt()) / rank) ** 0.25
    return tuple(size * torch.randn(shape, generator=generator, dtype=w_OI.dtype) for shape in shapes)


def low_rank_start(w_OI: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """LoRA of rank `rank` in the second pair, nearly ones in the first: ABBA is no worse than LoRA of its own rank."""
    b1_OR, a1_RI, _, _ = (0.1 * factor for factor in random_start(torch.ones_like(w_OI), rank, generator))
    b1_OR[:, 0], a1_RI[0] = 1.0, 1.0
    return b1_OR, a1_RI, *best_low_rank(w_OI, rank)


def fit_abba(w_OI: Tensor, rank: int, starts: int, seed: int) -> tuple[float, list[float]]:
    """(relative error, error of each start): the best of `starts` random starts and the low-rank one, then polished.

    Args:
        rank: r1 = r2.
    """
    w_OI = w_OI / w_OI.square().mean().sqrt()
    generator = torch.Generator().manual_seed(seed)
    candidates = [_undecayed(w_OI, low_rank_start(w_OI, rank, generator))]
    for _ in range(starts):
        if relative_error(w_OI, product_of(candidates[-1])) < EXACT:
            break
        candidates.append(_undecayed(w_OI, _annealed(w_OI, rank, generator)))
    errors = [relative_error(w_OI, product_of(candidate)) for candidate in candidates]
    best = polished(w_OI, candidates[errors.index(min(errors))], product_of)
    return relative_error(w_OI, product_of(best)), errors


def fit_sum(w_OI: Tensor, rank: int, seed: int) -> float:
    """Relative error of B1 A1 + B2 A2 by the same polish from a random start; what it should reach is known."""
    w_OI = w_OI / w_OI.square().mean().sqrt()
    start = random_start(w_OI, rank, torch.Generator().manual_seed(seed))
    return relative_error(w_OI, sum_of(polished(w_OI, start, sum_of)))


def polished(w_OI: Tensor, factors: Factors, combine, iterations: int = 500) -> Factors:
    """L-BFGS on the squared error, which never ends above where it starts."""
    factors = tuple(factor.clone(memory_format=torch.contiguous_format).requires_grad_() for factor in factors)
    optimizer = torch.optim.LBFGS(
        factors, max_iter=iterations, history_size=10, line_search_fn="strong_wolfe",
        tolerance_grad=1e-9, tolerance_change=1e-12,
    )  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (w_OI - combine(factors)).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return tuple(factor.detach() for factor in factors)


def _annealed(w_OI: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """From a random start, with a decay that falls from the largest under which the factors do not vanish."""
    wide = min(2 * rank if rank <= WIDE_UP_TO else rank, *w_OI.shape)
    start = random_start(w_OI, wide, generator)
    # The scale at which it has this effect: W -> t W asks for t**1.5, since the factors grow with t**0.25.
    decay = 0.5 * float(torch.linalg.matrix_norm(w_OI, 2)) ** 1.5 / w_OI.numel() ** 0.25
    factors = start
    while True:
        for _ in range(SWEEPS // 10):
            factors = _sweep(w_OI, factors, decay)
        if float(product_of(factors).norm() / w_OI.norm()) > 1e-2:
            break
        decay, factors = 0.7 * decay, start
    for done in range(SWEEPS):
        factors = _sweep(w_OI, factors, decay * DECAY_FALL ** (done / SWEEPS))
    b1_OR, a1_RI, b2_OR, a2_RI = factors
    return *best_low_rank(b1_OR @ a1_RI, rank), *best_low_rank(b2_OR @ a2_RI, rank)


def _undecayed(w_OI: Tensor, factors: Factors) -> Factors:
    for _ in range(UNDECAYED_SWEEPS):
        factors = _sweep(w_OI, factors, 1e-9)
    return factors


def _sweep(w_OI: Tensor, factors: Factors, decay: float) -> Factors:
    """Each of the four factors in turn, exactly, with the other three as they are."""
    b1_OR, a1_RI, b2_OR, a2_RI = factors
    first_OI = b1_OR @ a1_RI
    b2_OR = _rows(w_OI, first_OI, a2_RI, decay)
    a2_RI = _rows(w_OI.T, first_OI.T, b2_OR.T, decay).T
    second_OI = b2_OR @ a2_RI
    b1_OR = _rows(w_OI, second_OI, a1_RI, decay)
    a1_RI = _rows(w_OI.T, second_OI.T, b1_OR.T, decay).T
    return b1_OR, a1_RI, b2_OR, a2_RI


def _rows(w_OI: Tensor, other_OI: Tensor, a_RI: Tensor, decay: float) -> Tensor:
    """argmin over B (O, R) of |W - other * (B A)|^2 + decay |B|^2: a small least-squares problem for each row of B."""
    rank = a_RI.shape[0]
    pairs_KI = (a_RI[:, None] * a_RI[None]).flatten(0, 1)  # K = R * R
    normal_ORR = (other_OI.square() @ pairs_KI.T).view(-1, rank, rank)
    normal_ORR.diagonal(dim1=1, dim2=2).add_(decay)
    return torch.linalg.solve(normal_ORR, (w_OI * other_OI) @ a_RI.T)
