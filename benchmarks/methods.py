"""The adapters that are compared: ours, ABBA as autograd would do it from the textbook formula, and PEFT's own."""

from collections.abc import Iterable

import torch
from peft import HiraConfig, LoHaConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from abba.adapter.config import AdapterConfig
from abba.adapter.functional import khatri_rao
from abba.adapter.initialize import Factors
from abba.adapter.inject import factor_shapes, find_targets, inject
from abba.adapter.linear import AbbaLinear, abba_modules

METHODS = ("frozen", "lora", "dora", "hira", "loha", "textbook", "abba")


class TextbookAbba(AbbaLinear):
    """The same function, differentiated by autograd."""

    def forward(self, input: Tensor) -> Tensor:
        hidden = F.linear(input, khatri_rao(self.A1, self.A2))
        update = F.linear(hidden, khatri_rao(self.B1.T, self.B2.T).T)
        return F.linear(input, self.weight, self.bias) + self.scale * update


def placeholders(model: nn.Module, config: AdapterConfig) -> dict[str, Factors]:
    """Factors that take no time to make; their values follow."""
    return {
        name: Factors(*(torch.ones(shape) for shape in factor_shapes(linear, config)))
        for name, linear in find_targets(model, config).items()
    }


def adapt(model: nn.Module, method: str, targets: Iterable[str], rank: int = 16) -> nn.Module:
    """`model` with an adapter of 2 * rank * (in + out) parameters a layer: r1 = r2 = rank, LoRA of twice that rank.

    All factors are trained in the model's own dtype, as ours are, with values that are not zero.
    """
    targets = list(targets)
    if method == "frozen":
        return model.requires_grad_(False)
    if method in ("abba", "textbook"):
        config = AdapterConfig(r1=rank, r2=rank, alpha=24.0, target_modules=tuple(targets))
        inject(model, config, factors=placeholders(model, config))
        if method == "textbook":
            for module in abba_modules(model).values():
                module.__class__ = TextbookAbba
    else:
        config = {
            "lora": lambda: LoraConfig(r=2 * rank, lora_alpha=2 * rank, target_modules=targets),
            "dora": lambda: LoraConfig(r=2 * rank, lora_alpha=2 * rank, target_modules=targets, use_dora=True),
            "hira": lambda: HiraConfig(r=2 * rank, target_modules=targets),
            "loha": lambda: LoHaConfig(r=rank, alpha=rank, target_modules=targets),
        }[method]()
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    dtype = next(parameter for parameter in model.parameters() if not parameter.requires_grad).dtype
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data = values.to(device=parameter.device, dtype=dtype)
    return model
