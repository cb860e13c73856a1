"""Bytes that this process reads, gathers and reduces, counted in the calls that do it; for a process that soon ends."""

import os
from collections import Counter
from typing import Any

from deepspeed.comm.torch import TorchBackend


def count_reads() -> Counter[str]:
    """Bytes of tensors read from now on, by file name: abba.storage reads them by os.preadv, and headers otherwise."""
    read, preadv = Counter(), os.preadv

    def reading(descriptor: int, buffers: list, offset: int) -> int:
        count = preadv(descriptor, buffers, offset)
        read[os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))] += count
        return count

    os.preadv = reading
    return read


def count_communication() -> Counter[str]:
    """`gathered`: what this rank receives from all-gathers; `reduced`: what it gives to reduce-scatters; and how many
    `gathers` there are."""
    moved, gather, reduce = Counter(), TorchBackend.all_gather_into_tensor, TorchBackend.reduce_scatter_tensor

    def gathering(self: TorchBackend, output_tensor: Any, input_tensor: Any, *arguments: Any, **named: Any) -> Any:
        moved["gathered"] += output_tensor.nbytes
        moved["gathers"] += 1
        return gather(self, output_tensor, input_tensor, *arguments, **named)

    def reducing(self: TorchBackend, output_tensor: Any, input_tensor: Any, *arguments: Any, **named: Any) -> Any:
        moved["reduced"] += input_tensor.nbytes
        return reduce(self, output_tensor, input_tensor, *arguments, **named)

    TorchBackend.all_gather_into_tensor, TorchBackend.reduce_scatter_tensor = gathering, reducing
    return moved
