"""Does stock PEFT compute from an exported adapter what the native layers compute? Asked of logits."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from abba.adapter.files import read_description
from abba.adapter.initialize import Factors
from abba.adapter.inject import inject
from abba.base_model import load_whole
from abba.errors import CheckpointError, first_line


@torch.inference_mode()
def peft_difference(base: Path, adapter: Path, factors: Mapping[str, Factors]) -> tuple[float, float]:
    """(largest absolute difference, largest absolute logit) between PEFT and the native layers, in fp32.

    Args:
        factors: the fp32 factors that the adapter was made from.

    Raises:
        CheckpointError: peft is not installed, or finds tensors missing.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise CheckpointError("--verify with --base needs peft: pip install 'abba-recipes[export]'") from None
    native = load_whole(base, torch.float32, "eager")
    tokens = torch.arange(64).reshape(2, 32) * 37 % native.config.vocab_size
    inject(native, read_description(adapter).config, factors=factors)
    expected = native(tokens).logits
    del native
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # to PEFT a missing tensor is a warning
        try:
            actual = PeftModel.from_pretrained(load_whole(base, torch.float32, "eager"), adapter).eval()(tokens).logits
        except UserWarning as error:
            raise CheckpointError(f"{adapter}: PEFT does not load all of it: {first_line(error)}") from None
    return float((actual - expected).abs().max()), float(expected.abs().max())
