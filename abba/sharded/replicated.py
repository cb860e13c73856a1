"""What every rank keeps whole between steps, under ZeRO-3: the factors, and the base's 1-D tensors.

Shapes: N ranks, P elements of a rank's partition of a parameter, S of its partitions of several, one after the other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, free_param
from torch import nn

GATHERED_AT_ONCE = 32  # parameters: of a 70B model with r1 = r2 = 16 up to 29 MB in bf16, beside themselves


def replicate(engine: deepspeed.DeepSpeedEngine, added: set[int]) -> None:
    """Keep what was `added` to the base (factors, by id) and 1-D tensors whole on every rank.

    DeepSpeed persists by size alone. At 70B a factor has up to 458,752 elements, so its default threshold of 1e5 keeps
    1.3% of them, and a threshold large enough for all might keep small base matrices too; hence by name.
    """
    persistent = engine.optimizer.parameter_offload.persistent_parameters
    for parameter in engine.module.parameters():
        if id(parameter) in added or len(parameter.ds_shape) == 1:
            parameter.ds_persist = True
            parameter.partition = _partition_without_copy(parameter)
            persistent.append(parameter)
    if persistent[0].ds_zero_partition_world_size > 1:
        of_one = persistent[0].all_gather

        def all_gather(param_list: list[nn.Parameter] | None = None, **how: Any) -> Any:
            """DeepSpeed calls the first one's with all of them after every update."""
            return gather_whole(persistent) if param_list is persistent else of_one(param_list, **how)

        persistent[0].all_gather = all_gather
    persistent[0].all_gather(persistent)


def gather_whole(parameters: Sequence[nn.Parameter]) -> None:
    """Make partitioned parameters whole again. Collective.

    DeepSpeed's own takes a collective for each, of which a 70B model has 2,401.
    """
    missing = [parameter for parameter in parameters if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    for first in range(0, len(missing), GATHERED_AT_ONCE):
        some = missing[first : first + GATHERED_AT_ONCE]
        own_S = torch.cat([parameter.ds_tensor for parameter in some]).to(some[0].device)
        of_ranks_NS = own_S.new_empty(some[0].ds_zero_partition_world_size, len(own_S))
        comm.all_gather_into_tensor(of_ranks_NS.view(-1), own_S, group=some[0].ds_process_group)
        parts = of_ranks_NS.split([len(parameter.ds_tensor) for parameter in some], dim=1)
        for parameter, part_NP in zip(some, parts, strict=True):
            parameter.data = part_NP.flatten()[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE
    if not get_accelerator().resolves_data_dependency():  # as DeepSpeed's: it fetches on a stream that does not wait
        get_accelerator().synchronize()


def _partition_without_copy(parameter: nn.Parameter) -> Callable[..., None]:
    """DeepSpeed's `partition`, but without what zero_hpz_partition_size adds for a parameter that has been updated.

    It would copy every factor, after every step, into a further partition that nothing reads, and the host would wait
    for the GPU after each: 2,240 times for a 70B model.
    """
    of_deepspeed = parameter.partition

    def partition(
        param_list: list[nn.Parameter] | None = None, has_been_updated: bool = False, free_data: bool = True, **how: Any
    ) -> None:
        if param_list is not None or has_been_updated or not free_data:
            of_deepspeed(param_list, has_been_updated=has_been_updated, free_data=free_data, **how)
        elif parameter.ds_status == ZeroParamStatus.AVAILABLE:
            free_param(parameter)
            parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE

    return partition
