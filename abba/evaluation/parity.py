"""Does what was exported compute what the native layers compute? Asked of logits, in fp32."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from abba.adapter.baseline import attach, load_by_peft
from abba.adapter.config import AdapterConfig, BaselineConfig
from abba.adapter.directory import read_description
from abba.adapter.initialize import Factors
from abba.adapter.inject import inject
from abba.base_model import load_config, load_whole


@torch.inference_mode()
def peft_difference(base: Path, adapter: Path, factors: Mapping[str, Sequence[Tensor]]) -> tuple[float, float]:
    """(largest absolute difference, largest absolute logit) between stock PEFT and the native layers.

    Args:
        factors: the fp32 factors that the adapter was made from; of a baseline, what PEFT's layers trained.

    Raises:
        CheckpointError: see `load_by_peft`.
    """
    expected = _native_logits(base, read_description(adapter).config, factors)
    model = load_whole(base, torch.float32, "eager")
    load_by_peft(model, adapter)
    return _difference(model(_tokens(base)).logits, expected)


@torch.inference_mode()
def merged_difference(base: Path, merged: Path, factors: Mapping[str, Factors]) -> tuple[float, float]:
    """(largest absolute difference, largest absolute logit) between a merged model and the native layers on its base.

    Both are computed in fp32, from the weights as they are stored.
    """
    expected = _native_logits(base, read_description(merged).config, factors)
    return _difference(load_whole(merged, torch.float32, "eager")(_tokens(base)).logits, expected)


def _native_logits(
    base: Path, config: AdapterConfig | BaselineConfig, factors: Mapping[str, Sequence[Tensor]]
) -> Tensor:
    model = load_whole(base, torch.float32, "eager")
    if isinstance(config, BaselineConfig):
        attach(model, config, factors)
    else:
        inject(model, config, factors=factors)
    return model(_tokens(base)).logits


def _tokens(base: Path) -> Tensor:
    return torch.arange(64).reshape(2, 32) * 37 % load_config(base).get_text_config().vocab_size


def _difference(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    return float((actual - expected).abs().max()), float(expected.abs().max())
