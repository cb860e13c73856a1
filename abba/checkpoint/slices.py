"""Which elements of a flattened tensor a rank holds, at any world size.

DeepSpeed ZeRO-3 gives every rank ceil(numel / world_size) elements and pads the last ones; a checkpoint holds the
slices without that padding, so that the slices of all ranks joined are the tensor.
"""


def slice_bounds(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """[start, stop) of rank `rank`; empty for the last ranks of a tensor with fewer elements than ranks."""
    part = -(-numel // world_size)
    return min(rank * part, numel), min((rank + 1) * part, numel)


def overlapping(numel: int, world_size: int, start: int, stop: int) -> list[tuple[int, int, int]]:
    """(rank, from, to): which parts of the slices at `world_size` make up the elements [start, stop)."""
    pieces = []
    for rank in range(world_size):
        low, high = slice_bounds(numel, rank, world_size)
        left, right = max(low, start), min(high, stop)
        if left < right:
            pieces.append((rank, left - low, right - low))
    return pieces
