"""What a base model is computed in, where the user leaves it to us."""

import pytest
import torch

from abba import base_model
from abba.base_model import choose_dtype


@pytest.mark.parametrize(
    "wanted, is_fast, chosen, said",
    [
        ("auto", True, "bfloat16", ""),
        ("auto", False, "float32", "float32, because this CPU has no instructions for bfloat16"),
        ("bfloat16", True, "bfloat16", ""),
        ("bfloat16", False, "bfloat16", "WARNING: this CPU has no instructions for bfloat16"),
        ("float32", True, "float32", ""),
        ("float32", False, "float32", ""),
    ],
)
def test_auto_is_what_is_fast_here(monkeypatch, wanted, is_fast, chosen, said):
    monkeypatch.setattr(base_model, "_has_fast_bfloat16", lambda: is_fast)
    name, note = choose_dtype(wanted)
    assert name == chosen and note.startswith(said) and bool(note) == bool(said)


def test_gpus_are_fast(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_dtype("auto") == ("bfloat16", "")
