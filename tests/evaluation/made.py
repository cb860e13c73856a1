"""An adapter that changes most answers of the tiny base, and still lets it answer."""

import torch
from transformers import PreTrainedModel

from abba import AdapterConfig, inject
from abba.adapter.linear import abba_modules
from abba.base_model import load_whole
from tests.distributed.ranks import TINY


def adapted() -> tuple[PreTrainedModel, AdapterConfig]:
    """The tiny base in fp32 with an adapter of unequal ranks whose B2 is random."""
    model, config = load_whole(TINY, torch.float32, "sdpa"), AdapterConfig(4, 3, 8.0)
    inject(model, config)
    generator = torch.Generator().manual_seed(0)
    for module in abba_modules(model).values():
        module.B2.data.copy_(0.15 * torch.randn(module.B2.shape, generator=generator))
    return model, config
