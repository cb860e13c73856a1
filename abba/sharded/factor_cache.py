"""Initial factors as a file, so that the next start on the same base need not decompose it.

Rank 0 alone reads and writes it: on a shared file system one read serves any number of ranks, which get the factors
over their own network as they get computed ones.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from abba.adapter.config import AdapterConfig
from abba.adapter.initialize import OVERSAMPLING, POWER_ITERATIONS, Factors
from abba.checkpoint.slices import slice_bounds
from abba.errors import CheckpointError
from abba.prepared import content_digest, write_prepared
from abba.sharded.ranks import Ranks
from abba.storage import SafetensorsFile, free_bytes, in_gb, is_there

FORMAT_VERSION = 1  # another one when initial_factors computes other bits from the same
KEPT = ("A1", "B1", "A2")  # B2 is 0
WORD, CHUNK = 8, 1 << 18  # bytes that are summed as one number; numbers that are summed at once


@dataclass(frozen=True)
class FactorFile:
    """Where the factors of a base lie, or will; `made_from` is all that decides their bits, as JSON."""

    path: Path
    made_from: str
    shapes: Mapping[tuple[str, str], tuple[int, ...]]  # of what is kept, by (module, factor)

    def read(self) -> dict[str, Factors] | None:
        """fp32 factors on the CPU, verified; None if there is no file.

        Raises:
            CheckpointError: it cannot be read, is damaged, or was made from something else.
        """
        if not is_there(self.path):
            return None
        with SafetensorsFile(self.path) as file:
            tensors = self._verified(file)
        factors = {}
        for module in dict.fromkeys(module for module, _ in self.shapes):
            a1_RI, b1_OR, a2_QI = (tensors[f"{module}.{factor}"] for factor in KEPT)
            factors[module] = Factors(a1_RI, b1_OR, a2_QI, torch.zeros(len(b1_OR), len(a2_QI)))
        return factors

    def _verified(self, file: SafetensorsFile) -> dict[str, Tensor]:
        if file.metadata.get("made_from") != self.made_from:
            raise CheckpointError(f"{self.path}: was made from another base or with other settings")
        expected = {f"{module}.{factor}": (shape, torch.float32) for (module, factor), shape in self.shapes.items()}
        if {name: (stored.shape, stored.dtype) for name, stored in file.tensors.items()} != expected:
            raise CheckpointError(f"{self.path}: is damaged: it does not hold the factors that it should")
        tensors = {name: file.read_full(name) for name in expected}
        if content_digest(tensors, {"made_from": self.made_from}) != file.metadata.get("sha256"):
            raise CheckpointError(f"{self.path}: is damaged: its SHA-256 is another one than it says")
        return tensors

    def write(self, factors: Mapping[str, Factors]) -> None:
        """The file is there, whole and on disk, on return; of two starts that write it at once the later one's stays.

        Raises:
            CheckpointError: it cannot be written; nothing is left of it.
        """
        tensors = {f"{module}.{factor}": getattr(factors[module], factor).cpu() for module, factor in self.shapes}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_prepared(self.path, tensors, {"made_from": self.made_from})
        except OSError as error:
            size = sum(tensor.nbytes for tensor in tensors.values())
            raise CheckpointError(
                f"{self.path}, {in_gb(size)}, cannot be written: {error.strerror}; "
                f"{in_gb(free_bytes(self.path.parent))} are free"
            ) from error


def factor_file(
    directory: Path, targets: Mapping[str, nn.Linear], config: AdapterConfig, seed: int, ranks: Ranks
) -> FactorFile:
    """The file in `directory` for these sharded weights, named by what its factors are made from. Collective."""
    weights = [linear.weight for linear in targets.values()]
    sums = torch.stack([place_sums(w.ds_tensor, w.ds_numel, ranks.rank, ranks.world_size) for w in weights])
    sums = sums.to(weights[0].device)
    dist.all_reduce(sums)
    modules, shapes = [], {}
    for (name, linear), of_weight in zip(targets.items(), sums.tolist(), strict=True):
        out, into = linear.out_features, linear.in_features
        modules.append([name, out, into, *(f"{number % 2**64:016x}" for number in of_weight)])
        shapes |= {(name, f): shape for f, shape in config.factor_shapes(out, into).items() if f in KEPT}
    parts = {
        "version": [FORMAT_VERSION, torch.__version__, _kind(weights[0].device)],
        "svd": {"oversampling": OVERSAMPLING, "power_iterations": POWER_ITERATIONS},
        "factors": {"r1": config.r1, "r2": config.r2, "seed": seed, "init": config.init},
        "dtype": str(weights[0].ds_tensor.dtype),
        "modules": modules,
    }
    made_from = json.dumps(parts)
    name = f"factors-{hashlib.sha256(made_from.encode()).hexdigest()[:20]}.safetensors"
    return FactorFile(directory / name, made_from, shapes)


def place_sums(shard: Tensor, numel: int, rank: int, world_size: int) -> Tensor:
    """This rank's part of two sums over a flattened weight, which together tell it from others: int64 (2,).

    Read as numbers of 8 bytes: their sum, and that of each times 2 place + 1; both mod 2^64. The first alone would not
    notice rows in another order, as a mended conversion of a base has them. Added over ranks they are the same at any
    world size, because a number on the border of two ranks is the sum of its parts.
    """
    start, stop = slice_bounds(numel, rank, world_size)
    first, before = divmod(start, WORD // shard.element_size())
    behind = -(before + stop - start) % (WORD // shard.element_size())
    numbers = F.pad(shard.detach()[: stop - start], (before, behind)).view(torch.int64)
    twice_places = torch.arange(0, 2 * min(CHUNK, len(numbers)), 2, device=shard.device)
    sums = torch.zeros(2, dtype=torch.int64, device=shard.device)
    for low in range(0, len(numbers), CHUNK):
        part = numbers[low : low + CHUNK]
        plain = part.sum()
        sums[0] += plain
        sums[1] += (part * twice_places[: len(part)]).sum() + plain * (2 * (first + low) + 1)
    return sums


def _kind(device: torch.device) -> str:
    """What rounds: the same libraries give other bits on another kind of processor."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
