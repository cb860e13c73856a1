"""The sharded base as other methods than ABBA use it: gathered for a moment, read from outside, trained itself."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager

import deepspeed
from torch import Tensor, nn


def gathered(linear: nn.Linear) -> AbstractContextManager:
    """Within it the weight of a sharded layer is whole on every rank. Collective."""
    return deepspeed.zero.GatheredParameters([linear.weight])


def gather_for(readers: Iterable[tuple[nn.Module, Iterable[nn.Parameter]]]) -> None:
    """Each module's forward and backward read parameters of others: ZeRO-3 gathers them for the reader too."""
    for module, parameters in readers:
        for parameter in parameters:
            deepspeed.zero.register_external_parameter(module, parameter)


def slices_of_base(parameters: Mapping[str, nn.Parameter]) -> Callable[[str, str, int, int], Tensor]:
    """A `read` for `start_engine` when the base itself trains: a rank asks for nothing but its own slices."""

    def read(kind: str, name: str, start: int, stop: int) -> Tensor:
        return parameters[name].ds_tensor.data[: stop - start].float()

    return read
