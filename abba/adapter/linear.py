"""AbbaLinear: an nn.Linear that also owns the four factors."""

import contextlib
from collections.abc import Iterator
from types import MethodType

import torch
from torch import Tensor, nn

from abba.adapter.config import AdapterConfig
from abba.adapter.functional import AbbaLinearFunction, delta_weight, frozen_linear
from abba.adapter.initialize import Factors, initial_factors, seed_for
from abba.errors import RecipeError


class AbbaLinear(nn.Linear):
    """A frozen linear layer with the trainable update s (B1 A1) * (B2 A2).

    A subclass and not a wrapper: `weight` and `bias` keep their names, so base checkpoints load unchanged, and
    ZeRO-3's hooks gather the weight with the module that uses it.

    Parameters: weight (out, in) and bias (out,), frozen; A1 (r1, in), B1 (out, r1), A2 (r2, in), B2 (out, r2).
    """

    A1: nn.Parameter
    B1: nn.Parameter
    A2: nn.Parameter
    B2: nn.Parameter
    adapter_config: AdapterConfig
    bypassed: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: AdapterConfig,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._own(initial_factors(self.weight, config.r1, config.r2, seed_for("", seed), config.init), config)

    @classmethod
    def adopt(cls, linear: nn.Linear, factors: Factors, config: AdapterConfig) -> "AbbaLinear":
        """Turn an existing layer into an AbbaLinear in place, whether its weight is whole or partitioned."""
        linear.__class__ = cls
        if "forward" in linear.__dict__:  # it hides the class's, and without this would go on calling nn.Linear's
            _rewire_hook(linear)
        linear._own(factors, config)
        return linear

    def _own(self, factors: Factors, config: AdapterConfig) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        for name, factor in factors._asdict().items():
            factor = factor.to(device=self.weight.device, dtype=self.weight.dtype, copy=True)
            setattr(self, name, nn.Parameter(factor))
        self.adapter_config = config
        self.bypassed = False

    @property
    def factors(self) -> Factors:
        """The live parameters, not copies."""
        return Factors(self.A1, self.B1, self.A2, self.B2)

    @property
    def scale(self) -> float:
        return self.adapter_config.scale

    def base_weight(self) -> Tensor:
        """The frozen weight (out, in) as the matrix product takes it: the one place that knows how it is stored."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        if self.bypassed:
            y_TO = frozen_linear(input.reshape(-1, input.shape[-1]), self.base_weight(), self.bias)
            return y_TO.view(*input.shape[:-1], y_TO.shape[-1])
        return AbbaLinearFunction.apply(input, *self.factors, self.scale, self.base_weight, self.bias)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """The update (out, in) that the factors stand for, in fp32 or wider."""
        wide = torch.promote_types(self.A1.dtype, torch.float32)
        return delta_weight(*(factor.to(wide) for factor in self.factors), self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r1={self.A1.shape[0]}, r2={self.A2.shape[0]}, scale={self.scale:g}"


def _rewire_hook(linear: AbbaLinear) -> None:
    """Accelerate hooks the layers of a model that is split over GPUs; a hook keeps what it wraps in `_old_forward`."""
    if "_old_forward" not in linear.__dict__:
        raise RecipeError("adapter: another library has replaced the forward of a target layer; inject before it does")
    linear._old_forward = MethodType(AbbaLinear.forward, linear)


def abba_modules(model: nn.Module) -> dict[str, AbbaLinear]:
    """Every AbbaLinear of a model by its module name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AbbaLinear)}


@contextlib.contextmanager
def bypass(model: nn.Module) -> Iterator[None]:
    """Within it the model computes as if it had no adapter, ours or PEFT's."""
    # PEFT's own switch, enable_adapters, changes what requires a gradient too.
    switches = {True: "bypassed", False: "_disable_adapters"}
    found = [(module, switches[isinstance(module, AbbaLinear)]) for module in model.modules()]
    found = [(module, switch) for module, switch in found if hasattr(module, switch)]
    for module, switch in found:
        setattr(module, switch, True)
    try:
        yield
    finally:
        for module, switch in found:
            setattr(module, switch, False)
