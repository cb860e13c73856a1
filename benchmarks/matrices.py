"""The matrices that are approximated: random, structured, and weights of the embedded tiny model."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

TINY = Path(__file__).resolve().parents[1] / "recipes/assets/tiny-llama/model.safetensors"
WEIGHTS = {
    "q_proj 0": "model.layers.0.self_attn.q_proj.weight",
    "up_proj 1": "model.layers.1.mlp.up_proj.weight",
    "down_proj 3": "model.layers.3.mlp.down_proj.weight",
}


def uniform(size: int, generator: torch.Generator) -> Tensor:
    """U(0, 1): a mean, which is of rank one, and noise."""
    return torch.rand(size, size, generator=generator)


def gaussian(size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, size, generator=generator)


def low_rank_and_noise(size: int, generator: torch.Generator) -> Tensor:
    """Rank 8 and Gaussian noise of a tenth of its size."""
    left, right = (torch.randn(size, 8, generator=generator) for _ in range(2))
    return left @ right.T / 8**0.5 + 0.1 * gaussian(size, generator)


def sparse(size: int, generator: torch.Generator) -> Tensor:
    """One entry in twenty is not 0."""
    return gaussian(size, generator) * (torch.rand(size, size, generator=generator) < 0.05)


def block(size: int, generator: torch.Generator) -> Tensor:
    """Eight Gaussian blocks on the diagonal."""
    return gaussian(size, generator) * torch.block_diag(*[torch.ones(size // 8, size // 8)] * 8)


def power_law(size: int, generator: torch.Generator, exponent: float) -> Tensor:
    """Singular values k**-exponent between random orthogonal bases."""
    left, right = (torch.linalg.qr(gaussian(size, generator)).Q for _ in range(2))
    return left * torch.arange(1, size + 1) ** -exponent @ right


def checkerboard(size: int, generator: torch.Generator) -> Tensor:
    """0 and 1 in fields of eight entries: rank 2."""
    fields = torch.arange(size) // 8
    return (fields[:, None] + fields) % 2


def xor_grid(size: int, generator: torch.Generator) -> Tensor:
    """i xor j."""
    index = torch.arange(size)
    return index[:, None] ^ index


def parity(size: int, generator: torch.Generator) -> Tensor:
    """A mask of +1 and -1: the parity of i and j (Walsh and Hadamard), whose singular values are all the same.

    It is the elementwise product of one such pattern for each bit, of rank 2 each.
    """
    index = torch.arange(size)
    common, odd = index[:, None] & index, torch.zeros(size, size, dtype=torch.long)
    while common.any():
        odd ^= common & 1
        common = common >> 1
    return 1 - 2 * odd


KINDS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "uniform": uniform,
    "gaussian": gaussian,
    "low rank + noise": low_rank_and_noise,
    "sparse": sparse,
    "block": block,
    "power law 0.5": lambda size, generator: power_law(size, generator, 0.5),
    "power law 1": lambda size, generator: power_law(size, generator, 1.0),
    "checkerboard": checkerboard,
    "xor grid": xor_grid,
    "parity": parity,
}


def matrix(kind: str, size: int, seed: int) -> Tensor:
    """A matrix (size, size) in float64, or one of WEIGHTS as it is; the last three kinds and weights have one only."""
    if kind in WEIGHTS:
        return load_file(TINY)[WEIGHTS[kind]].double()
    return KINDS[kind](size, torch.Generator().manual_seed(seed)).double()
