"""What ranks tell each other outside training: short texts, and whether all could do their part.

As plain bytes: the object collectives of torch.distributed unpickle what peers send.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from abba.errors import CheckpointError


def share(data: bytes, device: torch.device) -> list[bytes]:
    """Every rank's bytes, on every rank, in the order of ranks. Collective."""
    sizes = [int(size) for size in all_gather(torch.tensor([len(data)], device=device))]
    mine = torch.zeros(max(*sizes, 1), dtype=torch.uint8, device=device)
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
    return [bytes(part[:size].cpu().tolist()) for part, size in zip(all_gather(mine), sizes, strict=True)]


def agree(work: Callable[[], None], device: torch.device) -> None:
    """Do one's part; go on only if every rank could, so that none waits for one that failed. Collective.

    Raises:
        CheckpointError: the first failure by rank, the same on every rank.
    """
    failure = ""
    try:
        work()
    except CheckpointError as error:
        failure = error.reason
    except OSError as error:
        failure = f"{error.filename or 'output_dir'}: {error.strerror or error}"
    failures = [(rank, text.decode()) for rank, text in enumerate(share(failure.encode(), device)) if text]
    if failures:
        rank, reason = failures[0]
        others = f" (and {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
        where = f"rank {rank}{others}: " if dist.get_world_size() > 1 else ""
        raise CheckpointError(f"{where}{reason}")


def all_gather(mine: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's tensor, all of one shape, on every rank, in the order of ranks. Collective."""
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    return gathered
